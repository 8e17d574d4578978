"""An evaluation as a whole: features kept and reused, protocols, unlabelled images, exports."""

import csv
import json
import re
import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maect_jax import config as configs
from maect_jax import files, pipeline
from maect_jax.data import arrays, sources
from maect_jax.data.bad_images import BadImages
from maect_jax.errors import RunFailedError, UserError
from maect_jax.evals import ON_REQUEST, PROTOCOLS, cluster, features, knn, runner
from maect_jax.models import vit
from maect_jax.report import build
from maect_jax.run import jsonl, lineage
from maect_jax.run.folder import Run
from maect_jax.stages import SAVED
from tests.helpers import CONFIGS, SMALL
from tests.helpers.common import mesh_of, run_on
from tests.helpers.rows import row_of

ALL = tuple(ON_REQUEST)
QUICK = str(CONFIGS / "quickstart.py:test")
SHORT = ("stages=('mae','eval')", "mae.epochs=2", SMALL, "eval.cluster.runs=2", "eval.map=pca")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A short run of an MAE, evaluated by all protocols, with k-NN as it trained."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    settings = (*SHORT, f"eval.protocols={ALL}", "eval.export=npz", "monitor.every=1")
    settings += ("eval.probe.held_out=0.1", "monitor.images=500", "eval.pool=cls+mean")
    settings += ("eval.lowshot.splits=2", "eval.blocks=(3,1)")
    with pytest.MonkeyPatch.context() as patch:
        run_on(patch, (1, 2), configs.load(QUICK, settings), workdir, report=False)
    return workdir, settings


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


def test_every_protocol_is_in_the_results_and_better_than_chance(evaluated):
    results = results_of(evaluated[0])
    assert list(results) == ["pixels", "mae"]
    for result in results.values():
        assert set(ALL) <= set(result)
        assert result["knn"][1]["accuracy"] > 0.35  # of ten classes
        for protocol in ("probe", "probe_augmented"):
            found = result[protocol]
            assert found["chosen_on"] == "held-out training images"
            assert found["best_last_epoch"]["top5"] > found["best_last_epoch"]["top1"] > 0.15
            assert np.shape(found["epochs_top1"]) == (3, 10)
        assert result["probe"]["crops"].startswith("centre crops")
        assert result["probe_augmented"]["crops"] == "augmented in each epoch"
        shots = {str(e.get("images_per_class", e.get("share"))): e for e in result["lowshot"]}
        assert list(shots) == ["1", "2", "5", "0.01", "0.1"]
        assert shots["0.1"]["accuracy"] > shots["1"]["accuracy"] > 0.15
        assert result["cluster"]["best"]["acc"] > 0.2
        assert result["cluster"]["images"] == 2000
    assert results["mae"]["features"] == "cls+mean, after the final norm"


def test_the_same_command_computes_nothing_again(evaluated, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(evaluated[0], workdir)
    monkeypatch.setattr(runner.loader, "eval_batches", None)
    before = (workdir / "results.json").read_bytes()
    run_on(monkeypatch, (1, 2), configs.load(QUICK, evaluated[1]), workdir, report=False)
    assert (workdir / "results.json").read_bytes() == before
    # Nor is what is not asked for any more removed, as it is of these features.
    fewer = configs.load(QUICK, [*evaluated[1], "eval.blocks=()"])
    run_on(monkeypatch, (1, 2), fewer, workdir, report=False)
    assert (workdir / "results.json").read_bytes() == before
    # What was lost is made again, on the same features.
    lost = runner.folder_of(workdir, "mae") / "cluster.npz"
    clusters = runner.read_clusters(workdir, "mae")["clusters"]
    lost.unlink()
    run_on(monkeypatch, (1, 2), configs.load(QUICK, evaluated[1]), workdir, report=False)
    assert (runner.read_clusters(workdir, "mae")["clusters"] == clusters).all()
    # Another setting of one protocol: that one alone is run, on the same features.
    other = configs.load(QUICK, [*evaluated[1], "eval.knn.temperature=0.5"])
    run_on(monkeypatch, (1, 2), other, workdir, report=False)
    old, new = json.loads(before), results_of(workdir)
    assert new["mae"]["knn"] != old["mae"]["knn"]
    for protocol in set(ALL) - {"knn"}:
        assert new["mae"][protocol] == old["mae"][protocol]
    for block in ("3", "1"):
        mine, theirs = (results["mae"]["blocks"][block] for results in (new, old))
        assert mine["knn"] != theirs["knn"]
        assert mine["cluster"] == theirs["cluster"]
    assert configs.read(workdir / "config.json").eval.knn.temperature == 0.5


def test_features_are_made_anew_where_what_makes_them_has_changed(evaluated, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(evaluated[0], workdir)
    other = [*evaluated[1], "eval.pool=mean", "eval.protocols=('knn',)", "eval.pixels=False"]
    other.append("eval.blocks=(1,)")
    place = runner.folder_of(workdir, "mae") / "val"
    both = np.array(features.load(place).x)
    run_on(monkeypatch, (1, 2), configs.load(QUICK, other), workdir, report=False)
    mean = np.array(features.load(place).x)
    assert both.shape == (2000, 64)
    np.testing.assert_allclose(mean, both[:, 32:], atol=1e-5)
    # Nothing is left of what was measured on others.
    result = results_of(workdir)["mae"]
    assert {"knn"} == set(ALL) & set(result)
    blocks = result["blocks"]
    assert blocks.keys() == {"1"}
    assert "cluster" not in blocks["1"]
    assert result["features"] == "mean, after the final norm"
    kept = json.loads((place / "settings.json").read_text())
    assert kept["settings"]["kind"] == "mean, after the final norm"
    other.append("eval.final_norm=False")
    run_on(monkeypatch, (1, 2), configs.load(QUICK, other), workdir, report=False)
    assert results_of(workdir)["mae"]["blocks"] == blocks  # they have no norm in either case
    raw = features.load(place).x
    # A norm whose scale and bias have hardly moved leaves each token a mean of nought.
    assert np.abs(mean.mean(1)).mean() < 0.02 < np.abs(raw.mean(1)).mean()


def test_blocks_are_measured_as_the_encoder_is(evaluated):
    """On the features that the encoder has behind them, by the settings of the protocols."""
    workdir, settings = evaluated
    results, config, mesh = results_of(workdir), configs.load(QUICK, settings), mesh_of(1, 1)
    assert "blocks" not in results["pixels"]
    assert results["mae"]["blocks"].keys() == {"1", "3"}
    model, images = vit.from_config(config.model), arrays.fashion_mnist("val").images[:32] / 255
    images = np.float32((images - config.data.mean) / config.data.std)
    for place, block in enumerate(("1", "3")):
        found, name = results["mae"]["blocks"][block], f"mae/blocks/{block}"
        assert found["features"] == f"cls+mean, after block {block}, without the final norm"
        folder = runner.folder_of(workdir, name)
        train, val = (features.load(folder / split) for split in ("train", "val"))
        with jax.set_mesh(mesh):
            params = SAVED["mae"].encoder_params(lineage.SavedStage(workdir, "mae").read(mesh))
            want = vit.block_features(model, params, images, "cls+mean", blocks=(1, 3))[:, place]
            search = knn.Search(mesh, 64, config.eval.knn.standardise)
            near = knn.classify(search, train, val, config.eval.knn.k)
        np.testing.assert_allclose(val.x[:32], want, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(found["knn"], near, strict=True):
            assert mine["accuracy"] == pytest.approx(theirs["accuracy"], abs=2e-3)
        groups = runner.read_clusters(workdir, name)["clusters"]
        assert found["cluster"]["best"]["acc"] == np.mean(groups == val.labels)


@pytest.mark.parametrize("batch_size", [4, 3])
def test_features_go_on_where_they_were_stopped(tmp_path, rng, batch_size):
    x, labels = rng.normal(size=(22, 3)).astype(np.float32), np.arange(22, dtype=np.int32)
    valid = np.arange(22) != 5
    asked = []

    def batches(size, stop=99):
        def make(first):
            asked.append(first)
            for start in range(first * size, 22, size):
                if start >= stop:
                    raise KeyboardInterrupt
                rows = np.arange(start, start + size)
                places = np.minimum(rows, 21)
                both = np.concatenate([x, -x], 1)
                yield both[places], labels[places], valid[places] & (rows < 22)

        return make

    made_of = {tmp_path / name: {"weights": "a", "sign": name} for name in "+-"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_SAVE_EVERY", 2)
        with pytest.raises(KeyboardInterrupt):
            features.store(made_of, 22, 4, batches(4, stop=12))
        for folder in made_of:
            assert files.read_json(folder / "settings.json")["done"] == 8
        features.store(made_of, 22, batch_size, batches(batch_size))
    found, other = map(features.load, made_of)
    np.testing.assert_array_equal(other.x, -x[valid])
    assert asked == [0, 8 // batch_size]
    np.testing.assert_array_equal(found.x, x[valid])
    np.testing.assert_array_equal(found.labels, labels[valid])
    np.testing.assert_array_equal(found.records, np.flatnonzero(valid))
    # Whole, nothing is asked for; of other weights, everything, and what is whole is not touched.
    features.store(made_of, 22, batch_size, None)
    first, second = made_of
    (second / "cluster.npz").touch()
    features.store(made_of | {first: {"weights": "b"}}, 22, 11, batches(11))
    assert asked[2:] == [0]
    np.testing.assert_array_equal(features.load(first).x, x[valid])
    assert (second / "cluster.npz").exists()


def test_weights_have_one_fingerprint_on_any_mesh(rng):
    params = {"a": rng.normal(size=(8, 16)).astype(np.float32), "b": np.zeros(4, np.float32)}
    spread = jax.device_put(params, runner.sharding.tree_shardings(params, mesh_of(2, 4)))
    name = features.fingerprint(params)
    assert features.fingerprint(spread) == name
    swapped = params | {"a": params["a"][[1, 0, *range(2, 8)]]}
    near = params | {"a": np.nextafter(params["a"], np.float32(9))}
    other = params | {"b": np.ones(4, np.float32)}
    assert len({name, *map(features.fingerprint, (swapped, near, other))}) == 4


def test_knn_is_measured_while_training(evaluated):
    entries = jsonl.read(evaluated[0] / "metrics.jsonl")
    told = [entry for entry in entries if "knn_accuracy" in entry]
    assert [entry["step"] for entry in told] == [6, 12]
    for entry in told:
        assert 0.3 < entry["neighbour_accuracy"] < 0.8
        assert entry["neighbour_accuracy"] != entry["knn_accuracy"] < 0.8
    assert all(("images_per_second" in entry) == ("loss" in entry) for entry in entries)


def test_features_that_are_not_finite_are_one_line(tmp_path):
    x = np.ones((4, 2), np.float32)
    x[2, 1] = np.inf
    batches = [(x, np.zeros(4, np.int32), np.ones(4, bool))]
    with pytest.raises(UserError, match="mae/val: features are NaN or infinite"):
        features.store({tmp_path / "mae" / "val": {}}, 4, 4, lambda first: iter(batches))
    assert not features.is_whole(tmp_path / "mae" / "val")


def test_features_are_exported_with_names(evaluated, tmp_path):
    workdir = evaluated[0]
    found = features.load(runner.folder_of(workdir, "mae") / "train")
    with np.load(workdir / "export" / "mae_train.npz") as saved:
        np.testing.assert_array_equal(saved["features"], found.x)
        np.testing.assert_array_equal(saved["label"], found.labels)
        assert saved["name"][7] == "image 7"
    names = [*(f"{i}.jpg" for i in range(len(found.x) - 1)), "\udce9.jpg"]  # one is no UTF-8
    features.export(tmp_path / "mae.parquet", found, names)
    table = pq.read_table(tmp_path / "mae.parquet")
    np.testing.assert_array_equal(np.stack(table["features"].to_numpy()), found.x)
    assert table["name"].to_pylist() == [*names[:-1], r"\udce9.jpg"]
    np.testing.assert_array_equal(table["label"], found.labels)


def test_clusters_are_listed_by_image(evaluated):
    with (evaluated[0] / "clusters.csv").open() as file:
        rows = list(csv.DictReader(file))
    places = [
        f"{row}{key}" for row in ("pixels", "mae") for key in ("", "_distance", "_margin", "_rank")
    ]
    assert list(rows[0]) == ["image", "label", *places]
    assert [row["image"] for row in rows[:2]] == ["image 0", "image 1"]
    own = runner.read_clusters(evaluated[0], "mae")
    assert [int(row["mae"]) for row in rows] == own["clusters"].tolist()
    truth = arrays.fashion_mnist("val")
    assert [row["label"] for row in rows] == [truth.classes[i] for i in truth.labels]
    matched = np.mean(own["clusters"] == truth.labels)
    assert matched == results_of(evaluated[0])["mae"]["cluster"]["best"]["acc"]


@pytest.fixture
def photos(tmp_path, rng):
    """60 photographs without labels, red or blue, and one of them is torn."""
    (tmp_path / "photos").mkdir()
    for i in range(60):
        pixels = rng.integers(0, 60, (40, 40, 3), dtype=np.uint8)
        pixels[..., 2 * (i % 2)] += 180
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i:02}.jpg", quality=95)
    whole = (tmp_path / "photos" / "31.jpg").read_bytes()
    (tmp_path / "photos" / "31.jpg").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def of_photos(photos, *settings):
    first = (f"data.path={photos}", "data.source=folder", "data.train_split=photos")
    first += ("data.short_side=32", "model.channels=3", "data.max_bad_fraction=0.1")
    first += ("data.mean=(0.5,0.5,0.5)", "data.std=(0.25,0.25,0.25)", "mae.batch_size=16")
    first += ("eval.map=pca",)
    first += ("stages=('mae','eval')", "eval.batch_size=16", "eval.cluster.runs=2")
    return configs.load(QUICK, [*first, *settings])


def test_images_without_labels_are_clustered_and_the_rest_is_said_to_be_skipped(
    photos, monkeypatch
):
    workdir = photos / "run"
    settings = ("eval.cluster.groups=1", "eval.blocks=(2,)", "data.cache=32")  # decoded once
    run_on(monkeypatch, (1, 1), of_photos(photos, *settings), workdir)
    clusters = results_of(workdir)["mae"]["cluster"]
    assert clusters["selection"]["chosen"] == clusters["clusters"] == 2  # of so few images
    assert clusters["selection"]["images"] == 58
    inner = results_of(workdir)["mae"]["blocks"]["2"]["cluster"]
    assert inner["clusters"] == 2
    assert "selection" not in inner  # it is that of the row
    assert (
        "2 clusters of pixels, 2 clusters of mae, each number chosen"
        in (workdir / "results.md").read_text()
    )
    assert len(list((workdir / "cache").iterdir())) == 1
    result = results_of(workdir)["pixels"]
    assert result["knn"] == result["probe"] == {"skipped": "the images have no labels"}
    assert "acc" not in result["cluster"]["best"]
    block = results_of(workdir)["mae"]["blocks"]["2"]
    assert "knn" not in block
    assert "silhouette" in block["cluster"]["best"]
    with (workdir / "clusters.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 59
    assert {row["label"] for row in rows} == {""}
    assert {row[f"{name}_group"] for row in rows for name in ("pixels", "mae")} == {"0"}
    by_colour = {(int(row["image"][-6:-4]) % 2, row["pixels"]) for row in rows}
    assert len(by_colour) == 2  # each cluster has one colour
    html = (workdir / "report.html").read_text()
    assert "knn was skipped: the images have no labels." in html
    pictures = {path.stem for path in (workdir / "pictures").iterdir()}
    assert {"selection", "clusters", "retrieval", "map_mae", "blocks"} <= pictures
    assert "confusion" not in pictures
    near = runner.read_retrieval(workdir, "pixels")
    assert (near["index"] % 2 == near["neighbours"].T % 2).all()  # of their colour
    assert not (near["index"] == near["neighbours"].T).any()

    # A new call knows of the torn one, which it does not read again.
    strict = of_photos(photos, *settings, "data.max_bad_fraction=0.01")
    files.write_json(workdir / "config.json", strict.to_dict())
    with pytest.raises(RunFailedError, match=r"1 of 60 images cannot be read"):
        run_on(monkeypatch, (1, 1), strict, workdir, report=False)


def test_features_follow_the_range_of_the_values(tmp_path):
    """16-bit images of half the brightness: another range gives other features, also after a run
    with this folder."""
    (tmp_path / "train").mkdir()
    for i in range(8):
        Image.fromarray(np.full((28, 28), 4000 * i, np.uint16)).save(tmp_path / f"train/{i}.png")
    mesh, brightest = mesh_of(1, 1), {}
    for white in (28_000, 56_000):
        settings = f"data.path={tmp_path}", "data.source=folder", f"data.range=(0,{white})"
        run = Run(configs.load(QUICK, settings), tmp_path / "run", mesh)
        images = {"train": sources.make(run.config.data, "train", 1)}
        bad = {"train": BadImages(images["train"], sources.decoding(run.config), 0.0)}
        with jax.set_mesh(mesh):
            row = runner._row(run, "pixels", None, images=images, bad_images=bad)
        brightest[white] = float(row.features["train"].x.max())
    assert brightest == pytest.approx({28_000: 1, 56_000: 0.5}, abs=2e-3)


def test_features_do_not_outlive_their_images(photos, monkeypatch, caplog):
    """Two photographs change places, with their sizes and times, or are written again."""
    workdir, folder = photos / "run", photos / "photos"
    settings = ("eval.cluster.clusters=2", "eval.export=npz", "mae.epochs=1")

    def run(*changes):
        """Runs; returns what was said of images that have changed."""
        caplog.clear()
        config = of_photos(photos, *settings, *changes)
        run_on(monkeypatch, (1, 1), config, workdir, report=False)
        return [
            text
            for text in caplog.messages
            if "images" in text and not re.search("skipped|unreadable|near:", text)
        ]

    def of_pixels():
        """Of the first four photographs, in the files of the row: the cluster, and the red."""
        with (workdir / "clusters.csv").open() as file:
            clusters = [line["pixels"] for line in csv.DictReader(file)][:4]
        with np.load(workdir / "export" / "pixels_train.npz") as saved:
            assert [name[-6:] for name in saved["name"][:2]] == ["00.jpg", "01.jpg"]
            return clusters, saved["features"][:4, 0] > 0.5

    assert run() == []
    (a, b, *rest), red = of_pixels()
    assert (a != b, rest, red.tolist()) == (True, [a, b], [True, False] * 2)
    # Under another path they are the same, and the files of the run have it.
    (photos / "moved").symlink_to(photos)
    settings += (f"data.path={photos}/moved",)
    assert run() == []
    with np.load(workdir / "export" / "mae_train.npz") as saved:
        assert saved["name"][7] == str(photos / "moved" / "photos" / "07.jpg")
    assert f"{photos}/moved/photos/07.jpg" in (workdir / "clusters.csv").read_text()
    for old, new in (("00", "x"), ("01", "00"), ("x", "01")):
        (folder / f"{old}.jpg").rename(folder / f"{new}.jpg")
    # A report alone shows none of them beside other images.
    caplog.clear()
    build.report(workdir, pipeline.open_images(of_photos(photos, *settings)))
    assert not {"clusters", "map_mae", "reconstructions"} & pictures_of(workdir)
    assert "row mae is left out, as it was measured on other train images" in caplog.text
    assert "snapshots of other images are left out: mae 3" in caplog.text
    other = "(60 images as before, but not the same)"
    anew = "computed anew; changed: images"
    assert run() == [
        f"{workdir}/checkpoints/mae: the images have changed since {other}",
        f"{workdir}/features/pixels/train: {anew} {other}",
        f"{workdir}/features/mae/train: {anew} {other}",
    ]
    (a, b, *rest), red = of_pixels()
    assert (a != b, rest, red.tolist()) == (True, [b, a], [False, True, True, False])
    # Written again with the same size; and a row that is not measured again.
    (folder / "05.jpg").write_bytes((folder / "05.jpg").read_bytes())
    stays, computed = run("eval.pixels=False")[1:]
    assert stays.startswith(f"{workdir}: row pixels stays, ")
    assert computed.startswith(f"{workdir}/features/mae/train: {anew} (the files have their names")
    assert list(results_of(workdir)) == ["pixels", "mae"]
    (folder / "05.jpg").rename(folder / "5.jpg")
    run("eval.pixels=False")
    assert list(results_of(workdir)) == ["mae"]


def pictures_of(workdir):
    return {path.stem for path in (workdir / "pictures").iterdir()}


def test_a_page_of_an_evaluation_that_was_stopped_has_what_is_whole(evaluated, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(evaluated[0], workdir)
    path = runner.folder_of(workdir, "mae") / "val" / "settings.json"
    files.write_json(path, json.loads(path.read_text()) | {"done": 256})
    runner.folder_of(workdir, "pixels").joinpath("cluster.npz").unlink()
    config = build.read_config(workdir)
    build.report(workdir, pipeline.open_images(config))
    pictures = {path.stem for path in (workdir / "pictures").iterdir()}
    assert "map_mae" not in pictures
    assert {"clusters", "knn_accuracy", "blocks"} <= pictures


def test_a_number_of_clusters_is_chosen_of_enough_images_and_is_at_most_theirs(photos):
    for setting in ("auto", "0"):
        pipeline.open_images(of_photos(photos, f"eval.cluster.clusters={setting}"))
    with pytest.raises(UserError, match=r"eval\.cluster\.clusters=99: must be at most .*60"):
        pipeline.open_images(of_photos(photos, "eval.cluster.clusters=99"))
    for path in sorted((photos / "photos").iterdir())[39:]:
        path.unlink()
    with pytest.raises(
        UserError, match=r"clusters=0: to choose a number takes 40 images, but there are 39 train"
    ):
        pipeline.open_images(of_photos(photos))
    pipeline.open_images(of_photos(photos, "eval.cluster.clusters=2"))
    pipeline.open_images(of_photos(photos, "eval.protocols=('knn',)"))


def test_held_out_images_may_be_absent_without_labels_but_not_faulty(photos):
    config = of_photos(photos, "eval.protocols=('knn',)")
    assert list(pipeline.open_images(config)) == ["train"]
    (photos / "val" / "ant").mkdir(parents=True)
    (photos / "val" / "bee").mkdir()
    (photos / "photos" / "00.jpg").rename(photos / "val" / "ant" / "00.jpg")
    with pytest.raises(UserError, match=r"no images in these classes of .*/val': bee"):
        pipeline.open_images(config)
    (photos / "val" / "bee").rmdir()
    assert list(pipeline.open_images(config)) == ["train", "val"]
    (photos / "val").rename(photos / "held_out")
    (photos / "val").touch()  # no folder, but there
    with pytest.raises(UserError, match=r"there is no folder .*/val'"):
        pipeline.open_images(config)


def test_lists_are_read_before_anything_runs(photos):
    path = photos / "list.txt"
    path.write_bytes(b"caf\xe9.jpg\n")
    lists = ("eval.protocols=('lowshot',)", f"eval.lowshot.lists=('{path}',)")
    config = of_photos(photos, *lists)
    with pytest.raises(UserError, match=r"1 of its 1 names are not among the 60 training images"):
        pipeline.open_images(config)
    (photos / "photos" / "00.jpg").rename(photos / "photos" / "caf\udce9.jpg")
    pipeline.open_images(config)
    assert PROTOCOLS["lowshot"].settings(config)["texts"] == ["caf\udce9.jpg\n"]


def test_well_known_subsets_are_clustered_by_their_wordnet_ids(rng, monkeypatch):
    """Two classes of four, which are listed in another order."""
    monkeypatch.setitem(cluster.SUBSETS, "imagenet10", ("n3", "n1"))
    labels = np.repeat(np.arange(4, dtype=np.int32), 30)
    x = 9 * np.eye(4, 6)[labels] + rng.normal(size=(120, 6))
    found = features.Features(x.astype(np.float32), labels, np.arange(120))
    source = sources.Blank(120, 1)
    source.classes = ["n0", "n1", "n2", "n3"]
    settings = ["eval.cluster.subsets=('imagenet10','imagenet_dogs15')", "eval.cluster.runs=2"]
    mesh = mesh_of(1, 1)
    row = row_of({"val": found}, mesh, *settings, images={"val": source})
    with jax.set_mesh(mesh):
        own = PROTOCOLS["cluster"].run(row).metrics["subsets"]
    assert (own["imagenet10"]["clusters"], own["imagenet10"]["images"]) == (2, 60)
    assert own["imagenet10"]["best"]["acc"] == 1
    assert own["imagenet_dogs15"] == {"skipped": "the images have no class n02085936"}


@pytest.mark.parametrize(
    "row",
    [5, {"cluster": []}, {"blocks": 5}, {"blocks": {"1": []}}, {"blocks": {"1": {"cluster": 5}}}],
)
def test_results_that_are_no_rows_are_refused(tmp_path, row):
    files.write_json(tmp_path / "results.json", {"mae": {"cluster": {"split": "val"}}, "ct": row})
    with pytest.raises(UserError, match=r"results\.json: does not hold rows"):
        runner.read_results(tmp_path)
