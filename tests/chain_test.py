"""The whole chain through the real `main`: its files, its results, stop and resume."""

import json
import re
import shutil
import time

import jax
import numpy as np
import pytest

from maect_jax import config, pipeline
from maect_jax.errors import UserError
from maect_jax.run import checkpoints, jsonl, lineage
from maect_jax.stages import STAGES
from tests.helpers import CONFIGS, SMALL
from tests.helpers.commands import QUICK, QUICK_SETTINGS, metrics_of, run_main
from tests.helpers.common import assert_trees_equal, few_pictures, logger_at, mesh_of, run_on

CHAIN = ("mae", "head", "ct")


def test_run_leaves_its_files_and_a_table(finished):
    workdir, stdout, stderr = finished
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "config.json", "environment.json", "images.json", "origin.json", "metrics.jsonl",
        "checkpoints", "watch", "results.json", "results.md", "features", "clusters.csv",
        "report.html", "pictures", "duplicates.csv", "outliers.csv", "clusters.html", "clusters",
    }  # fmt: skip
    # What it runs on, how long, the table, where the report is, and nothing else.
    title, devices, *lines = stdout.splitlines()
    settings, table = lines[: len(CHAIN)], lines[len(CHAIN) :]
    assert [line.partition(":")[0] for line in settings] == list(CHAIN)
    assert "epochs 2, batch_size 256, base_lr" in settings[0]
    assert title.startswith("quickstart_test: mae -> head -> ct -> eval; ")
    assert devices.startswith("on 1 cpu")
    assert table[1].split() == ["percent", "pixels", "mae", "ct", "ct", "-", "mae"]
    columns = [" ".join(line.split()[:-4]) for line in table[3:-3]]
    assert columns == [
        "k-NN", "probe, centre crops", "k-means ACC", "mean of runs", "NMI", "AMI", "ARI",
        "silhouette",
    ]  # fmt: skip
    pages = [str(workdir / name) for name in ("report.html", "clusters.html")]
    assert table[:1] + table[-3:] == ["", "", *pages]
    # One line of progress a stage, redrawn in place, and nothing else.
    redrawn = [line.strip() for line in stderr.splitlines() if line.strip()]
    progress = {line.split(":")[0]: line for line in redrawn}
    assert list(progress) == [*CHAIN, "eval"]
    assert all("100%" in line for line in progress.values())
    assert "nn_accuracy" in progress["ct"]


@pytest.mark.slow
def test_debug_tells_everything_and_may_be_switched_on_later(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    shutil.rmtree(checkpoints.stage_folder(workdir, "ct"))
    # Of the evaluation, which is told in the same way, a part is enough.
    short = (*QUICK_SETTINGS, "eval.protocols=('knn',)", "eval.pixels=False", "log_level=debug")
    settings = (f"--config.{setting}" for setting in short)
    done = run_main(f"--config={QUICK}", f"--workdir={workdir}", *settings)
    assert done.returncode == 0, done.stderr
    assert "stage ct: steps 1 to 6" in done.stderr
    assert "encoder/blocks/attn/qkv/kernel" in done.stderr
    assert "orbax" in done.stderr.lower()


def test_metrics_have_every_step_once(finished):
    entries = metrics_of(finished.workdir)
    for stage, steps in (("mae", 12), ("head", 6), ("ct", 6)):
        own = [entry for entry in entries if entry["stage"] == stage]
        expected = sorted({1, *range(10, steps + 1, 10), steps})
        assert [entry["step"] for entry in own] == expected
        seconds = [entry["seconds"] for entry in own]
        assert seconds[0] > 0
        assert sorted(seconds) == seconds
        for entry in own:
            assert np.isfinite(entry["loss"])
            assert entry["images_per_second"] > 0
            assert 0 <= entry["input_wait"] < 1
            assert ("nn_accuracy" in entry) == (stage != "mae")
    assert [entry["stage"] for entry in entries] == sorted(
        (entry["stage"] for entry in entries), key=CHAIN.index
    )


def test_results_have_their_schema_and_beat_chance(finished):
    results = json.loads((finished.workdir / "results.json").read_text())
    assert list(results) == ["pixels", "mae", "ct"]
    for result in results.values():
        assert [entry["k"] for entry in result["knn"]] == [1, 10]
        assert all(entry["accuracy"] > 0.3 for entry in result["knn"])  # ten classes
        assert len(result["probe"]["probes"]) == 10
        best = result["probe"]["best_last_epoch"]
        assert 0.2 < best["top1"] < best["top5"]
        for key in ("best", "mean", "deviation"):
            assert {"acc", "nmi", "ari"} <= set(result["cluster"][key])


def test_a_torn_line_of_metrics_is_told_again_and_the_time_goes_on(tmp_path):
    def slow():
        time.sleep(0.2)

    path = tmp_path / "metrics.jsonl"
    lines = [{"stage": "ct", "step": step, "seconds": 100.0 * step} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "ct", "st')
    log = logger_at(tmp_path, done=2, steps=5)
    log.wait_for(slow() for _ in range(1))
    log.add(3, {"loss": 1.0, "finite": True, "action": 0}, index=None)
    log.flush()
    log.close()
    *before, last = jsonl.read(path)
    assert before == lines[:2]
    assert last["step"] == 3
    assert 200 < last["seconds"] < 210
    assert 0.5 < last["input_wait"] <= 1


def last_state(workdir, stage):
    folder = checkpoints.stage_folder(workdir, stage)
    parts = ("step", "params", "frozen", "batch_stats", "opt_state", "ema", "target", "queue")
    return checkpoints.read_parts(folder, parts, mesh_of(1, 1))


def test_ct_takes_over_head_and_queue_and_freezes_the_lower_half(finished):
    mae, head, ct = (last_state(finished.workdir, stage) for stage in CHAIN)
    jax.tree.map(np.testing.assert_array_equal, mae["params"]["encoder"], head["frozen"]["encoder"])
    lower = jax.tree.map(lambda x: x[:2], mae["params"]["encoder"]["blocks"])
    jax.tree.map(np.testing.assert_array_equal, lower, ct["frozen"]["encoder"]["frozen_blocks"])
    upper = jax.tree.map(lambda x: x[2:], mae["params"]["encoder"]["blocks"])
    assert not np.array_equal(
        upper["fc1"]["kernel"], ct["params"]["encoder"]["blocks"]["fc1"]["kernel"]
    )
    # What is evaluated: the frozen half as it is, the tuned half's average.
    evaluated = STAGES["ct"].encoder_params(ct)
    whole = jax.tree.map(
        lambda x, y: np.concatenate([x, y]),
        ct["frozen"]["encoder"]["frozen_blocks"], ct["ema"]["encoder"]["blocks"],
    )  # fmt: skip
    assert_trees_equal(evaluated["blocks"], whole)
    assert_trees_equal(evaluated["norm"], ct["ema"]["encoder"]["norm"])
    assert not np.array_equal(evaluated["norm"]["scale"], ct["params"]["encoder"]["norm"]["scale"])
    # Six batches went through a queue of 2 in both stages; both rings are full of image rows.
    assert (head["queue"].ids >= 0).all()
    assert (ct["queue"].ids >= 0).all()


@pytest.mark.slow
def test_the_cifar_page_runs_on_a_file_of_arrays(tmp_path, rng):
    labels = np.arange(400) % 10
    images = rng.integers(100, 120, (400, 32, 32, 3), dtype=np.uint8)
    images[..., 0] = 20 * labels[:, None, None]  # the red is of the label
    np.savez(tmp_path / "set.npz", image=images, label=labels, is_test=np.arange(400) >= 320)
    workdir = tmp_path / "run"
    path = f"--config.data.path={tmp_path / 'set.npz'}"
    done = run_main("--config=configs/cifar10.py:test", path, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert [(e["stage"], e["step"]) for e in metrics_of(workdir)] == [
        ("mae", 1), ("mae", 2), ("head", 1), ("ct", 1),
    ]  # fmt: skip
    results = json.loads((workdir / "results.json").read_text())
    assert list(results) == ["pixels", "mae", "ct"]
    assert results["pixels"]["knn"][1]["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("given", "noted", "side"),
    [((), None, 28), (("data.short_side=40",), None, 40), ((), 256, 256)],
)
def test_an_evaluation_cuts_images_as_the_run_did(finished, tmp_path, given, noted, side):
    """That which it starts from, or that in its own folder, of an earlier version."""
    if noted:
        before = json.loads((finished.workdir / "config.json").read_text())
        before["data"]["short_side"] = noted
        (tmp_path / "config.json").write_text(json.dumps(before))
    settings = (f"init_from={finished.workdir}", "data.mean=(0.5,)", "data.std=(0.5,)")
    evaluation = config.load(str(CONFIGS / "eval.py"), (*settings, *given))
    with pytest.raises(
        UserError, match=r"its encoder needs .*data\.mean=.*, config\.data\.std="
    ):  # the last check
        pipeline.prepare(evaluation, tmp_path)
    assert evaluation.data.short_side == side
    with pytest.raises(UserError, match="its encoder needs"):
        pipeline.dry_run(evaluation)


def test_images_are_cut_by_the_size_of_the_model(tmp_path):
    for size, side in (("(224,224)", 256), ("(112,224)", 128), ("(56,56)", 64)):
        model = config.load(str(CONFIGS / "mae_vitb16.py"), [f"model.image_size={size}",
                            "model.patch_size=8"])  # fmt: skip
        pipeline.prepare(model, tmp_path)
        assert model.data.short_side == side


def test_finished_run_is_not_run_again_and_another_is_refused(
    finished, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    before = (workdir / "metrics.jsonl").read_bytes(), (workdir / "results.json").read_bytes()
    again = config.load(QUICK, QUICK_SETTINGS)
    run_on(monkeypatch, (1, 1), again, workdir, report=False)
    printed = capsys.readouterr().out.replace(str(workdir), str(finished.workdir))
    assert printed.splitlines() == finished.stdout.splitlines()
    other = config.load(QUICK, (*QUICK_SETTINGS, "seed=1"))
    message = re.escape(f"--workdir={workdir}: holds another run (seed: 0 -> 1)")
    with pytest.raises(UserError, match=f"^{message}"):
        run_on(monkeypatch, (1, 1), other, workdir, report=False)
    assert before == (
        (workdir / "metrics.jsonl").read_bytes(), (workdir / "results.json").read_bytes()
    )  # fmt: skip


@pytest.mark.slow
def test_pages_chain_from_run_to_run(finished, tmp_path, monkeypatch):
    """head -> ct -> eval, MAE-CT_aug in bf16, each a run of its own, on 4 x 2 devices."""
    head, ct, evaluated = (tmp_path / name for name in ("head", "ct", "eval"))
    steps = (
        ("head_aug_vith14", head, "random", "model.dtype=bfloat16"),
        ("ct_aug_vith14", ct, head, "model.dtype=bfloat16"),
        ("eval", evaluated, ct, "seed=0"),
    )
    for name, workdir, start, override in steps:
        done = run_main(
            f"--config=configs/{name}.py:test", f"--workdir={workdir}",
            f"--config.init_from={start}", f"--config.{override}", "--config.mesh.fsdp=2",
            f"--config.{SMALL}", devices=8,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    results = json.loads((evaluated / "results.json").read_text())
    assert list(results) == ["ct"]
    # Of a run with all stages, each takes what it is made to follow.
    for stage, before in (("head", "mae"), ("ct", "head"), ("eval", "ct")):
        assert lineage.find(str(finished.workdir), stage).stage == before
    # What does not fit together is refused.
    for arguments, message in (
        (("ct_vith14", f"init_from={finished.workdir}", "ct.queue_size=256"), "queue_size"),
        (("ct_vith14", f"init_from={head}", "model.depth=3"), "model.depth=4 (it is 3)"),
        (("eval", f"init_from={head}", "data.std=(0.5,)"), "data.std=(0.353,) (it is (0.5,))"),
    ):
        name, *overrides = arguments
        loaded = config.load(str(CONFIGS / f"{name}.py:test"), overrides)
        with pytest.raises(UserError, match=re.escape(message)):
            run_on(monkeypatch, (1, 1), loaded, tmp_path / "bad")
        assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_refine_follows_its_heads_and_resumes_bit_equal(tmp_path, monkeypatch):
    """On 2 x 2 devices, with crops of both sizes in microbatches."""
    heads, run = tmp_path / "heads", tmp_path / "run"
    folder = checkpoints.stage_folder(run, "refine")
    shared = (*few_pictures(tmp_path), "log_every=1", "encoder_microbatches=2", "checkpoint.keep=9")

    def trained(stage, workdir, start):
        own = (f"init_from={start}", f"{stage}.batch_size=8", f"{stage}.epochs=2")
        loaded = config.load(str(CONFIGS / f"{stage}_vitl16.py:test"), [*shared, *own])
        run_on(monkeypatch, (2, 2), loaded, workdir, report=False)

    def left():
        parts = ("params", "frozen", "batch_stats", "opt_state", "ema", "queue", "rng")
        return jax.device_get(checkpoints.read_parts(folder, parts, mesh_of(1, 1)))

    trained("refine_head", heads, "random")
    trained("refine", run, heads)
    want, metrics = left(), jsonl.read(run / "metrics.jsonl")
    first, last = checkpoints.steps_of(folder)
    shutil.rmtree(folder / str(last))
    trained("refine", run, heads)
    assert_trees_equal(left(), want)
    losses = [
        [(line["step"], line["loss"]) for line in lines if "loss" in line and line["step"] > first]
        for lines in (metrics, jsonl.read(run / "metrics.jsonl"))
    ]
    assert losses[0] == losses[1]
