"""Images of every kind, and those that cannot be read."""

import io
import logging

import jax
import numpy as np
import pytest
from PIL import Image

from maect_jax import sharding
from maect_jax.data import bad_images, decode, loader
from maect_jax.data.decode import Decoding
from maect_jax.data.folder import Folder
from maect_jax.data.transforms import Crops
from maect_jax.errors import BadImageError, RunFailedError
from tests.helpers.fuzz import only

RGB = Decoding(3)
RAMP = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (30, 1))


def saved(picture, kind="PNG", **options):
    with io.BytesIO() as file:
        picture.save(file, kind, **options)
        return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


GRAY = Image.fromarray(RAMP)
KINDS = {
    "gray": saved(GRAY),
    "gray jpeg": saved(GRAY, "JPEG", quality=95),
    "rgb": saved(GRAY.convert("RGB")),
    "palette": saved(GRAY.convert("P")),
    "cmyk": saved(GRAY.convert("CMYK"), "JPEG", quality=95),
    "alpha": saved(GRAY.convert("RGBA")),
    "16 bits": saved(Image.fromarray(RAMP.astype(np.uint16) * 257)),
    "16 bits tiff": saved(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"),
    "turned by no known value": saved(GRAY, "JPEG", quality=95, exif=turned(9)),
    "turned": saved(
        GRAY.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=turned(6)
    ),
}  # fmt: skip


@pytest.mark.parametrize("content", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_has_the_same_pixels(content, channels):
    pixels = decode.pixels(content, Decoding(channels))
    assert (pixels.shape, pixels.dtype) == ((30, 40, channels), np.uint8)
    # JPEG, and gray as a colour of CMYK, lose a little.
    assert np.abs(pixels - RAMP[..., None].astype(int)).max() <= 4


def test_jpegs_have_pillows_pixels(rng):
    for mode, channels in (("RGB", 3), ("L", 1)):
        noise = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)).resize((97, 61))
        for options in (dict(), dict(progressive=True), dict(subsampling=0, quality=95)):
            content = saved(noise.convert(mode), "JPEG", **options)
            expected = np.asarray(Image.open(io.BytesIO(content))).reshape(61, 97, channels)
            np.testing.assert_array_equal(decode.pixels(content, Decoding(channels)), expected)
            # Some cameras leave bytes before the end, which libjpeg only warns of.
            odd = content[:-2] + bytes(4) + content[-2:]
            np.testing.assert_array_equal(decode.pixels(odd, Decoding(channels)), expected)


@pytest.mark.parametrize("content", KINDS.values(), ids=KINDS.keys())
def test_a_file_tells_its_shape_before_it_is_decoded(content):
    assert decode.shape(content, RGB) == (30, 40)
    assert decode.pixels(content, RGB, min_scale=0.4).shape[0] in (15, 30)  # half of it, or whole


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_crops_of_a_jpeg_that_is_decoded_smaller(rng, mode, channels, monkeypatch):
    """The same boxes and nearly the same pixels, of decoded images that are smaller."""
    picture = Image.fromarray(rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)).resize((700, 500))
    source = only(saved(picture.convert(mode), "JPEG", quality=95))
    shapes, decoded = [], decode.pixels

    def spied(*arguments):
        found = decoded(*arguments)
        shapes.append(found.shape[:2])
        return found

    monkeypatch.setattr(decode, "pixels", spied)
    crops = (Crops((60, 50), (0.08, 1.0), 2), Crops((20, 25), (0.05, 0.25), 3))
    for epoch in range(20):
        sides = (
            loader.TrainRecord(source, Decoding(channels), crops, (0,), scaled)
            for scaled in (True, False)
        )
        small, whole = (side((epoch, 0)) for side in sides)
        assert small["seed"].tolist() == whole["seed"].tolist()
        assert small["image"].shape == (2, 60, 50, channels)
        for field in ("image", "local"):
            difference = np.abs(small[field].astype(int) - whole[field])
            assert difference.mean() < 2
    assert len(shapes) == 60  # one decoding an image, of a whole one then its pixels once again
    smaller = [shape for shape in shapes if shape != (500, 700)]
    assert len(smaller) > 15
    assert min(smaller) == (125, 175)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 20_000)])
def test_images_of_odd_sizes_have_views(size):
    source = only(saved(Image.new("RGB", size, (9, 8, 7)), "JPEG"))
    view = loader.TrainRecord(source, RGB, (Crops((16, 16), (0.08, 1.0), 2),), (0,))((0, 0))
    crop = loader.EvalRecord(source, RGB, (16, 16), 18)(0)
    for image in (*view["image"], crop["image"]):
        assert image.shape == (16, 16, 3)
        np.testing.assert_allclose(image, np.full((16, 16, 3), (9, 8, 7)), atol=2)


def test_what_is_no_image_has_a_reason():
    whole = KINDS["gray jpeg"]
    for content in (b"", b"no image", whole[: len(whole) // 2], KINDS["rgb"][:60], whole[:3]):
        with pytest.raises(BadImageError, match=r"\w"):
            decode.pixels(content, RGB)


@pytest.fixture
def damaged(images):
    """A folder in which the third and the fourth image cannot be read."""
    torn = images / "train" / "ant" / "02.png"
    torn.write_bytes(torn.read_bytes()[:50])
    (images / "train" / "ant" / "03.png").write_bytes(b"no image")
    return Folder(str(images / "train"))


def test_the_next_image_stands_for_one_that_cannot_be_read(damaged):
    make = loader.TrainRecord(damaged, RGB, (Crops((8, 8), (0.2, 1.0), 2),), (0, 2))
    whole, second, third = make((0, 1)), make((0, 2)), make((0, 3))
    assert [x["bad"] for x in (whole, second, third)] == [-1, 2, 3]
    assert [x["index"] for x in (whole, second, third)] == [1, 4, 4]
    assert whole["image"][0, 0, 0, 0] == 10
    assert second["image"][0, 0, 0, 0] == third["image"][0, 0, 0, 0] == 40
    assert not np.array_equal(second["image"], third["image"])  # each has its own boxes


def test_bad_images_are_named_once_and_too_many_end_the_run(damaged, caplog):
    some = bad_images.BadImages(damaged, RGB, allowed=0.1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batch = some.collect({"x": np.arange(3), "bad": np.array([-1, 2, 3])})
            some.check()
    assert list(batch) == ["x"]
    named = [record.getMessage() for record in caplog.records]
    assert [name.split(": ")[1][-6:] for name in named] == ["02.png", "03.png"]
    few = bad_images.BadImages(damaged, RGB, allowed=0.05)
    few.collect({"bad": np.array([2])})
    few.check()
    few.collect({"bad": np.array([3, 2])})
    caplog.clear()
    message = r"^2 of 21 images .*max_bad_fraction=0\.05: .*ant/02\.png: .*; .*ant/03\.png: cannot"
    with pytest.raises(RunFailedError, match=message):
        few.check()
    assert not caplog.records  # the error lists them


def test_bad_images_of_all_hosts_are_counted(damaged, monkeypatch):
    """Two hosts, of which the other one has found the fourth image."""
    others = iter([1, [3]])

    def gathered(own):
        theirs = np.array(next(others), np.int32)
        return np.stack([np.broadcast_to(own, theirs.shape), theirs])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding.multihost_utils, "process_allgather", gathered)
    found = bad_images.BadImages(damaged, RGB, allowed=0.05)
    found.collect({"bad": np.array([2])})
    with pytest.raises(RunFailedError, match=r"2 of 21 images .*02\.png.*03\.png"):
        found.check()


def test_an_evaluation_leaves_bad_images_out(damaged):
    example = loader.EvalRecord(damaged, RGB, (8, 8), 8)
    batches = list(loader.eval_batches(example, 8, 0, range(8)))
    rows = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    assert rows["index"][rows["valid"]].tolist() == [0, 1, *range(4, 21)]
    assert rows["bad"][rows["bad"] >= 0].tolist() == [2, 3]


def test_a_source_without_any_image_ends_the_run(images):
    for path in (images / "train").rglob("*.*"):
        path.write_bytes(b"")
    make = loader.TrainRecord(
        Folder(str(images / "train")), RGB, (Crops((8, 8), (0.2, 1.0), 1),), (0,)
    )
    with pytest.raises(RunFailedError, match=r"100 images in a row .* one .*99\.JPG: cannot"):
        make((0, 5))
