"""The contact sheet of a config's images and views."""

import sys

import numpy as np
import pytest
from PIL import Image

from maect_jax import config as configs
from maect_jax import errors, pipeline
from maect_jax.data import arrays
from maect_jax.data.transforms import Crops
from maect_jax.report import style, views
from tests.helpers import CONFIGS
from tests.helpers.tiny_stages import with_local_views


def call(monkeypatch, *arguments):
    """Calls the command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["views", *arguments])
    return errors.run_command(views.main)


def test_a_sheet_shows_images_and_their_views(tmp_path, monkeypatch, capsys):
    out = tmp_path / "views.png"
    assert call(monkeypatch, f"--config={CONFIGS}/ct_vitb16.py:test", f"--out={out}") == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    sheet = np.asarray(Image.open(out).convert("L")).astype(int)
    assert sheet.shape == (6 + 52 + 8 * 150, 7 * 150 + 48)
    source = arrays.fashion_mnist("train")
    # 28 pixels come out five times as large, in the middle of a tile of 144.
    for row, record in ((0, 0), (7, 7999)):
        top = 58 + 150 * row
        image = sheet[top : top + 144, 6 : 6 + 144][2:142, 2:142]
        shown = image.reshape(28, 5, 28, 5)[:, 2, :, 2]
        np.testing.assert_allclose(shown, source.images[record, ..., 0], atol=1)
        tiles = [sheet[top : top + 144, left : left + 144] for left in (168, 318, 480, 630)]
        assert all(tile.std() > 10 for tile in tiles)
        assert all(np.abs(a - b).mean() > 5 for a in tiles for b in tiles if a is not b)


def test_smaller_views_stand_together_in_proportion(rng, monkeypatch):
    monkeypatch.setattr(views, "_IMAGES", 2)
    config = configs.load(f"{CONFIGS}/quickstart.py:test", [])
    pipeline.check(config, devices=1)
    stage = with_local_views(Crops((14, 14), (0.05, 0.25), 3))
    rows = views.views_of(config, stage, arrays.fashion_mnist("train"))
    assert [[len(panel.images) for panel in group] for group in rows[1]] == [[1], *[[1, 1, 3]] * 3]
    sheet = np.asarray(views.sheet({stage: rows}).convert("L")).astype(int)
    assert sheet.shape == (6 + 52 + 2 * 150, 150 + 3 * (2 * 150 + 150) + 4 * 12)
    local = rows[1][3][2].images
    assert not any(np.array_equal(a, b) for a in local for b in local if a is not b)
    # Two rows of tiles of 69, at the end of the second line, with 14 pixels across each.
    left, top = sheet.shape[1] - 150 - 6, 58 + 150
    for image, (y, x) in zip(local, ((0, 0), (0, 75), (75, 0)), strict=True):
        tile = sheet[top + y : top + y + 69, left + x : left + x + 69]
        centres = (np.arange(14) + 0.5) * 69 / 14
        shown = tile[np.ix_(centres.astype(int), centres.astype(int))]
        np.testing.assert_allclose(shown, image[..., 0], atol=1)


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        ("eval.py", "x.png", "config.stages=('eval',): "),
        ("ct_vitb16.py:test", "x.xyz", "--out={out}: "),
    ],
)
def test_what_cannot_be_shown_is_one_line(tmp_path, monkeypatch, capsys, config, name, message):
    out = tmp_path / name
    assert call(monkeypatch, f"--config={CONFIGS}/{config}", f"--out={out}") == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {message.format(out=out)}")
    assert line.count("\n") == 1


def test_a_picture_of_any_channels_shows_the_first_ones(rng):
    pixels = rng.integers(0, 256, (4, 3, 5), dtype=np.uint8)
    for channels, shown in ((1, [0] * 3), (2, [0] * 3), (3, [0, 1, 2]), (5, [0, 1, 2])):
        rgb = style.to_rgb_image(pixels[..., :channels])
        np.testing.assert_array_equal(rgb, pixels[..., shown])
