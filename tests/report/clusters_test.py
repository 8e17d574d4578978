"""The files of the page of clusters: data, thumbnails, what is kept and what is left out."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from maect_jax import files
from maect_jax.evals import runner
from maect_jax.evals.assignment import Centres
from maect_jax.report import clusters
from tests.helpers import clustered as hand
from tests.helpers.common import save


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run with a page, and its images."""
    run = tmp_path_factory.mktemp("clustered")
    source = hand.make(run)
    hand.write(run, source)
    return run, source


@pytest.fixture
def copied(made, tmp_path):
    """A copy of it, and the images."""
    for part in ("features", "clusters", "clusters.html"):
        copy = shutil.copy if part.endswith("html") else shutil.copytree
        copy(made[0] / part, tmp_path / part)
    return tmp_path, made[1]


def data_of(run, script="data.js", name="maectClusters"):
    text = (run / "clusters" / script).read_text(encoding="ascii")
    return json.loads(text.removeprefix(f"window.{name} = ").rstrip(";\n"))


def unpacked(packed):
    kind = packed["type"].removesuffix("Array").lower()
    return np.frombuffer(base64.b64decode(packed["base64"]), kind)


def test_the_data_of_a_page_are_those_of_its_run(made):
    run, _ = made
    data, found = data_of(run), runner.read_clusters(run, hand.ROW)
    records = unpacked(data["record"])
    assert sorted(records.tolist()) == list(range(len(hand.NAMES)))
    assert data["names"] == [hand.NAMES[i] for i in records]
    assert data["folder"] == f"{run}/images/"
    assert dict(zip(data["numbers"], data["sizes"], strict=True)) == hand.SIZES
    numbers = np.array(data["numbers"])[unpacked(data["place"])]
    np.testing.assert_array_equal(numbers, found["clusters"][records])
    for key in ("rank", "distance", "margin"):
        np.testing.assert_array_equal(unpacked(data[key]), found[key][records])
    assert data["digest"] == Centres.read(found).digest
    near = files.read_arrays(runner.folder_of(run, hand.ROW) / "near.npz")
    neighbours = unpacked(data["near"]["neighbours"]).reshape(-1, 10)
    np.testing.assert_array_equal(records[neighbours], near["neighbours"][records])
    shown = [data["names"][i] for i in data["near"]["pairs"] + data["near"]["outliers"]]
    assert shown == ["2/00.png", "2/01.png", "2/39.png"]
    margins = found["margin"][records[data["borderline"]]]
    np.testing.assert_array_equal(margins, np.sort(found["margin"])[:7])


def test_thumbnails_are_whole_images_in_the_order_of_the_page(made):
    run, source = made
    data = data_of(run)
    about, shapes = data["sheets"], unpacked(data["shape"]).reshape(-1, 2)
    assert (about["side"], about["crisp"], about["ending"]) == (28, True, "png")
    with Image.open(run / "clusters" / "sprites_000.png") as opened:
        sheet = np.asarray(opened)
    for i, record in enumerate(unpacked(data["record"]).tolist()):
        top, left = (about["cell"] * at + about["border"] for at in divmod(i, about["columns"]))
        width, height = shapes[i].tolist()
        with Image.open(source.name(record)) as image:
            np.testing.assert_array_equal(sheet[top : top + height, left : left + width], image)


def test_thumbnails_of_large_images_keep_their_aspect(copied):
    run, source = copied
    for name, shape in (("2/00.png", (300, 600)), ("2/01.png", (9, 900))):
        save(run / "images" / name, shape)
    for path in set(hand.NAMES) - {"2/00.png", "2/01.png"}:
        target = run / "images" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f"{source._root}/{path}", target)
    (run / "images" / "2/02.png").write_bytes(b"damaged")
    hand.write(run, type(source)(str(run / "images"), labelled=False))
    data = data_of(run)
    shapes = dict(zip(data["names"], unpacked(data["shape"]).reshape(-1, 2).tolist(), strict=True))
    assert data["sheets"]["ending"] == "jpg"
    assert [shapes[f"2/{i}.png"] for i in ("00", "01", "02", "03")] == [
        [92, 46], [92, 1], [92, 92], [28, 28]
    ]  # fmt: skip


def test_thumbnails_are_made_again_only_for_other_images(copied, monkeypatch):
    run, source = copied
    read = []
    monkeypatch.setattr(type(source), "__getitem__", lambda *a: read.append(a) or (b"", -1))
    before = {path.name: path.read_bytes() for path in (run / "clusters").iterdir()}
    hand.write(run, source)
    assert {path.name: path.read_bytes() for path in (run / "clusters").iterdir()} == before
    found = runner.read_clusters(run, hand.ROW)
    files.write_arrays(
        runner.folder_of(run, hand.ROW) / "cluster.npz",
        **found | {"rank": found["rank"][::-1], "clusters": found["clusters"][::-1]},
    )
    identity = source.identity  # which is known already, and so reads nothing
    read.clear()
    hand.write(run, source)
    assert len(read) >= identity.images


def test_a_page_that_is_cut_off_leaves_the_one_before(copied, monkeypatch):
    run, source = copied
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(clusters, "__version__", "another")
    monkeypatch.setattr(clusters, "_thumbnail", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hand.write(run, source)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_names_of_other_clusters_are_not_taken(copied, caplog):
    run, source = copied
    digest = Centres.read(runner.read_clusters(run, hand.ROW)).digest
    given = {"clustering": digest, "names": {"2": "</script>"}, "images": {"0/01.png": "x"}}
    files.write_json(run / "names.json", given)
    hand.write(run, source)
    assert data_of(run)["saved"] == {key: given[key] for key in ("names", "images")}
    assert not caplog.text
    files.write_json(run / "names.json", given | {"clustering": "0" * 16})
    hand.write(run, source)
    assert data_of(run)["saved"] == {}
    assert "0000000000000000" in caplog.text


def test_what_is_near_of_another_split_is_left_out(copied, caplog):
    run, source = copied
    for split, count in (("val", 1), ("train", 0)):
        entry = {"cluster": {"split": "val"}, "near": {"split": split}}
        files.write_json(run / "results.json", {hand.ROW: entry})
        hand.write(run, source)
        assert bool(data_of(run)["near"]) == count
    assert "near.npz: is of other images" in caplog.text


def test_a_page_of_many_images_shows_the_most_telling(copied, monkeypatch):
    run, source = copied
    monkeypatch.setattr(clusters, "_MOST", 30)
    monkeypatch.setattr(clusters, "_NEIGHBOURS", 4)
    monkeypatch.setattr(clusters, "_CENTRAL", 2)
    monkeypatch.setattr(clusters, "_LISTED", 3)
    hand.write(run, source)
    data = data_of(run)
    ranks = unpacked(data["rank"])
    assert data["part"]
    assert data["images"] == sum(hand.SIZES.values())
    assert len(set(data["names"])) == 30
    places = unpacked(data["place"])
    for place, size in enumerate(data["sizes"]):
        assert {0, 1, size - 2, size - 1} <= set(ranks[places == place].tolist())
    assert {"2/00.png", "2/01.png", "2/39.png"} <= set(data["names"])
    neighbours = unpacked(data["near"]["neighbours"])
    assert min(neighbours) == -1
    assert set(hand.NAMES[:4]) <= {data["names"][image] for image in neighbours if image >= 0}
    every = data_of(run, "all.js", "maectAll")
    assert every["names"] == hand.NAMES
    assert len(unpacked(every["place"])) == len(hand.NAMES)
    text = (run / "clusters.html").read_text()
    assert re.search(r"This page has 30 of the 66 images", text)


def test_all_that_is_listed_is_on_a_page_of_very_many_clusters(copied, monkeypatch):
    run, source = copied
    monkeypatch.setattr(clusters, "_MOST", 7)  # fewer than the central images
    monkeypatch.setattr(clusters, "_LISTED", 3)
    hand.write(run, source)
    data = data_of(run)
    near = data["near"]
    assert (len(data["names"]), len(data["borderline"]), len(near["pairs"])) == (7, 3, 2)
    assert min(data["borderline"] + near["outliers"] + near["pairs"]) >= 0


def test_what_an_earlier_version_wrote_has_no_page(copied, caplog):
    run, source = copied
    path = runner.folder_of(run, hand.ROW) / "cluster.npz"
    arrays = files.read_arrays(path)
    files.write_arrays(path, **{k: arrays[k] for k in ("clusters", "distance", "index", "labels")})
    assert clusters.Clustered.read(run, hand.ROW, source, entry={}) is None
    assert "is of an earlier version" in caplog.text
    assert runner.AGAIN in caplog.text
