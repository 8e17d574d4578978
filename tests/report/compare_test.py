"""The comparison of several runs: self-contained, and true to the files of the runs."""

import json
import re
import shutil

import pytest

from maect_jax.report import compare
from maect_jax.run import jsonl
from tests.helpers.reports import Report


@pytest.fixture
def runs(finished, tmp_path):
    """Three folders with what a comparison reads; two have the same name."""
    folders = [tmp_path / name for name in ("a/run", "b/run", "c#: 3")]
    for seed, folder in enumerate(folders):
        folder.mkdir(parents=True)
        for name in ("config.json", "results.json"):
            shutil.copy(finished.workdir / name, folder)
        lines = (finished.workdir / "metrics.jsonl").read_text()
        point = dict(stage="mae", step=12, knn_accuracy=0.5 + seed / 100)
        (folder / "metrics.jsonl").write_text(f"{lines}{json.dumps(point)}\n")
        change(folder / "config.json", lambda config, seed=seed: config.update(seed=seed))
    return folders


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def set_knn(accuracy):
    def edit(results):
        results["ct"]["knn"] = [{"k": 10, "accuracy": accuracy}]

    return edit


def compared(runs, out):
    """The comparison, and what the terminal shows of it."""
    text = compare.compare({run: jsonl.read(run / "metrics.jsonl") for run in runs}, out)
    return Report(out.read_text()), text


def line(report, name, after=""):
    """The cells of a table's line from its first cell on."""
    start = report.cells.index(name, report.cells.index(after) if after else 0)
    return report.cells[start : start + 5]


def test_runs_of_the_same_results_are_averaged(runs, tmp_path):
    for run, accuracy in zip(runs, (0.6, 0.62, 0.67), strict=True):
        change(run / "results.json", set_knn(accuracy))
    report, text = compared(runs, tmp_path / "comparison.html")
    names = ["a/run", "b/run", f"{tmp_path.name}/c#: 3"]
    assert line(report, "percent") == ["percent", "mean ± std", *names]
    # Unbiased: the squares of -3, -1 and 4 sum up to 26, and half of it is 13.
    assert line(report, "k-NN", after="ct") == ["k-NN", "63.0 ± 3.6", "60.0", "62.0", "67.0"]
    assert "63.0 +- 3.6" in text
    assert line(report, "seed")[:4] == ["seed", "0", "1", "2"]
    assert report.cells[report.cells.index("key") + 4] == "seed"
    assert "same seed" not in report.text
    # Of training, k-NN has one point a run: a number, and no chart.
    assert report.tags.count("svg") == 3
    start = report.cells.index("12")
    assert report.cells[start - 1 : start + 4] == ["mae", "12", "50.0%", "51.0%", "52.0%"]


def test_a_comparison_needs_no_network_and_links_to_the_reports(runs, tmp_path):
    (tmp_path / "written").mkdir()
    report, _ = compared(runs, tmp_path / "written" / "comparison.html")
    assert not {"script", "link", "iframe", "img", "video"} & set(report.tags)
    links = [link for link in report.links if not link.startswith(("#", "data:image/png"))]
    assert links == [
        "../a/run/report.html", "../b/run/report.html", "../c%23%3A%203/report.html",
    ]  # fmt: skip
    assert len(report.ids) == len(set(report.ids))


def test_every_run_is_drawn_in_its_colour(runs, tmp_path):
    compared(runs, tmp_path / "comparison.html")
    source = (tmp_path / "comparison.html").read_text()
    colours = set(compare.style.palette(3))
    assert len(colours) == 3
    for figure in source.split("<svg")[1:]:
        drawn = figure.partition("</svg>")[0]
        assert all(re.search(f"(stroke|fill): {colour}", drawn) for colour in colours)


def test_runs_of_other_results_are_shown_side_by_side(runs, tmp_path):
    change(runs[1] / "results.json", lambda results: results.pop("ct"))
    change(runs[2] / "results.json", lambda results: results["mae"].pop("knn"))
    change(runs[2] / "results.json", set_knn(0.67))
    report, text = compared(runs, tmp_path / "comparison.html")
    assert "mean ± std" not in report.cells
    assert line(report, "k-NN", after="ct")[2:4] == ["-", "67.0"]
    assert "b/run lacks ct, ct - mae" in report.text
    assert f"{tmp_path.name}/c#: 3 lacks mae (k-NN), ct - mae (k-NN)" in text


def test_means_are_of_runs_that_differ_in_their_seed_alone(runs, tmp_path):
    runs = [run.rename(tmp_path / name) for run, name in zip(runs, ("q0", "q1", "r0"), strict=True)]
    for run, accuracy in zip(runs, (0.6, 0.62, 0.67), strict=True):
        change(run / "results.json", set_knn(accuracy))
    change(runs[2] / "config.json", lambda config: config["ct"].update(epochs=77))
    report, text = compared(runs, tmp_path / "comparison.html")
    assert line(report, "percent") == ["percent", "q*, mean ± std", "q0", "q1", "r0"]
    assert line(report, "k-NN", after="ct") == ["k-NN", "61.0 ± 1.4", "60.0", "62.0", "67.0"]
    q, r = text.split("\n\nr0\n\n")
    assert q.startswith("q*\n\n")
    assert "61.0 +- 1.4" in q
    assert "+-" not in r
    picture = tmp_path / "comparison.png"
    assert picture.exists()
    for run in runs:
        change(run / "results.json", lambda results: results.clear())
    _, text = compared(runs, tmp_path / "comparison.html")
    assert text == "No run has results yet."
    assert not picture.exists()  # that of before


def test_a_seed_that_is_there_twice_is_said(runs, tmp_path):
    change(runs[1] / "config.json", lambda config: config.update(seed=0))
    report, text = compared(runs, tmp_path / "comparison.html")
    assert "some runs have the same seed" in report.text
    assert "some runs have the same seed" in text
    assert "differ in what" not in text


def test_runs_of_other_versions_are_said(runs, tmp_path):
    for run, version in zip(runs, ("0.10.2", "0.10.2", "0.12.0"), strict=True):
        (run / "environment.json").write_text(json.dumps({"jax": version, "devices": 1}))
    report, text = compared(runs, tmp_path / "comparison.html")
    assert "jax: '0.10.2' -> '0.12.0'" in text
    assert "differ in what they ran on" in report.text


def test_runs_without_results_are_compared(runs, tmp_path):
    for run in runs:
        (run / "results.json").unlink()
        (run / "metrics.jsonl").unlink()
    report, text = compared(runs, tmp_path / "comparison.html")
    assert "No run has results yet." in report.text
    assert text == "No run has results yet."
    assert report.tags.count("svg") == 0
