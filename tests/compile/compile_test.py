"""Compiling for TPU slices without a TPU; what needs libtpu is skipped where it is not installed.

Marked slow: every config, and the sizes that are promised (`pytest -m slow tests/compile`).
"""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from maect_jax import config as configs
from maect_jax import errors, train
from maect_jax.compile import __main__ as command
from maect_jax.compile import chips
from maect_jax.data import sources
from maect_jax.errors import RunFailedError, UserError
from maect_jax.stages import STAGES
from maect_jax.stages.step import abstract_batch
from tests.helpers import CONFIGS, ROOT
from tests.helpers.common import mesh_of

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="needs the extra [tpu]"
)


def call(monkeypatch, *arguments):
    """Calls the command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["compile", *arguments])
    return errors.run_command(command.main)


BAD = {
    "unknown chip": (
        ("--config=ct_vith16.py", "--topology=v9:2x2"),
        "--topology=v9:2x2: must be CHIP:SHAPE, one of v4: 2x2x1 2x2x2",
    ),
    "unknown shape": (
        ("--config=ct_vith16.py", "--topology=v5e:3x3"),
        "--topology=v5e:3x3: must be CHIP:SHAPE, one of v4: 2x2x1",
    ),
    "nothing to compile": (
        ("--config=eval.py", "--topology=v5e:4x4"),
        "config.stages=('eval',): no training stage",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(arguments, message, monkeypatch, capsys):
    config, topology = arguments
    config = config.replace("=", f"={CONFIGS}/")
    assert call(monkeypatch, config, topology) == 2
    out, line = capsys.readouterr()
    assert line.startswith(f"error: {message}")
    assert line.count("\n") == 1
    assert out == ""


def test_a_topology_is_required(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, f"--config={CONFIGS}/ct_vith16.py")
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert "--topology" in line
    assert line.count("\n") == 1


def test_an_unknown_slice_lists_all_that_are_known():
    with pytest.raises(UserError) as error:
        chips.find("v5e:5x5")
    for name, chip in chips.CHIPS.items():
        assert f"{name}: {' '.join(chip.topologies)}" in str(error.value)


@pytest.mark.parametrize("source", ["fashion_mnist", "folder"])
def test_the_abstract_batch_is_that_of_the_loader(source):
    """For images of one shape, which are transferred whole, and for others, which are cropped."""
    config = configs.load(str(CONFIGS / "ct_vitb16.py:test"))
    images, mesh = sources.Blank(2000, 1), mesh_of(4, 2)
    if source == "fashion_mnist":
        images = sources.make(config.data, "train", 1)
    abstract = abstract_batch(STAGES["ct"], config, images, mesh)
    batch = next(train.batches(config, STAGES["ct"], images, 1, mesh))
    del batch["bad"]  # which stays on the host
    shapes = {key: (x.shape, x.dtype) for key, x in batch.items()}
    assert shapes == {key: (x.shape, x.dtype) for key, x in abstract.items()}
    assert batch["image"].ndim == (4 if source == "fashion_mnist" else 5)


def test_bounds_follow_from_the_published_figures():
    chip = chips.Chip(100.0, 0, 10.0, 5.0, ())
    bounds = command.lower_bounds(chip, flops=300.0, arguments=10, sent=25.0)
    assert bounds == {"compute": 3.0, "memory": 1.0, "interconnect": 5.0, "step": 5.0, "mfu": 0.6}


def test_a_device_has_its_share_of_a_chip():
    """Half of what a chip computes and keeps, but all of its links."""
    chip = chips.find("tpu7x:2x2x1")
    share = chip.device()
    assert (2 * share.flops, 2 * share.hbm, share.link_bandwidth) == (2307e12, 192 * 2**30, 600e9)
    assert share.device() == share
    assert chips.find("v5e:2x2").device() == chips.find("v5e:2x2")


class Refused:
    """A step that the compiler refuses with a message."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_step_that_does_not_fit_tells_what_it_needs():
    gib = chips.GIB
    alone = Refused("size of\n temporaries (20.5G) exceeds available HBM (15.75G) by")
    assert command.compiled(alone, gib, 16 * gib) == (
        None, {"arguments": gib, "peak": 21.5 * gib, "capacity": 15.75 * gib, "fits": False}
    )  # fmt: skip
    _, memory = command.compiled(Refused("Used 17.25G of 15.75G hbm."), gib, 16 * gib)
    assert memory["peak"] == 17.25 * gib
    with pytest.raises(RunFailedError, match="bad opcode"):
        command.compiled(Refused("bad opcode"), gib, 16 * gib)


def test_the_text_has_the_verdict_and_the_bounds():
    values = {
        "config": "x", "stage": "ct", "topology": "v5e:2x2", "devices": 4, "batch_size": 8,
        "mesh": {"data": 4, "fsdp": 1}, "compile_seconds": 2.0, "flops": 1e12,
        "memory": {"arguments": 2**20, "peak": 2**30, "capacity": 2**34, "fits": True},
        "collectives": {"all-gather": {"times": 3, "operand_bytes": 64, "sent_bytes": 192}},
        "bound": {"compute": 0.5, "memory": 0.1, "interconnect": 2.0, "step": 2.0, "mfu": 0.25},
    }  # fmt: skip
    title, *rows = command.text(values).splitlines()
    assert title == "x, stage ct, on v5e:2x2: fits"
    rows = [row.split(maxsplit=1) for row in rows]
    assert ["all-gather", "3, operands 64 B, a device sends 192 B"] in rows
    assert ["MFU", "at most 25%"] in rows
    assert ["images/s", "at most 4"] in rows
    small = {"arguments": 2**20, "peak": 2**35, "capacity": 2**34, "fits": False}
    values = {k: v for k, v in values.items() if k not in ("bound", "collectives")}
    text = command.text(values | {"memory": small, "to_save_memory": ["--config.mesh.fsdp=2"]})
    assert "does not fit: needs 32.00 GiB" in text
    assert "--config.mesh.fsdp=2" in text


def run_compile(*arguments):
    """Runs the command as people do: libtpu is loaded once in a process."""
    return subprocess.run(
        [sys.executable, "-m", "maect_jax.compile", *arguments],
        cwd=ROOT, env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def test_without_libtpu_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert call(monkeypatch, "--config=quickstart:test", "--topology=v5e:2x2") == 2
    assert capsys.readouterr().err.startswith("error: compiling for a TPU needs libtpu: ")


@needs_libtpu
def test_a_tiny_config_compiles_and_is_written_down(tmp_path):
    out = tmp_path / "found.json"
    done = run_compile(
        "--config=configs/ct_vith16.py:test", "--topology=v5e:2x2", f"--out={out}",
        "--config.mesh.fsdp=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("ct_vith16_test, stage ct, on v5e:2x2: fits\n")
    (found,) = json.loads(out.read_text()).values()
    assert found["mesh"] == {"data": 2, "fsdp": 2}
    memory = found["memory"]
    assert memory["fits"]
    assert memory["capacity"] > memory["peak"] > memory["arguments"]
    assert {"all-gather", "all-reduce"} <= set(found["collectives"])
    assert 0 < found["bound"]["mfu"] <= 1
    assert found["bound"]["step"] >= found["bound"]["compute"]


def found_for(folder, config, topology, *settings, status=0):
    """What the command writes of each stage, and what it prints."""
    out = folder / "found.json"
    overrides = (f"--config.{setting}" for setting in settings)
    done = run_compile(
        f"--config=configs/{config}", f"--topology={topology}", f"--out={out}", *overrides
    )
    assert done.returncode == status, done.stderr
    return json.loads(out.read_text()), done.stdout


ALL = sorted(p.name for p in CONFIGS.glob("*.py") if p.stem not in ("common", "eval"))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("config", ALL)
def test_every_config_fits_as_it_stands(tmp_path, config):
    found, _ = found_for(tmp_path, config, "v5e:4x4")
    for stage in found.values():
        assert stage["memory"]["fits"]


PROMISED = {
    "ct on 8 small chips": (
        "ct_vith16.py", "v5e:2x4", "mesh.fsdp=2", "encoder_microbatches=4",
    ),
    "ct on v4-16, whole batch": ("ct_vith16.py", "v4:2x2x2"),
    "mae on 16 small chips": ("mae_vith16.py", "v5e:4x4"),
    "ct on 4 chips of two devices": ("ct_vith16.py", "tpu7x:2x2x1"),
}  # fmt: skip


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("arguments", PROMISED.values(), ids=PROMISED.keys())
def test_the_papers_sizes_fit_and_compile_in_time(tmp_path, arguments):
    found, _ = found_for(tmp_path, *arguments)
    for stage in found.values():
        assert stage["batch_size"] == 512
        assert stage["memory"]["fits"]
        assert stage["compile_seconds"] < 120


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("config", "most"), [("ct_vith16.py", 8.7), ("mae_vith16.py", 8.3)])
def test_no_product_is_copied_into_another_layout(tmp_path, config, most):
    """With merged rows, or q, k and v kept as one array, it is up to a tenth more."""
    found, _ = found_for(tmp_path, config, "v5e:4x4")
    for stage in found.values():
        assert stage["memory"]["temporaries"] < most * chips.GIB


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_told_with_what_it_needs(tmp_path):
    found, text = found_for(tmp_path, "ct_vith16.py", "v5e:2x2", "remat=none", status=1)
    memory = found["ct"]["memory"]
    assert not memory["fits"]
    assert memory["peak"] > memory["capacity"]
    assert "does not fit: needs" in text
    assert "--config.mesh.fsdp=2, --config.remat=blocks, --config.encoder_microbatches=2" in text


@needs_libtpu
@pytest.mark.slow
def test_what_a_chip_sends_grows_by_the_gathered_rows_alone(tmp_path):
    """From 8 to 256 chips with 16 images each: a (n - 1) / n for what is reduced, c (n - 1) for the
    rows that every chip sends to every other."""
    sent = {}
    for count, shape in ((8, "2x4"), (16, "4x4"), (64, "8x8"), (256, "16x16")):
        found, _ = found_for(
            tmp_path, "ct_vitb16.py", f"v5e:{shape}", f"ct.batch_size={16 * count}"
        )
        kinds = found["ct"]["collectives"].values()
        sent[count] = sum(kind["sent_bytes"] for kind in kinds)
    terms = np.array([[(n - 1) / n, n - 1] for n in sent])
    totals = np.array(list(sent.values()))
    fitted, *_ = np.linalg.lstsq(terms / totals[:, None], np.ones(len(sent)))
    np.testing.assert_allclose(terms @ fitted, totals, rtol=0.02)


@needs_libtpu
@pytest.mark.slow
def test_the_look_up_sends_no_more_for_a_larger_queue(tmp_path):
    settings = "ct_vitb16.py", "v5e:4x4", "ct.batch_size=256"
    small, large = (
        found_for(tmp_path, *settings, f"ct.queue_size={size}")[0]["ct"]["collectives"]
        for size in (16_384, 262_144)
    )
    assert small == large
