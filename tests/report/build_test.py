"""The report of a run: self-contained, true to the run's files, and rebuilt from them."""

import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from maect_jax import config as configs
from maect_jax import errors, files, pipeline
from maect_jax.errors import UserError
from maect_jax.evals import features, maps, runner
from maect_jax.report import __main__ as command
from maect_jax.report import build, style
from tests.helpers import CONFIGS
from tests.helpers.commands import QUICK
from tests.helpers.reports import Report

PICTURES = {
    "loss", "nn_accuracy", "reconstructions", "neighbours", "map_mae", "map_ct", "clusters",
    "confusion", "retrieval", "probes",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(finished):
    """The folder of a short run with all stages."""
    return finished.workdir


@pytest.fixture(scope="module")
def source(run):
    return (run / "report.html").read_text()


@pytest.fixture(scope="module")
def parsed(source):
    return Report(source)


def built(run):
    """The report of a run, built again."""
    config = build.read_config(run)
    return Report(build.report(run, pipeline.open_images(config)).read_text())


def pictures_of(run):
    return {path.stem for path in (run / "pictures").iterdir()}


def test_a_report_needs_no_network(source, parsed):
    assert not {"script", "link", "iframe", "img", "video"} & set(parsed.tags)
    assert parsed.links
    links = [link for link in parsed.links if link != "clusters.html"]
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "@import" not in source
    assert re.findall(r"url\((.)", source) == ["#"] * source.count("url(")


def test_every_picture_has_a_caption_and_a_png(run, source, parsed):
    assert {path.stem for path in (run / "pictures").glob("*.png")} == PICTURES
    figures = re.findall(r"<figure.*?</figure>", source, re.DOTALL)
    assert len(figures) == len(PICTURES)
    for figure in figures:
        assert re.search(r"<figcaption>\w.{20,}</figcaption>", figure, re.DOTALL)
        svg = re.search(r"<svg.*</svg>", figure, re.DOTALL)[0]
        ET.fromstring(svg)
        # Black would be invisible on a dark background.
        assert "currentColor" in svg
        assert "#000000" not in svg
    assert len(parsed.ids) == len(set(parsed.ids))
    for link in re.findall(r"(?:href=\"#|url\(#)([^\")]+)", source):
        assert link in parsed.ids
    for path in (run / "pictures").glob("*.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5


def test_a_report_agrees_with_the_files(run, parsed):
    results, cells = json.loads((run / "results.json").read_text()), parsed.cells
    knn = {name: next(r for r in results[name]["knn"] if r["k"] == 10) for name in results}
    row = cells.index("k-NN")
    shown = cells[row + 1 : row + 5]
    assert shown[:3] == [f"{100 * knn[name]['accuracy']:.1f}" for name in ("pixels", "mae", "ct")]
    change = 100 * knn["ct"]["accuracy"] - 100 * knn["mae"]["accuracy"]
    assert shown[3] == f"{change:+.1f}"
    assert cells[row - 5 : row] == ["percent", "pixels", "mae", "ct", "ct - mae"]
    assert parsed.text.index("width 32, depth 4 and patch size 7: masked pre-training (MAE) for 2")
    assert parsed.text.index("upper 2 blocks (MAE-CT) for 1 epoch, on 1,600 training images of")
    assert cells[cells.index("ct.temperature") + 1] == "0.15"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    took = max(entry["seconds"] for entry in lines if entry["stage"] == "ct")
    time = len(cells) - cells[::-1].index("ct") - 1
    assert cells[time + 1] == "6"
    assert cells[time + 3] == f"{took:,.0f}"


def test_results_md_has_the_table_and_the_notes_of_the_report(run, parsed):
    table, *notes = (run / "results.md").read_text().strip().split("\n\n")
    assert table.startswith("| percent | pixels | mae | ct | ct - mae |\n")
    assert [note.split(":")[0] for note in notes] == [
        "pixels", "Features", "k-NN", "Probe, centre crops (the fast variant)",
        "k-means of the val images",
    ]  # fmt: skip
    assert " ".join(notes) in parsed.text


def test_a_stage_lasts_until_its_checkpoint_is_saved():
    step = dict(stage="ct", step=8, images_per_second=100.0, seconds=3.0)
    saved = dict(stage="ct", step=8, checkpoint_seconds=2.0, seconds=5.0)
    (timing,) = build.stage_timings([step, saved])
    assert timing == dict(name="ct", steps=8, rate=100.0, seconds=5.0)


def call(monkeypatch, *arguments):
    """Calls the command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    return errors.run_command(command.main)


def test_the_command_rebuilds_a_report_from_the_disk(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "pictures", "*.html"))
    # The order of a run whose first stage was trained again.
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines.sort(key=lambda line: json.loads(line)["stage"] == "mae")
    (copy / "metrics.jsonl").write_text("".join(lines))
    assert call(monkeypatch, copy) == 0
    assert capsys.readouterr() == (f"{copy / 'report.html'}\n{copy / 'clusters.html'}\n", "")
    for path in ("report.html", "clusters.html"):
        assert (copy / path).read_bytes() == (run / path).read_bytes()
    for path in (*(run / "pictures").iterdir(), *(run / "clusters").glob("*[gs]")):
        assert (copy / path.relative_to(run)).read_bytes() == path.read_bytes()


def test_clusters_are_of_the_images_that_were_clustered(run, tmp_path):
    """Also where the config names other ones since, as after an evaluation that was stopped."""
    for part in ("features", "clusters"):
        shutil.copytree(run / part, tmp_path / part)
    config = build.read_config(run)
    config.eval.cluster.split = "train"
    images, results = pipeline.open_images(config), runner.read_results(run)
    figures = build._RunFigures(tmp_path, config, images, results)
    assert figures.write_page()
    for path in run.glob("clusters/*[gs]"):
        assert (tmp_path / "clusters" / path.name).read_bytes() == path.read_bytes()
    assert figures._clusters()
    # They may be there no more.
    figures = build._RunFigures(tmp_path, config, {"train": images["train"]}, results)
    assert not figures.write_page()
    assert not (tmp_path / "clusters.html").exists()
    assert figures._clusters() == {}


def test_a_single_point_is_a_number_and_no_chart(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "features", "watch"))
    lines = [json.loads(x) for x in (copy / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == "mae" and "loss" in line]
    lines.append(dict(stage="ct", step=1200, loss=2.34567, nn_accuracy=0.5, knn_accuracy=0.125))
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = json.loads((copy / "results.json").read_text())
    for row in results.values():
        row["probe"]["epochs_top1"] = row["probe"]["epochs_top1"][-1:]
    (copy / "results.json").write_text(json.dumps(results))
    report = built(copy)
    assert pictures_of(copy) == {"loss"}
    assert report.tags.count("svg") == 1
    assert report.tags.count("figure") == 4  # a table is in the place of a picture
    for number in (
        ["loss", "ct", "1,200", "2.346"],
        ["neighbour accuracy", "ct", "1,200", "50.0%"],
        ["k-NN accuracy", "ct", "1,200", "12.5%"],
        ["top-1", "pixels", "1", f"{results['pixels']['probe']['best_last_epoch']['top1']:.1%}"],
    ):
        start = report.cells.index(number[0])
        assert report.cells[start : start + 4] == number


def test_curves_of_heads_are_coloured_by_depth():
    history = [
        dict(stage=stage, step=step, loss=9.0, loss_final=1.0, loss_block2=2.0, loss_block10=10.0)
        for stage, steps in (("refine_head", 2), ("refine", 1))
        for step in range(steps)
    ]
    figures, numbers = build.curves_by_head(history)
    (panel,) = figures["loss_by_head"].axes
    colours = {line.get_ydata()[0]: line.get_color() for line in panel.lines}
    assert colours == dict(zip((2, 10, 1), (*style.depths(2), style.ORANGE), strict=True))
    (legend,) = figures["loss_by_head"].legends
    assert [text.get_text() for text in legend.texts] == ["2", "10", "final"]
    assert numbers["loss_by_head"] == [
        ("", "refine"), ("step", "0"), ("2", "2"), ("10", "10"), ("final", "1")
    ]  # fmt: skip
    assert figures["nn_accuracy_by_head"] is None


def test_an_accuracy_of_no_image_is_not_shown(tmp_path):
    line = dict(stage="refine", step=1, loss=2.0, nn_accuracy=0.0, nn_accuracy_block2=0.0)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    for labelled, keys in ((False, {"stage", "step", "loss"}), (True, set(line))):
        images = {"train": SimpleNamespace(labelled=labelled)}
        (read,) = build.read_history(tmp_path, images)
        assert set(read) == keys


def test_a_report_of_an_unfinished_run_has_what_exists(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "pictures", "features"))
    for path in (copy / "results.json", copy / "environment.json"):
        path.unlink()
    shutil.rmtree(copy / "watch" / "head")
    shutil.rmtree(copy / "watch" / "ct")
    lines = [json.loads(x) for x in (copy / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"seconds": 7200.0} for line in lines if line["stage"] == "mae"]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (copy / "metrics.jsonl").write_text(text + '{"stage": "he')
    report = built(copy)
    assert report.tags.count("figure") == 2
    assert "Results" not in report.text
    assert " in 2.0 hours of training so far (seed 0)." in report.text
    assert pictures_of(copy) == {"loss", "reconstructions"}
    (copy / "metrics.jsonl").unlink()
    shutil.rmtree(copy / "watch")
    report = built(copy)
    assert report.tags.count("figure") == 0
    assert "patch size 7 before its training." in report.text
    assert pictures_of(copy) == set()  # none is left of the other report


def test_no_run_is_one_clear_line(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, tmp_path / "absent") == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {str(tmp_path / 'absent')!r}: ")
    assert line.count("\n") == 1
    assert "config.json" in line
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch)
    assert ended.value.code == 2


def test_one_run_is_not_compared(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    assert (
        call(monkeypatch, run, f"../{run.parent.name}/{run.name}", f"--out={tmp_path / 'x.html'}")
        == 2
    )
    assert capsys.readouterr().err.startswith(f"error: --out={tmp_path / 'x.html'}: ")
    assert list(tmp_path.iterdir()) == []


def test_the_command_compares_several_runs(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "report", lambda run, images: run / "report.html")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for name in run.glob("*.json*"):
        shutil.copy(name, tmp_path / "run")
    assert call(monkeypatch, run, "run", run) == 0
    *shown, second, written = (lines := capsys.readouterr().out.splitlines())[:4]
    table = lines[4:]
    assert [*shown, second] == [f"{run}/report.html", f"{run}/clusters.html", "run/report.html"]
    assert written == "comparison.html"
    assert next(x for x in table if x.startswith("k-NN")).count(" +- 0.0") == 4
    assert (tmp_path / "comparison.html").read_text().endswith("</html>")


@pytest.mark.parametrize("out", ["absent/x.html", ".", "x.png"])
def test_a_comparison_that_cannot_be_written_is_one_line(run, tmp_path, monkeypatch, capsys, out):
    monkeypatch.setattr(build, "report", lambda run, images: run / "report.html")
    copy, out = tmp_path / "run", tmp_path / out
    copy.mkdir()
    shutil.copy(run / "config.json", copy)
    assert call(monkeypatch, run, copy, f"--out={out}") == 2
    shown, line = capsys.readouterr()
    assert shown == ""  # before a report is made again
    assert line.startswith(f"error: --out={out}: ")
    assert line.count("\n") == 1


def test_results_that_are_not_json_are_one_clear_line(run, tmp_path):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json: not JSON"):
        build.report(tmp_path, {})


def evaluation_of_folder(root, kinds, each, labelled=True):
    """The folder of an evaluation of another run, on colour photographs sorted by kind, whose
    clusters an earlier version has written.

    Without labels the photographs are in one folder.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "photo.jpg")
    photo = (root / "photo.jpg").read_bytes()
    names = [f"$n{i:08}$, a kind with a long name" for i in range(kinds)]
    for split in ("train", "val"):
        for name in names:
            folder = root / split / (name if labelled else "")
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(each if split == "val" else 2):
                (folder / f"{name} {i:02}.jpg").write_bytes(photo)
    run, count = root / "run", kinds * each
    numbers = np.repeat(np.arange(kinds, dtype=np.int32), each)
    labels = numbers if labelled else np.full(count, -1, np.int32)
    x = np.eye(kinds)[numbers] + 0.1 * np.random.default_rng(0).normal(size=(count, kinds))
    folder = runner.folder_of(run, "ct")
    batches = [(x.astype(np.float32), labels, np.ones(count, bool))]
    features.store({folder / "val": {}}, count, count, lambda first: iter(batches))
    arrays = dict(labels=labels, clusters=numbers, index=np.arange(count))
    files.write_arrays(folder / "cluster.npz", distance=np.zeros(count), **arrays)
    found = dict(index=np.array([0, count - 1]), neighbours=np.array([[0, 1], [2, 3]]))
    files.write_arrays(folder / "retrieval.npz", **found)
    settings = [f"data.path={root}", "data.source=folder", "data.train_split=train"]
    settings += ["data.short_side=240", "init_from=runs/other", f"eval.cluster.clusters={kinds}"]
    config = configs.load(str(CONFIGS / "eval.py:test"), settings)
    with config.unlocked():
        config.model = configs.load(QUICK, ["model.channels=3"]).model
        config.model.image_size = (238, 238)
    files.write_json(run / "config.json", config.to_dict())
    scores = {"acc": 0.4, "nmi": 0.5, "ari": 0.25} if labelled else {"loss": 1.0}
    skipped = {"skipped": "of no interest"}
    knn = [{"k": 20, "accuracy": 0.5, "standardised": False, "temperature": 0.07}]
    kmeans = dict(split="val", images=count, l2_normalised=True, pca=0, minibatch=0, runs=3)
    row = {
        "features": "cls",
        "seconds": {"knn": 1.0},
        "knn": knn if labelled else skipped,
        "probe": skipped,
        "cluster": kmeans | {"clusters": kinds, "best": scores, "mean": scores},
    }
    files.write_json(run / "results.json", {"ct": row})
    return run


def test_a_report_of_many_photographs(tmp_path, monkeypatch):
    run, mapped = evaluation_of_folder(tmp_path, 25, 42), {}
    monkeypatch.setattr(maps, "points", lambda x, how: mapped.update(x=x) or x[:, :2])
    monkeypatch.setattr(pipeline, "check_enough", lambda config, images: None)  # to train on
    report = built(run)
    assert pictures_of(run) == {"map_ct", "clusters", "confusion", "retrieval"}
    assert (run / "report.html").stat().st_size < 8e6
    # Every kind is on the map, though it shows only some of the images.
    assert len(mapped["x"]) == build.MAP_IMAGES
    assert set(mapped["x"].argmax(1)) == set(range(25))
    for part in (
        "of 1,000 held-out images",
        "20 of the 25 k-means clusters",
        "k-NN: 20 neighbours",
        "from runs/other, was evaluated on 1,050 held-out images of",
        "ct: the average of the tuned encoder.",
        "probe was skipped: of no interest.",
        "Framed: ",
    ):
        assert part in report.text


def test_a_report_without_labels_mentions_none(tmp_path, monkeypatch):
    run = evaluation_of_folder(tmp_path, 3, 8, labelled=False)
    monkeypatch.setattr(pipeline, "check_enough", lambda config, images: None)
    (run / "clusters").mkdir()
    (run / "clusters.html").touch()  # of other clusters
    report = built(run)
    assert not [*run.glob("clusters*")]
    assert "clusters.html" not in report.links
    assert pictures_of(run) == {"map_ct", "clusters", "retrieval"}
    assert "Without labels there is no accuracy, NMI, AMI or ARI." in report.text
    assert "coloured by cluster." in report.text
    assert "knn was skipped: of no interest." in report.text
    for part in ("Framed", "their labels", "matched"):
        assert part not in report.text
