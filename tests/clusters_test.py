"""New images are assigned to a run's clusters: from Python, and by `maect assign`."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from maect_jax import clusters, files, load_clusters
from maect_jax import config as configs
from maect_jax.data import arrays
from maect_jax.errors import UserError
from maect_jax.evals import assignment, runner
from tests.helpers.commands import QUICK
from tests.helpers.common import run_on

ROWS = ("mae", "pixels", "mae/blocks/1")
TORN = 31


@pytest.fixture(scope="module")
def run(tmp_path_factory, finished):
    """An evaluation of another run's checkpoint on 60 images without labels, one of them torn."""
    top = tmp_path_factory.mktemp("clusters")
    (top / "photos" / "a" / "b").mkdir(parents=True)
    for i, image in enumerate(arrays.fashion_mnist("val").images[:60, ..., 0]):
        large = Image.fromarray(image).resize((50, 40 + i))
        large.save(top / "photos" / ("a/b" if i % 2 else "") / f"{i:02}.jpg", quality=95)
    torn = top / "photos" / "a" / "b" / f"{TORN}.jpg"
    torn.write_bytes(torn.read_bytes()[:500])
    settings = ("stages=('eval',)", f"init_from={finished.workdir}/checkpoints/mae/12")
    settings += ("eval.protocols=('cluster',)",)
    settings += (f"data.path={top}", "data.source=folder", "data.train_split=photos")
    settings += ("data.labels=none", "data.cache=36", "data.max_bad_fraction=0.1")
    settings += ("eval.cluster.clusters=4", "eval.cluster.runs=2", "eval.cluster.pca=5")
    settings += ("eval.blocks=(1,)", "eval.pool=cls+mean", "eval.batch_size=16")
    with pytest.MonkeyPatch.context() as patch:
        run_on(patch, (1, 2), configs.load(QUICK, settings), top / "run", report=False)
    return top / "run"


@pytest.fixture
def own(run, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(run, tmp_path / "run")


def assign(monkeypatch, *arguments):
    """The lines that `maect assign` writes, by image."""
    out = arguments[0].parent / "assigned.csv"
    monkeypatch.setattr("sys.argv", ["maect assign", *map(str, arguments), f"--out={out}"])
    clusters.main()
    with out.open() as file:
        return {line.pop("image"): line for line in csv.DictReader(file)}


@pytest.mark.parametrize("row", ROWS)
def test_a_runs_own_images_get_their_own_clusters(run, monkeypatch, capsys, caplog, row):
    """On eight devices, where the run had two."""
    lines = assign(monkeypatch, run, run.parent / "photos", f"--row={row}")
    with (run / "clusters.csv").open() as file:
        listed = {line["image"]: line for line in csv.DictReader(file)}
    want = runner.read_clusters(run, row)
    names = [name for name in lines if name in listed]
    assert len(lines) == 60
    assert len(names) == len(want["index"]) == 59
    rims = want["rim"] * want["sizes"] / (want["sizes"] - 1)
    rims = dict(zip(want["numbers"].tolist(), rims.tolist(), strict=True))
    for i, name in enumerate(names):
        line = lines[name]
        assert list(line) == ["cluster", "name", "distance", "margin", "beyond_rim"]
        assert int(line["cluster"]) == want["clusters"][i]
        assert row not in listed[name] or line["cluster"] == listed[name][row]
        for key in ("distance", "margin"):
            assert float(line[key]) == pytest.approx(want[key][i], rel=1e-3, abs=1e-4)
        beyond = want["distance"][i] - rims[int(line["cluster"])]
        assert abs(beyond) < 1e-4 or int(line["beyond_rim"]) == (beyond > 0)
    (torn,) = lines.keys() - set(names)
    assert set(lines[torn].values()) == {""}
    assert any(torn in text and "unreadable" in text for text in caplog.messages)
    said = capsys.readouterr().out
    assert f"59 images in 4 of the 4 clusters of {run} (row {row})" in said
    assert "unlike" not in said


def test_images_of_the_runs_size_are_assigned_in_python(finished):
    run, images = finished.workdir, arrays.fashion_mnist("val").images[:50]
    for row in (None, "pixels"):
        found, want = load_clusters(run, row=row)(images), runner.read_clusters(run, row or "ct")
        np.testing.assert_array_equal(found.cluster, want["clusters"][:50])
        np.testing.assert_allclose(found.distance, want["distance"][:50], rtol=1e-3)
        np.testing.assert_allclose(found.margin, want["margin"][:50], rtol=1e-2, atol=1e-3)
        assert set(found.name) == {""}
    as_floats = load_clusters(run, row="pixels")(images / np.float32(255))
    np.testing.assert_allclose(as_floats.distance, found.distance, rtol=1e-4)
    dots = np.zeros_like(images)
    dots[range(50), 14, range(-25, 25)] = 255
    assert load_clusters(run, row="pixels")(dots).beyond_rim.all()
    assert found.beyond_rim.sum() < 5
    with pytest.raises(ValueError, match=r"must be \(B, 28, 28, 1\)"):
        load_clusters(run)(images[..., 0])


def test_images_unlike_those_of_the_run_are_said_to_be(finished, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(finished.workdir, tmp_path / "run")
    images = np.zeros((9, 28, 28), np.uint8)
    images[range(9), range(10, 19), 14] = 255
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    lines = assign(monkeypatch, run, *sorted(tmp_path.glob("*.png")), "--row=pixels")
    assert [line["beyond_rim"] for line in lines.values()] == ["1"] * 9
    assert "100% of the images are beyond the rim" in capsys.readouterr().out


def test_names_are_kept_and_used(own, tmp_path, monkeypatch, capsys, caplog):
    centres = load_clusters(own).centres
    here, there, *_ = centres.numbers.tolist()
    given = {"clustering": centres.digest, "names": {str(here): "glass, clear", str(there): ""}}
    given["images"] = {"00.jpg": "stone"}  # one of the run's own, of which the others know nothing
    files.write_json(tmp_path / "mine.json", given)
    photos = own.parent / "photos"
    photos.mkdir()
    image = arrays.fashion_mnist("val").images[0, ..., 0]
    for name in ("00.jpg", "01.jpg"):
        Image.fromarray(image).save(photos / name)
    first = assign(monkeypatch, own, photos / "00.jpg", photos, f"--names={tmp_path}/mine.json")
    assert json.loads((own / "names.json").read_text()) == given
    assert str(own / "names.json") in capsys.readouterr().out
    monkeypatch.chdir(photos)
    second = assign(monkeypatch, own, "01.jpg")
    assert list(first) == [str(photos / "00.jpg"), str(photos / "01.jpg")]
    assert list(second) == [str(photos / "01.jpg")]
    named = load_clusters(own)
    assert named.names == ({here: "glass, clear"}, given["images"])
    for line in (*first.values(), *second.values()):
        assert line["name"] == named.names.clusters.get(int(line["cluster"]), "")
    found = named(np.zeros((1, *named.config.model.image_size, 1), np.uint8))
    assert found.name[0] == named.names.clusters.get(int(found.cluster[0]), "")
    # Of other clusters they are not used, and a line says so.
    assert not caplog.messages
    assert load_clusters(own, row="pixels").names == ({}, {})
    assert f"{own}/names.json: has the names of other clusters" in caplog.text
    with pytest.raises(UserError, match="other clusters"):
        assign(monkeypatch, own, photos, "--row=pixels", f"--names={tmp_path}/mine.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clustering": "0" * 16}, "other clusters"),
        ({"names": {"7": "a", "x": "b", "99": "c"}}, "no cluster 7, x, 99"),
        ({"names": {"0": ["a"]}}, "'names' must be text on one line, not of 0"),
        ({"names": {"0": "a\nb"}}, "'names' must be text"),
        ({"names": ["a"]}, "'names' is .* must be an object"),
        ({"images": {"a.jpg": 3}}, "'images' must be text .* a.jpg"),
        (None, "not JSON"),
    ],
)
def test_names_that_are_wrong_are_refused(run, tmp_path, monkeypatch, caplog, change, message):
    centres = assignment.Centres.read(runner.read_clusters(run, "mae"))
    path = tmp_path / "names.json"
    content = {"clustering": centres.digest, "names": {"0": "a"}, "images": {}} | (change or {})
    path.write_text(json.dumps(content)[: None if change else -1])
    with pytest.raises(UserError, match=message):
        assignment.checked_names(path, centres)
    assert assignment.read_names(tmp_path, centres) == ({}, {})
    (said,) = caplog.messages
    assert said.startswith(f"{path}: ")


def test_what_cannot_be_assigned_is_one_line(own, tmp_path, monkeypatch):
    def refused(message, *arguments):
        with pytest.raises(UserError, match=message):
            assign(monkeypatch, *arguments)
        assert not (own.parent / "assigned.csv").exists()

    photos = own.parent / "photos"
    photos.mkdir()
    (photos / "empty.jpg").touch()
    refused("no config.json", tmp_path / "none", photos)
    refused("row 'ct'; it has those of mae, mae/blocks/1, pixels", own, photos, "--row=ct")
    refused("'gone.jpg': there is no such file", own, "gone.jpg")
    refused("'x.tar': shards", own, photos, "x.tar")
    (photos / "none").mkdir()
    refused("^no images below", own, photos / "none")
    refused("none of the 1 images can be read", own, photos)
    refused("names.json: there is no such file", own, photos, f"--names={tmp_path}/names.json")
    path = runner.folder_of(own, "mae") / "cluster.npz"
    arrays = files.read_arrays(path)
    files.write_arrays(path, **{key: arrays[key] for key in runner.PROTOCOLS["cluster"].arrays})
    refused("has no centres, .* earlier version", own, photos)
    path.write_bytes(path.read_bytes()[:-100])
    refused("is damaged", own, photos)
    path.unlink()  # those of another row are not taken in its place
    refused("no clusters of row 'mae'; it has those of mae/blocks/1, pixels", own, photos)
    for found in own.rglob("cluster.npz"):
        found.unlink()
    refused("has no clusters", own, photos)


def test_clusters_of_another_encoder_are_refused(own, finished):
    for key, value in {"data.short_side": 30, "eval.pool": "mean"}.items():
        config = configs.read(run_config := own / "config.json")
        before = run_config.read_text()
        config.update_from_flattened_dict({key: value})
        files.write_json(run_config, config.to_dict())
        with pytest.raises(UserError, match=f"changed: {'data' if 'data' in key else 'kind'}"):
            load_clusters(own)
        run_config.write_text(before)
    checkpoints = finished.workdir / "checkpoints"
    for other, message in (("mae/6", r"changed: weights\)"), ("ct/6", "no encoder 'mae' any more")):
        config = configs.read(own / "config.json")
        config.init_from = str(checkpoints / other)
        files.write_json(own / "config.json", config.to_dict())
        with pytest.raises(UserError, match=message):
            load_clusters(own)
    shutil.rmtree(runner.folder_of(own, "pixels") / "train")
    with pytest.raises(UserError, match="absent or damaged"):
        load_clusters(own, row="pixels")
