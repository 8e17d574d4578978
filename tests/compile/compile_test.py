"""Compiling for TPU slices without a TPU; what needs libtpu is skipped where it is not installed.

Marked slow: every page, and the sizes that are promised (`pytest -m slow tests/compile_test.py`).
"""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from maect_jax import config, train
from maect_jax.compile import __main__ as compile
from maect_jax.compile import chips
from maect_jax.data import sources
from maect_jax.errors import UserError
from maect_jax.stages import STAGES
from maect_jax.stages.step import abstract_batch
from tests.helpers import CONFIGS, ROOT
from tests.helpers.common import mesh_of

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="needs the extra [tpu]"
)


def run_compile(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "maect_jax.compile", *arguments],
        cwd=ROOT, env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip


BAD = {
    "unknown chip": (
        ("--config=configs/ct_vith16.py", "--topology=v9:2x2"),
        "--topology=v9:2x2: must be CHIP:SHAPE, one of v4: 2x2x1 2x2x2",
    ),
    "unknown shape": (
        ("--config=configs/ct_vith16.py", "--topology=v5e:3x3"),
        "--topology=v5e:3x3: must be CHIP:SHAPE, one of v4: 2x2x1",
    ),
    "no topology": (("--config=configs/ct_vith16.py",), "--topology=CHIP:SHAPE is needed"),
    "nothing to compile": (
        ("--config=configs/eval.py", "--topology=v5e:4x4"),
        "config.stages=('eval',): no training stage to compile",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(arguments, message):
    done = run_compile(*arguments)
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert (done.returncode, done.stdout) == (2, "")


def test_an_unknown_slice_lists_all_that_are_known():
    with pytest.raises(UserError) as error:
        chips.find("v5e:5x5")
    for name, chip in chips.CHIPS.items():
        assert f"{name}: {' '.join(chip.topologies)}" in str(error.value)


@pytest.mark.parametrize("source", ["fashion_mnist", "folder"])
def test_the_abstract_batch_is_that_of_the_loader(source):
    """For images of one shape, which travel whole, and for others, which are cut."""
    page = config.load(str(CONFIGS / "ct_vitb16.py:test"))
    found = sources.make(page.data, "train", 1) if source == "fashion_mnist" else sources.Blank(
        2000, 1
    )  # fmt: skip
    mesh = mesh_of(4, 2)
    abstract = abstract_batch(STAGES["ct"], page, found, mesh)
    batch = next(train.batches(page, STAGES["ct"], found, 1, mesh))
    del batch["bad"]  # which stays on the host
    shapes = {key: (x.shape, x.dtype) for key, x in batch.items()}
    assert shapes == {key: (x.shape, x.dtype) for key, x in abstract.items()}
    assert batch["image"].ndim == (4 if source == "fashion_mnist" else 5)


def test_bounds_follow_from_the_published_figures():
    chip = chips.Chip(100.0, 0, 10.0, 5.0, ())
    found = compile.bound_of(chip, 4, 1200.0, {"arguments": 10}, 25.0)
    assert found == {"compute": 3.0, "memory": 1.0, "interconnect": 5.0, "step": 5.0, "mfu": 0.6}


@needs_libtpu
def test_a_tiny_page_compiles_and_is_written_down(tmp_path):
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


def found_for(folder, page, topology, *settings, status=0):
    """What the command writes of each stage, and what it prints."""
    out = folder / "found.json"
    overrides = (f"--config.{setting}" for setting in settings)
    done = run_compile(
        f"--config=configs/{page}", f"--topology={topology}", f"--out={out}", *overrides
    )
    assert done.returncode == status, done.stderr
    return json.loads(out.read_text()), done.stdout


PAGES = sorted(p.name for p in CONFIGS.glob("*.py") if p.stem not in ("common", "eval"))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_page_fits_as_it_stands(tmp_path, page):
    found, _ = found_for(tmp_path, page, "v5e:4x4")
    for stage in found.values():
        assert stage["memory"]["fits"]


PROMISED = {
    "ct on 8 small chips": (
        "ct_vith16.py", "v5e:2x4", "mesh.fsdp=2", "encoder_microbatches=4",
    ),
    "ct on v4-16, whole batch": ("ct_vith16.py", "v4:2x2x2"),
    "mae on 16 small chips": ("mae_vith16.py", "v5e:4x4"),
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
