"""A loss that is not finite: noticed, written down, and the end of the run or skipped."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax import pipeline, train
from maect_jax.errors import RunFailedError
from maect_jax.report import build
from maect_jax.run import checkpoints, jsonl
from maect_jax.stages import step as steps
from tests.helpers.common import assert_trees_equal, mae_config, mesh_of, run_on


@pytest.fixture
def load(tmp_path):
    return mae_config(tmp_path / "images", epochs=2)


@pytest.fixture
def poison(monkeypatch):
    """Has the steps of the given numbers give NaN."""
    whole = steps.gradients

    def begin(*bad):
        def gradients(stage, state, batch):
            factor = jnp.where(jnp.isin(state.step + 1, jnp.array(bad)), jnp.nan, 1.0)
            return jax.tree.map(
                lambda x: x * factor if jnp.issubdtype(x.dtype, jnp.floating) else x,
                whole(stage, state, batch),
            )

        monkeypatch.setattr(steps, "gradients", gradients)

    return begin


def params(run, step):
    folder = checkpoints.stage_folder(run, "mae")
    return checkpoints.read_parts(folder, ("params", "opt_state"), mesh_of(1, 1), step)


@pytest.fixture
def batches(monkeypatch):
    """The record numbers of each step's images."""
    taken, put = {}, train.sharding.put_batch

    def noted(batch, mesh):
        if "seed" in batch:
            taken[len(taken) + 1] = batch["index"].tolist()
        return put(batch, mesh)

    monkeypatch.setattr(train.sharding, "put_batch", noted)
    return taken


def test_a_bad_step_is_written_down_and_ends_the_run(tmp_path, load, monkeypatch, poison, batches):
    run = tmp_path / "run"
    poison(6)
    with pytest.raises(RunFailedError) as failed:
        run_on(monkeypatch, (1, 1), load(), run, report=False)
    good = checkpoints.stage_folder(run, "mae") / "4"
    for text in ("stage mae, step 6: the loss (nan)", run / "bad_steps.jsonl", "nan_policy=skip",
                 f"{good}. Run the same command to resume."):  # fmt: skip
        assert str(text) in str(failed.value)
    (entry,) = jsonl.read(run / "bad_steps.jsonl")
    assert (entry["stage"], entry["step"], entry["loss"]) == ("mae", 6, "nan")
    assert entry["index"] == batches[6]
    assert len(entry["images"]) == 10
    assert [line["step"] for line in jsonl.read(run / "metrics.jsonl") if "loss" in line] == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip
    assert checkpoints.steps_of(good.parent) == [4]


def test_a_bad_step_is_skipped_up_to_a_bound(tmp_path, load, monkeypatch, poison, caplog):
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    poison(4, 6)  # the last step of an epoch, which is saved, and one that is not
    skip = ("nan_policy=skip", "nan_limit=2")
    run_on(monkeypatch, (1, 1), load(*skip), run, report=False)
    assert [entry["step"] for entry in jsonl.read(run / "bad_steps.jsonl")] == [4, 6]
    assert "Skipped (2 of at most 2)" in caplog.text
    losses = [line["loss"] for line in jsonl.read(run / "metrics.jsonl") if "loss" in line]
    assert [loss is None for loss in losses] == [s in (4, 6) for s in range(1, 9)]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params(run, 8)))
    build.report(run, pipeline.open_images(load()))  # copes with the null
    # The count goes on where a run resumes, and no step is written twice.
    shutil.copytree(run, stopped)
    shutil.rmtree(checkpoints.stage_folder(stopped, "mae") / "8")
    run_on(monkeypatch, (1, 1), load(*skip), stopped, report=False)
    assert_trees_equal(params(stopped, 8), params(run, 8))
    shutil.rmtree(checkpoints.stage_folder(stopped, "mae") / "8")
    with pytest.raises(RunFailedError, match=r"config\.nan_limit=1 were skipped"):
        run_on(
            monkeypatch,
            (1, 1),
            load("nan_policy=skip", "nan_limit=1"),
            stopped,
            report=False,
        )
    assert [entry["step"] for entry in jsonl.read(stopped / "bad_steps.jsonl")] == [4, 6]


def test_debug_nans_names_the_operation(tmp_path, load, monkeypatch, poison):
    poison(2)
    with pytest.raises(FloatingPointError, match="nan"):
        run_on(monkeypatch, (1, 1), load("debug_nans=True"), tmp_path / "run", report=False)
    assert not jax.config.jax_debug_nans


# JAX 0.12's reader of traces warns of itself, and an error in it would end the process.
@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_debug_nans_and_a_profile_leave_a_good_run_alone(tmp_path, load, monkeypatch):
    settings = load("debug_nans=True", "mae.epochs=1", "profile=(2,3)")
    run_on(monkeypatch, (1, 1), settings, tmp_path / "run", report=False)
    (traced,) = (tmp_path / "run" / "profile" / "mae").rglob("*.xplane.pb")
    trace = jax.profiler.ProfileData.from_file(str(traced))
    events = [event for plane in trace.planes for line in plane.lines for event in line.events]
    # XProf takes these for the steps.
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "mae"]
    assert steps == [2, 3]
    assert len(events) > 100
