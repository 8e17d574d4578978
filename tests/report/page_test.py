"""The page of a run: whole, self-contained, true to its files, and rebuilt from them."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from maect_jax import config as configs
from maect_jax import files, pipeline
from maect_jax.errors import UserError
from maect_jax.evals import features, maps, paper, runner, table
from maect_jax.report import page, plots, sheets, words
from tests.helpers import CONFIGS, SMALL
from tests.helpers.commands import run_main
from tests.helpers.common import run_on

PICTURES = {
    "loss", "nn_accuracy", "reconstructions", "neighbours", "map_mae", "map_ct", "clusters",
    "confusion", "retrieval", "probes",
}  # fmt: skip


class Page(HTMLParser):
    """Headings, captions, table cells, ids and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.cells, self.open = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "srcset", "data"):
                self.links.append(value)
        if tag in ("td", "th"):
            self.cells.append("")
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run with all stages."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        quick = configs.load(str(CONFIGS / "quickstart.py:test"), [SMALL])
        run_on(patch, (1, 1), quick, workdir)
    return workdir


@pytest.fixture(scope="module")
def html(run):
    return (run / "report.html").read_text()


def test_page_needs_no_network(html):
    parsed = Page(html)
    assert not {"script", "link", "iframe", "img", "video"} & set(parsed.tags)
    assert parsed.links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in parsed.links)
    assert "@import" not in html
    assert re.findall(r"url\((.)", html) == ["#"] * html.count("url(")


def test_every_picture_is_on_the_page_with_a_caption_and_beside_it_as_png(run, html):
    assert {path.stem for path in (run / "pictures").glob("*.png")} == PICTURES
    figures = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    assert len(figures) == len(PICTURES)
    for figure in figures:
        assert re.search(r"<figcaption>\w.{20,}</figcaption>", figure, re.DOTALL)
        svg = re.search(r"<svg.*</svg>", figure, re.DOTALL)[0]
        ET.fromstring(svg)
        # Black would vanish in the dark: ink follows the theme.
        assert "currentColor" in svg
        assert "#000000" not in svg
    ids = Page(html).ids
    assert len(ids) == len(set(ids))
    for link in re.findall(r"(?:href=\"#|url\(#)([^\")]+)", html):
        assert link in ids
    for path in (run / "pictures").glob("*.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5


def test_page_says_what_the_files_say(run, html):
    results = json.loads((run / "results.json").read_text())
    cells = Page(html).cells
    knn = {name: next(r for r in results[name]["knn"] if r["k"] == 10) for name in results}
    row = cells.index("k-NN")
    shown = cells[row + 1 : row + 5]
    assert shown[:3] == [f"{100 * knn[name]['accuracy']:.1f}" for name in ("pixels", "mae", "ct")]
    change = 100 * knn["ct"]["accuracy"] - 100 * knn["mae"]["accuracy"]
    assert shown[3] == f"{change:+.1f}"
    assert cells[row - 5 : row] == ["percent", "pixels", "mae", "ct", "ct - mae"]
    assert "A ViT of width 32, depth 4 and patch size 7: masked pre-training (2 epochs)" in html
    assert "contrastive tuning of the upper 2 blocks (1 epoch) on 1,600 training images" in html
    assert cells[cells.index("ct.temperature") + 1] == "0.15"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    took = max(entry["seconds"] for entry in lines if entry["stage"] == "ct")
    time = len(cells) - cells[::-1].index("ct") - 1
    assert cells[time + 1] == "6"
    assert cells[time + 3] == f"{took:,.0f}"


def test_a_stage_lasts_until_its_checkpoint_is_saved():
    step = dict(stage="ct", step=8, images_per_second=100.0, seconds=3.0)
    saved = dict(stage="ct", step=8, checkpoint_seconds=2.0, seconds=5.0)
    (row,) = words.timings([step, saved], {})
    assert row == dict(name="ct", steps="8", rate="100", seconds="5")


def test_page_is_rebuilt_from_the_disk(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "pictures", "*.html"))
    # As where the first stage was trained again.
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines.sort(key=lambda line: json.loads(line)["stage"] == "mae")
    (copy / "metrics.jsonl").write_text("".join(lines))
    done = run_main(str(copy), python=("-m", "maect_jax.report"))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{copy / 'report.html'}\n", "")
    assert (copy / "report.html").read_bytes() == (run / "report.html").read_bytes()
    for path in (run / "pictures").iterdir():
        assert (copy / "pictures" / path.name).read_bytes() == path.read_bytes()


def test_page_of_an_unfinished_run_has_what_there_is(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "pictures", "features"))
    for path in (copy / "results.json", copy / "environment.json"):
        path.unlink()
    shutil.rmtree(copy / "watch" / "head")
    shutil.rmtree(copy / "watch" / "ct")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(x for x in lines if '"mae"' in x) + '{"stage": "he')
    images = pipeline.open_images(page.read_config(copy), copy)
    html = page.build(copy, images).read_text()
    assert html.count("<figure") == 2  # the loss, and what is filled in
    assert "Results" not in html
    assert " so far (seed 0)." in html
    assert {path.stem for path in (copy / "pictures").iterdir()} == {"loss", "reconstructions"}
    (copy / "metrics.jsonl").unlink()
    shutil.rmtree(copy / "watch")
    html = page.build(copy, images).read_text()
    assert html.count("<figure") == 0
    assert "patch size 7 before its training." in html
    assert list((copy / "pictures").iterdir()) == []  # none is left of another page


def test_what_is_no_run_is_one_clear_line(tmp_path):
    done = run_main(str(tmp_path / "absent"), python=("-m", "maect_jax.report"))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {str(tmp_path / 'absent')!r}: there is no run (no config.json); name the folder "
        "of a run\n"
    )
    assert list(tmp_path.iterdir()) == []
    assert run_main(python=("-m", "maect_jax.report")).returncode == 2


def test_results_that_are_no_json_are_one_clear_line(run, tmp_path):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json: not JSON"):
        page.build(tmp_path, {})


def result(knn, acc):
    scores = {"acc": acc, "nmi": 0.5, "ari": 0.25}
    return {
        "knn": [{"k": 1, "accuracy": 0.0}, {"k": 10, "accuracy": knn}],
        "probe": {"best_last_epoch": {"top1": 0.75, "top5": 0.9}},
        "cluster": {"best": scores, "mean": scores, "deviation": scores},
    }


def test_several_runs_are_told_by_mean_and_deviation():
    runs = [
        {"mae": result(0.5, 0.4), "ct": result(0.6, 0.5)},
        {"mae": result(0.52, 0.4), "ct": result(0.66, 0.6)},
    ]
    change = table.cells(runs[0])["ct - mae"]
    assert change == {
        "k-NN": "+10.0", "probe, centre crops": "+0.0", "k-means ACC": "+10.0",
        "mean of runs": "+10.0", "NMI": "+0.0", "ARI": "+0.0",
    }  # fmt: skip
    several = table.cells_of_several(dict(zip("ab", runs, strict=True)))
    assert list(several) == ["mae", "ct", "ct - mae"]
    # Unbiased: of 60 and 66 the deviation is 6 / sqrt(2).
    assert several["ct"]["k-NN"] == "63.0 +- 4.2"
    assert several["ct - mae"]["k-NN"] == "+12.0 +- 2.8"
    assert several["ct - mae"]["k-means ACC"] == "+15.0 +- 7.1"
    lines = table.text(several).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["percent", "mae", "ct", "ct", "-", "mae"]
    assert lines[-1].split()[0] == "ARI"


def test_a_figure_that_a_row_lacks_is_a_dash():
    bare = {"cluster": {"skipped": "x"}, "knn": [{"k": 1, "accuracy": 0.5}]}
    rows = table.cells(
        {"mae": result(0.5, 0.4), "finetune": {"finetune": {"top1": 0.8}}, "b": bare}
    )
    assert rows["finetune"] == {"fine-tuned": "80.0"}
    assert table.columns(rows)[-1] == "fine-tuned"
    lines = table.markdown(rows).splitlines()
    assert lines[:3] == [
        "| percent | mae | finetune | b |",
        "| --- | ---: | ---: | ---: |",
        "| k-NN | 50.0 | - | 50.0 |",
    ]
    assert lines[-1] == "| fine-tuned | - | 80.0 | - |"


def test_the_papers_figures_stand_beside_imagenet_alone():
    wnids = [f"n{i:08}" for i in range(1000)]
    assert paper.is_imagenet(wnids)
    assert not paper.is_imagenet(wnids[:-1])
    assert not paper.is_imagenet([*wnids[:-1], "cat"])
    rows = paper.figures("H", 16)
    assert list(rows) == ["paper, MAE H/16", "paper, MAE-CT H/16", "paper, MAE-CT_aug H/16"]
    ours = table.cells({"ct": full_result()})["ct"]
    for row in rows.values():
        assert set(row) <= set(ours)  # under the names of our columns
    assert rows["paper, MAE-CT H/16"]["k-means ACC"] == "58.0"
    assert paper.figures("L", 16)["paper, MAE-CT_aug L/16"]["low-shot, 1 %"] == "74.2"
    assert paper.figures("Ti", 16) == {}


def full_result():
    """A row with every protocol."""
    full = result(0.5, 0.4)
    full["probe_augmented"] = full["probe"]
    full["cluster"]["best"]["ami"] = 0.3
    full["cluster"]["subsets"] = {"imagenet_dogs15": full["cluster"]}
    shots = [{"images_per_class": n} for n in (1, 2, 5)] + [{"share": s} for s in (0.01, 0.1)]
    full["lowshot"] = [shot | {"accuracy": 0.5} for shot in shots]
    return full


@pytest.mark.parametrize("other", [{}, {"ct": result(0.6, 0.5)}])
def test_runs_with_other_rows_are_not_averaged(other):
    good = {"mae": result(0.5, 0.4), "ct": result(0.6, 0.5)}
    with pytest.raises(UserError, match=r"'runs/b' cannot be averaged"):
        table.cells_of_several({"runs/a": good, "runs/b": other})
    with pytest.raises(UserError, match="cannot be averaged"):
        table.cells_of_several({"runs/a": other, "runs/b": good})


def test_confusion_counts_clusters_by_row_and_labels_by_column():
    labels, clusters = np.array([2, 2, 5, 5, 5]), np.array([0, 1, 1, 1, 1])
    axes = plots.confusion(labels, clusters, list("abcdef")).axes[0]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(0, 0): "1", (0, 1): "1", (1, 1): "3"}  # (label, cluster)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["c", "f"]


def test_curves_draw_what_is_logged():
    history = [
        {"stage": "head", "step": 1, "loss": 3.0, "nn_accuracy": 0.1},
        {"stage": "mae", "step": 1, "loss": 1.0},
        {"stage": "head", "step": 9, "loss": 2.0, "nn_accuracy": 0.5},
    ]
    panels = plots.curves(history, "loss", "loss").axes
    assert [panel.get_title() for panel in panels] == ["head", "mae"]
    np.testing.assert_array_equal(panels[0].lines[0].get_xydata(), [[1, 3.0], [9, 2.0]])
    assert len(plots.curves(history, "nn_accuracy", "").axes) == 1
    assert plots.curves(history, "absent", "") is None


def test_neighbours_are_framed_where_the_label_is_the_images_own():
    def records(record):
        return {"image": np.full((2, 2, 1), record, np.uint8), "label": [0, 1, -1][record]}

    watched = [{"image": np.zeros((2, 2, 1), np.uint8), "label": label} for label in (0, -1)]
    moments = [("ct 5", np.array([[0, 1, 2], [2, 0, -1]]))]
    axes = np.array(sheets.neighbours(watched, moments, records, "ab").axes).reshape(2, 5)
    assert [row[0].get_ylabel() for row in axes] == ["a", "unlabelled"]
    assert [[len(a.patches) for a in row[2:]] for row in axes] == [[1, 0, 0], [0, 0, 0]]
    assert axes[0, 2].images[0].get_array().max() == 0
    assert [text.get_text() for text in axes[1, 4].texts] == ["-"]


def test_montage_goes_from_the_centre_to_the_rim():
    distance = np.array([1.7, 1.3, 0.3, 1.0, 1.0])
    labels, clusters = np.array([1, 1, 0, 0, 0]), np.array([1, 1, 1, 0, 0])

    def records(record):
        return {"image": np.full((2, 2, 1), record, np.uint8)}

    index = np.array([10, 11, 13, 14, 15])  # the third image, 12, could not be read
    axes = sheets.montage(distance, labels, clusters, index, records, ["cat", "dog"]).axes
    shown = [a.images[0].get_array().max() for a in axes[12:] if a.images]
    assert shown == [13, 11, 10]
    assert axes[12].get_ylabel() == "dog 67%\n3 images"
    assert axes[0].get_ylabel() == "cat 100%\n2 images"
    bare = sheets.montage(distance, np.full(5, -1), clusters, index, records, []).axes
    assert [bare[i].get_ylabel() for i in (0, 12)] == [
        "cluster 0\n2 images", "cluster 1\n3 images",
    ]  # fmt: skip


@pytest.mark.parametrize("how", maps.NAMES)
def test_maps_keep_neighbours_and_know_features_that_are_all_the_same(how, rng):
    if how == "umap":
        pytest.importorskip("umap")
    labels = np.repeat([0, 1, 2], 40)
    x = 9 * np.eye(3, 8)[labels] + rng.normal(size=(120, 8))
    points = maps.points(x.astype(np.float32), how)
    apart = np.linalg.norm(points[:, None] - points, axis=-1) + 1e9 * np.eye(120)
    assert (labels[apart.argmin(1)] == labels).mean() > 0.95
    for x in (np.ones((50, 4)), np.ones((1, 4)), np.eye(3)):
        points = maps.points(x, how)
        assert points.shape == (len(x), 2)
        assert np.isfinite(points).all()


@pytest.fixture
def folder_run(tmp_path):
    """An evaluation of another run, on colour photographs of 25 kinds that come kind by kind."""
    kinds, each, rng = 25, 42, np.random.default_rng(0)
    names = [f"$n{i:08}$, a kind with a long name" for i in range(kinds)]
    for split, count in (("train", 1), ("val", each)):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 256, (240, 320, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / split / name / f"{i:02}.jpg")
    run = tmp_path / "run"
    labels = np.repeat(np.arange(kinds, dtype=np.int32), each)
    x = np.eye(kinds)[labels] + 0.1 * rng.normal(size=(kinds * each, kinds))
    place = runner.folder_of(run, "ct")
    batches = [(x.astype(np.float32), labels, np.ones(len(x), bool))]
    features.stored(place / "val", {}, len(x), len(x), lambda first: iter(batches))
    arrays = dict(labels=labels, clusters=labels, index=np.arange(len(x)))
    files.write_arrays(place / "cluster.npz", distance=np.zeros(len(x)), **arrays)
    found = dict(index=np.array([0, 50]), neighbours=np.array([[0, 1], [2, 3]]))
    files.write_arrays(place / "retrieval.npz", **found)
    settings = [f"data.path={tmp_path}", "data.source=folder", "data.train_split=train"]
    settings += ["data.short_side=240", "init_from=runs/other"]
    config = configs.load("configs/eval.py:test", settings)
    quick = configs.load("configs/quickstart.py:test", ["model.channels=3"])
    with config.unlocked():
        config.model = quick.model
        config.model.image_size = (238, 238)
    files.write_json(run / "config.json", config.to_dict())
    full = result(0.5, 0.4)
    full["knn"] = [{"k": 20, "accuracy": 0.5, "standardised": False, "temperature": 0.07}]
    full["probe"] = {"skipped": "of no interest"}
    settings = dict(split="val", images=len(x), l2_normalised=True, pca=0, minibatch=0)
    full["cluster"] |= {"clusters": kinds, "runs": 3, **settings}
    full |= {"seconds": {"knn": 1.0}, "features": "cls"}
    files.write_json(run / "results.json", {"ct": full})
    return run


@pytest.mark.usefixtures("in_root")
def test_page_of_many_photographs(folder_run, monkeypatch):
    mapped = {}
    monkeypatch.setattr(maps, "points", lambda x, how: mapped.update(x=x) or x[:, :2])
    monkeypatch.setattr(pipeline, "check_enough", lambda config, images: None)  # to train on
    config = page.read_config(folder_run)
    html = page.build(folder_run, pipeline.open_images(config, folder_run)).read_text()
    assert {path.stem for path in (folder_run / "pictures").iterdir()} == {
        "map_ct", "clusters", "confusion", "retrieval",
    }  # fmt: skip
    assert len(html) < 8e6
    # Every kind is on the map, though it shows only some of the images.
    assert len(mapped["x"]) == plots.MAP_IMAGES
    assert set(mapped["x"].argmax(1)) == set(range(25))
    assert "of 1,000 held-out images" in html
    assert "20 of the 25 k-means clusters" in html
    assert "k-NN: 20 neighbours" in html
    assert "from runs/other, was evaluated on 1,050 held-out images of" in html
    assert "ct: the average of the tuned encoder." in html
    assert "probe was skipped: of no interest." in html


@pytest.mark.usefixtures("in_root")
def test_words_of_a_run_that_is_not_finished():
    config = configs.load("configs/quickstart.py:test")
    history = [{"stage": "mae", "step": 1, "images_per_second": 1.0, "seconds": 7200.0}]
    text = words.sentence(config, {"train": 5, "val": 3}, history, {})
    assert text == (
        "A ViT of width 32, depth 4 and patch size 7: masked pre-training (2 epochs) on 5 training "
        "images of fashion_mnist, without labels, in 2.0 hours of training so far (seed 0)."
    )
