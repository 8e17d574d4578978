"""The command line: help, dry run, and bad input, each through the real `main`."""

import pytest

from tests.helpers import ROOT
from tests.helpers.commands import run_main

QUICK = "--config=configs/quickstart.py:test"
BAD = {
    "no page": ((), "--config=PAGE is needed, such as configs/quickstart.py; --help lists"),
    "unknown key": (
        (QUICK, "--config.ct.epoch=3"),
        "--config.ct.epoch=3: there is no key 'ct.epoch'; did you mean 'ct.epochs'?",
    ),
    "unknown page": (
        ("--config=configs/quickstrat.py",),
        "--config=configs/quickstrat.py: there is no such file; did you mean "
        "configs/quickstart.py?",
    ),
    "unknown flag": ((QUICK, "--wrokdir=x"), "Unknown command line flag 'wrokdir'"),
    "stray word": ((QUICK, "runs/x"), "unexpected argument 'runs/x'"),
    "batch and devices": (
        (QUICK, "--config.head.batch_size=255"),
        "config.head.batch_size=255: the 2 devices must divide it, as they do 254",
    ),
    "batch and images": (
        (QUICK, "--config.mae.batch_size=9000"),
        "config.mae.batch_size=9000: must be at most the 8000 training images",
    ),
    "mesh and devices": (
        (QUICK, "--config.mesh.fsdp=3"),
        "config.mesh=(data=-1, fsdp=3): the sizes must multiply to the number of devices, which "
        "is 2; one of them may be -1",
    ),
    "patch and image": (
        (QUICK, "--config.model.patch_size=5"),
        "config.model.image_size=(28, 28): must be (height, width), each a multiple of the patch "
        "size 5",
    ),
    "top-k and queue": (
        (QUICK, "--config.ct.top_k=600"),
        "config.ct.top_k=600: must be at most the queue size, 512",
    ),
    "frozen and depth": (
        (QUICK, "--config.ct.frozen_blocks=5"),
        "config.ct.frozen_blocks=5: must be from 0 to the depth, 4",
    ),
    "no predecessor": (
        ("--config=configs/ct_vitb16.py:test", "--config.init_from=runs/absent"),
        "config.init_from='runs/absent': there is no run; must be the folder of a run",
    ),
    "no start": (
        ("--config=configs/head_vith14.py",),
        "config.init_from='': stage head must start from something: the folder of a run, "
        "a file of weights, or 'random' weights",
    ),
    "no images": (
        ("--config=configs/mae_vitb16.py", "--config.data.path=absent"),
        "config.data.path: there is no folder 'absent/train'",
    ),
    "path without source": (
        (QUICK, "--config.data.path=mine"),
        "config.data.path='mine': must be empty for the packaged images; set config.data.source",
    ),
    "value of no kind": (
        (QUICK, "--config.data.source=jpeg"),
        "config.data.source='jpeg': must be one of 'fashion_mnist', 'folder', 'tfds'",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_status_2_and_writes_nothing(tmp_path, arguments, message):
    workdir = tmp_path / "run"
    done = run_main(*arguments, f"--workdir={workdir}", devices=2)
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {message}"), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.returncode == 2
    assert done.stdout == ""
    assert not workdir.exists()


@pytest.mark.parametrize("name", ["batch and images", "mesh and devices", "patch and image"])
def test_dry_run_refuses_what_a_run_would(name):
    arguments, message = BAD[name]
    done = run_main(*arguments, "--dry_run", devices=2)
    assert done.stderr.startswith(f"error: {message}")
    assert (done.returncode, done.stdout) == (2, "")


def test_help_lists_every_page():
    done = run_main("--help")
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "configs").glob("*.py"):
        assert (f"configs/{page.name} " in done.stdout) == (page.stem != "common")
    assert "Stage 3: contrastive tuning of the upper half of ViT-H/16" in done.stdout


def test_dry_run_tells_what_would_run(tmp_path):
    workdir = tmp_path / "run"
    done = run_main("--config=configs/ct_vith16.py", "--dry_run", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:3] == [
        "on 1 cpu (data 1 x fsdp 1)",
        "from nothing yet: config.init_from='runs/head_vith16': there is no run; must be the "
        "folder of a run, a file of weights, or 'random' weights",
    ]
    lines = {line.split("  ")[1]: line for line in done.stdout.splitlines() if line[:2] == "  "}
    assert "75,060 (30 epochs of 1,281,167 images, warm-up 15,012)" in lines["steps"]
    assert "512 images x 2 views" in lines["batch"]
    assert "38,430,720 (76,861,440 views)" in lines["images seen"]
    assert "324,295,680" in lines["parameters trained"]
    assert "315,824,640" in lines["parameters frozen"]
    assert "6,210 MiB" in lines["memory of the state"]
    assert "5.21e+14" in lines["FLOPs per step"]
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (
            "KeyError('x')",
            "unexpected KeyError: 'x'. If the machine is not to blame, please report the lines "
            "above.",
        ),
        ("FloatingPointError('nan in mul\\nmore')", "debug_nans: nan in mul"),
    ],
)
def test_what_nobody_foresaw_ends_with_a_line_after_its_traceback(error, last):
    code = f"""
from maect_jax import main, pipeline
def dry_run(config):
    raise {error}
pipeline.dry_run = dry_run
main.main()
"""
    done = run_main(QUICK, "--dry_run", python=("-c", code))
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in lines
    assert lines[-1] == f"error: {last}"
