"""The command line: help, dry run, and bad input, each through the real `main`."""

import os
import platform
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from maect_jax import config, main, pipeline, sharding
from tests.helpers import ROOT
from tests.helpers.common import save

QUICK = "--config=configs/quickstart.py:test"
BAD = {
    "no config": ((), ".*--config"),
    "unknown key": ((QUICK, "--config.ct.epoch=3"), "--config.ct.epoch=3: .* 'ct.epochs'"),
    "unknown config": (
        ("--config=configs/quickstrat.py",), "--config=configs/quickstrat.py: .*quickstart.py",
    ),
    "unknown name": (("--config=quickstrat:test",), "--config=quickstrat:test: .* quickstart"),
    "unknown flag": ((QUICK, "--wrokdir=x"), ".*--wrokdir=x"),
    "stray word": ((QUICK, "runs/x"), ".*runs/x"),
    "batch and devices": (
        (QUICK, "--config.head.batch_size=255"), r"config.head.batch_size=255: .*\(2\).* 254",
    ),
    "batch and images": (
        (QUICK, "--config.mae.batch_size=9000"), "config.mae.batch_size=9000: .*8000",
    ),
    "mesh and devices": (
        (QUICK, "--config.mesh.fsdp=3"), r"config.mesh=\(data=-1, fsdp=3\): .* is 2;",
    ),
    "patch and image": (
        (QUICK, "--config.model.patch_size=5"),
        r"config.model.image_size=\(28, 28\): .* patch size 5",
    ),
    "top-k and queue": ((QUICK, "--config.ct.top_k=600"), "config.ct.top_k=600: .* 512"),
    "frozen and depth": (
        (QUICK, "--config.ct.frozen_blocks=5"), "config.ct.frozen_blocks=5: .* from 0 to 4",
    ),
    "no predecessor": (
        ("--config=configs/ct_vitb16.py:test", "--config.init_from=runs/absent"),
        "config.init_from='runs/absent': ",
    ),
    "no start": (
        ("--config=configs/head_vith14.py",), "config.init_from='': stage head .*'random'",
    ),
    "no images": (
        ("--config=configs/mae_vitb16.py", "--config.data.path=absent"),
        "config.data.path: .*'absent/train'",
    ),
    "path without source": (
        (QUICK, "--config.data.path=mine"), "config.data.path='mine': .*config.data.source",
    ),
    "unknown value": (
        (QUICK, "--config.data.source=jpeg"),
        "config.data.source='jpeg': .*'fashion_mnist', 'folder', 'shards', 'tfds'",
    ),
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys, in_root):
    """Runs `main` in this process on two devices; gives status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        return SimpleNamespace(status=ended.value.code, **capsys.readouterr()._asdict())

    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=two))
    # What a real command sets for its process.
    monkeypatch.setattr(config, "_silence_failed_saves", lambda: None)
    return run


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_status_2_and_writes_nothing(run, tmp_path, arguments, message):
    done = run(*arguments, f"--workdir={tmp_path / 'run'}")
    (line,) = done.err.splitlines()
    assert re.match(f"error: {message}", line), line
    assert (done.status, done.out) == (2, "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["batch and images", "mesh and devices", "patch and image"])
def test_dry_run_refuses_what_a_run_would(run, name):
    arguments, message = BAD[name]
    done = run(*arguments, "--dry_run")
    assert re.match(f"error: {message}", done.err), done.err
    assert (done.status, done.out) == (2, "")


def test_help_lists_every_config(run):
    done = run("--help")
    assert done.status == 0
    for path in (ROOT / "configs").glob("*.py"):
        assert (f"\n  {path.stem} " in done.out) == (path.stem != "common")
    assert "Stage 3: contrastive tuning of the upper half of ViT-H/16" in done.out


def test_dry_run_tells_what_would_run(run, tmp_path):
    done = run("--config=configs/ct_vith16.py", "--dry_run", f"--workdir={tmp_path / 'run'}")
    assert done.status == 0, done.err
    first, second, *rows = done.out.splitlines()[1:]
    assert first == "on 2 cpu (data 2 x fsdp 1)"
    assert "config.init_from='runs/head_vith16'" in second
    rows = {row[2:24].strip(): row[24:] for row in rows if row[:2] == "  "}
    assert rows["steps"].startswith("75,060 (30 epochs of 1,281,167 images, warm-up 15,012)")
    assert rows["batch"] == "512 images x 2 views"
    assert rows["images seen"] == "38,430,720 (76,861,440 views)"
    assert rows["parameters trained"] == "324,295,680"
    assert rows["parameters frozen"] == "315,824,640"
    assert rows["memory of the state"].startswith("6,210 MiB")
    assert rows["FLOPs per step"] == "5.21e+14"
    assert not (tmp_path / "run").exists()


def test_dry_run_refuses_images_that_a_run_would(run, tmp_path):
    """Class folders without held-out ones, which the evaluation needs."""
    for name in ("a", "b"):
        save(tmp_path / "train" / name / "0.png", (28, 28))
    small = ("data.source=folder", f"data.path={tmp_path}", "mae.batch_size=2",
             "head.batch_size=2", "ct.batch_size=2")  # fmt: skip
    done = run(QUICK, "--dry_run", *(f"--config.{setting}" for setting in small))
    line = done.err.splitlines()[-1]  # after warnings about the small set
    assert re.match(f"error: config.data.path: there is no folder '{tmp_path}/val'.* train", line)
    assert "config.data.labels=none" in line
    assert (done.status, done.out) == (2, "")


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (KeyError("x"), "error: unexpected KeyError: 'x'"),
        (FloatingPointError("nan in mul\nmore"), "error: debug_nans: nan in mul"),
    ],
)
def test_an_unforeseen_error_ends_with_a_line_after_its_traceback(run, monkeypatch, error, last):
    def fail(config):
        raise error

    monkeypatch.setattr(pipeline, "dry_run", fail)
    done = run(QUICK, "--dry_run")
    lines = done.err.splitlines()
    assert done.status == 1
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].startswith(last)


MAECT = Path(sys.executable).with_name("maect")


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "maect_jax.convert"],
        [MAECT, "run"],
        [MAECT, "import", "absent"],
        [MAECT, "report"],
        [MAECT, "trian"],
    ],
    ids=lambda command: " ".join(map(str, command[1:])),
)
def test_every_command_is_one_line_for_a_mistake(command):
    """In interpreters of their own, as people start them."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert done.returncode == 2


def test_help_names_the_command_as_it_is_called():
    shell = f"set -o pipefail; {MAECT} run --help | head -n 1"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: maect run ")


def imported_by(*arguments):
    """The modules that a command imports, in an interpreter of its own."""
    script = f"""
import atexit, sys
from maect_jax import main
atexit.register(lambda: print(*sys.modules))
sys.argv = ["main", *{arguments!r}]
main.main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_and_mistakes_do_not_wait_for_libraries():
    assert imported_by("--help").isdisjoint(("jax", "flax"))
    assert imported_by(QUICK, "--config.ct.epoch=3").isdisjoint(("jax", "flax"))
    heavy = ("sklearn", "scipy", "matplotlib", "orbax.checkpoint", "pyarrow", "grain", "clu")
    loggers = ("tensorboardX", "wandb", "mlflow")
    assert imported_by(QUICK, "--config.ct.top_k=0").isdisjoint(heavy + loggers)


KEEP = """
import logging, os
logging.basicConfig(level=logging.DEBUG)
from maect_jax import main
main._keep_programs()
import jax
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
jax.jit(lambda x: x + 1)(1.0)
print("/jax/compilation_cache/cache_hits" in events)
print(jax.config.jax_compilation_cache_dir)
"""


def test_programs_are_kept_in_a_private_folder_or_not_at_all(tmp_path):
    def kept(**variables):
        env = {key: value for key, value in os.environ.items() if "_CACHE_" not in key} | variables
        done = subprocess.run(
            [sys.executable, "-c", KEEP], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        hit, folder = done.stdout.splitlines()
        assert folder in done.stderr or folder == "None"  # the log says where
        return hit == "True", folder

    is_hit, name = kept(XDG_CACHE_HOME=str(tmp_path))
    folder = Path(name)
    assert not is_hit
    assert folder.parent == tmp_path / "maect_jax"
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert kept(XDG_CACHE_HOME=str(tmp_path)) == (True, name)
    (program,) = folder.glob("*-cache")
    os.utime(program, (0, 0))  # it is old
    old = folder.with_name("jax-0.9-x") / "jit_f-cache"
    old.parent.mkdir()
    old.touch()
    assert kept(XDG_CACHE_HOME=str(tmp_path)) == (False, name)
    assert program.stat().st_mtime > 0  # made again
    assert old.exists()
    assert kept(XDG_CACHE_HOME="/proc/absent") == (False, "None")


NEW_PAGES = """
import ctypes, resource, sys
import jax
from maect_jax import main

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, of which there are few
if "keep" in sys.argv:
    main.keep_memory()
product = jax.jit(lambda x: (x @ x.T) @ x)  # by way of 64 MB
x = jax.numpy.ones((4096, 8))
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):  # a few may find the memory split up
    before = pages()
    product(x).block_until_ready()
    print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep what they like")
def test_the_memory_of_a_program_is_kept_for_its_next_run():
    def new_pages(*arguments: str) -> int:
        env = os.environ | {"XLA_FLAGS": ""}  # one device
        command = [sys.executable, "-c", NEW_PAGES, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        return min(map(int, done.stdout.split()[3:]))

    assert new_pages("keep") < 500 < new_pages()
