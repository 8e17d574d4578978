"""The launch scripts and the notebook.

Marked slow: the notebook from top to bottom.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from tests.helpers import FAST_RUN, ROOT

LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent
# As Jupyter does: in the notebook's own folder.
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, resources={"metadata": {"path": "launch"}}).execute()
nbformat.write(notebook, sys.argv[1])
"""
POD = ("pod", "us-central1-a")
# Settings behind the notebook's tiny config: half of the longest stage, and no t-SNE.
SHORTER = "--config.mae.epochs=1 --config.mae.warmup_epochs=0 --config.eval.map=pca"


def tpu_pod(*arguments):
    return subprocess.run(
        [LAUNCH / "tpu_pod.sh", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_scripts_are_clean_and_short():
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert len(scripts) == 2
    done = subprocess.run([BIN / "shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len((LAUNCH / "tpu_pod.sh").read_text().splitlines()) <= 60


def commands_of(output):
    """The words of each command that a dry run prints, as a shell reads them."""
    return [
        subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
        ).stdout.split("\0")[:-1]
        for line in output.removeprefix("$ ").split("\n$ ")
    ]


def test_a_dry_run_prints_the_commands_and_runs_none():
    flags = ("--config=configs/ct_vith16.py", "--workdir=/mnt/it's here")
    done = tpu_pod("--dry-run", "run", *POD, "v5litepod-16", *flags)
    assert done.returncode == 0, done.stderr
    last = tpu_pod("run", *POD, "v5litepod-16", *flags, "--dry-run")
    assert last.stdout == done.stdout
    commands = commands_of(done.stdout)
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert [command[4] for command in commands if command[:4] == tpu] == [
        "describe", "create", "scp", "ssh", "ssh", "ssh",
    ]  # fmt: skip
    assert commands[1] == [
        *tpu, "create", "pod", "--zone=us-central1-a", "--accelerator-type=v5litepod-16",
        "--version=v2-alpha-tpuv5-lite",
    ]  # fmt: skip
    # The flags reach main as they were given: run what the hosts' shell would, with an echo.
    start = commands[-2][-1].partition("nohup ")[2].partition(" >run.log")[0]
    start = start.replace(".venv/bin/python", "printf '%s\\n'")
    told = subprocess.run(["bash", "-c", start], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["-m", "maect_jax.main", *flags, "status 0"]


def test_a_dry_run_deletes_nothing():
    done = tpu_pod("--dry-run", "delete", *POD)
    assert commands_of(done.stdout.rstrip("\n")) == [
        ["gcloud", "compute", "tpus", "tpu-vm", "delete", "pod", "--zone=us-central1-a", "--quiet"]
    ]


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_a_stopped_pod_leaves_no_process(tmp_path, how):
    """A stand-in for Python that notes the signal that reaches it."""
    stub = tmp_path / "python"
    stub.write_text(
        f"""#!/usr/bin/env bash
[[ $1 == -c ]] && echo 1234 && exit
trap 'echo $1 INT >>{tmp_path}/log; exit 130' INT
trap 'echo $1 TERM >>{tmp_path}/log; exit 143' TERM
echo started >>{tmp_path}/log
while true; do sleep 0.05; done
"""
    )
    stub.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    # A shell cannot trap what is ignored where it starts, as under nohup.
    command = ["env", "--default-signal=INT", LAUNCH / "local_pod.sh", "3"]
    with subprocess.Popen(command, env=os.environ | {"PATH": path}) as pod:
        while not (tmp_path / "log").exists() or (tmp_path / "log").read_text().count("d\n") < 3:
            time.sleep(0.05)
        pod.send_signal(getattr(signal, how))
        assert pod.wait(20) == 128 + getattr(signal, how)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[3:] == [f"-m {how.removeprefix('SIG')}"] * 3


WRONG = [
    (),
    ("stop", *POD),
    ("run", *POD, "v4-8", "--config=x"),  # no folder
    ("run", *POD, "v4-8", "--config=x", "--workdir=runs/x"),  # not one that hosts share
    ("run", *POD, "v5e:4x4", "--config=x", "--workdir=/mnt/x"),
]


@pytest.mark.parametrize("arguments", WRONG, ids=str)
def test_a_wrong_call_tells_how_to_call(arguments):
    done = tpu_pod(*arguments)
    assert done.returncode == 2
    assert "launch/tpu_pod.sh [--dry-run] run NAME ZONE TYPE" in done.stderr


def images_in(folder):
    """300 images to train on and 40 held out, of two kinds."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 300), ("val", 40)):
        for i in range(count):
            pixels = rng.integers(0, 128, (20, 30, 3), dtype=np.uint8) + np.uint8(100 * (i % 2))
            path = folder / split / f"kind {i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


def test_the_notebook_names_configs_that_exist():
    notebook = nbformat.read(LAUNCH / "colab_tpu.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    named = set(re.findall(r"configs/\w+\.py", code))
    assert named
    assert all((ROOT / path).is_file() for path in named)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """As committed, but for the tiny config, a folder of its own, and images."""
    notebook = nbformat.read(LAUNCH / "colab_tpu.ipynb", as_version=4)
    changes = {
        'CONFIG = "configs/quickstart.py"': f'CONFIG = "configs/quickstart.py:test {SHORTER}"',
        'Path("runs/notebook")': f'Path("{tmp_path}/run")',
        'Path("runs/notebook_own")': f'Path("{tmp_path}/own")',
        'IMAGES = ""': f'IMAGES = "{images_in(tmp_path / "my images")}"',
    }
    for old, new in changes.items():
        (cell,) = (c for c in notebook.cells if c.cell_type == "code" and old in c.source)
        cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, tmp_path / "notebook.ipynb")
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {FAST_RUN}",
    }
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, tmp_path / "notebook.ipynb"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ran = nbformat.read(tmp_path / "notebook.ipynb", as_version=4)
    outputs = [cell.outputs for cell in ran.cells if cell.cell_type == "code"]
    assert not [out for outs in outputs for out in outs if out.get("name") == "stderr"]
    install, devices, quickstart, report, own, archive = (
        "".join(out.get("text") or out["data"].get("text/html", "") for out in outs)
        for outs in outputs
    )
    assert "installed" in install
    assert "cpu" in devices.lower()
    assert "ct - mae" in quickstart
    assert "<iframe srcdoc" in report
    assert "ct - mae" in own
    assert "<iframe srcdoc" in own
    assert "run.tar.gz" in archive
