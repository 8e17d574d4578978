"""The contact sheet of a page's images and views."""

import numpy as np
from PIL import Image

from maect_jax.data import arrays
from tests.helpers.commands import run_main

SHOW = ("-m", "maect_jax.data.show")


def test_a_sheet_shows_images_and_their_views(tmp_path):
    out = tmp_path / "views.png"
    done = run_main("--config=configs/ct_vitb16.py:test", f"--out={out}", python=SHOW)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    sheet = np.asarray(Image.open(out).convert("L")).astype(int)
    assert sheet.shape == (6 + 52 + 8 * 150, 7 * 150 + 48)
    source = arrays.fashion_mnist("train")
    # 28 pixels come out five times as large, in the middle of a tile of 144.
    for row, record in ((0, 0), (7, 7999)):
        top = 58 + 150 * row
        image = sheet[top : top + 144, 6 : 6 + 144][2:142, 2:142]
        shown = image.reshape(28, 5, 28, 5)[:, 2, :, 2]
        np.testing.assert_allclose(shown, source.images[record, ..., 0], atol=1)
        views = [sheet[top : top + 144, left : left + 144] for left in (168, 318, 480, 630)]
        assert all(view.std() > 10 for view in views)
        assert all(np.abs(a - b).mean() > 5 for a in views for b in views if a is not b)


def test_what_cannot_be_shown_is_one_line(tmp_path):
    for arguments, message in (
        (("--config=configs/eval.py",), "config.stages=('eval',): no training stage, and so"),
        (
            ("--config=configs/ct_vitb16.py:test", f"--out={tmp_path}/views.xyz"),
            f"--out={tmp_path}/views.xyz: cannot write there: unknown file extension",
        ),
    ):
        done = run_main(*arguments, python=SHOW)
        assert done.stderr.startswith(f"error: {message}"), done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.returncode == 2
