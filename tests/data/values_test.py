"""Values that are not 8 bits, and images that are too large: the right pixels, or an error."""

import io
import logging
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from maect_jax.data import arrays, decode, loader, values
from maect_jax.data.decode import Decoding
from maect_jax.data.folder import Folder
from maect_jax.errors import BadImageError, UserError
from tests.helpers.fuzz import only

RAMP = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (30, 1))
TWELVE = (RAMP * (4095 / 255)).round().astype(np.uint16)
SIXTEEN = RAMP.astype(np.uint16) * 257


def saved(array, kind="TIFF", **options):
    with io.BytesIO() as file:
        Image.fromarray(array).save(file, kind, **options)
        return file.getvalue()


def tiff(data, bits, photometric=1, kind=1):
    """A TIFF of the ramp's size with one strip of data; Pillow writes few kinds."""
    tags = {
        256: 40, 257: 30, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 30,
        279: len(data), 339: kind,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = struct.pack("<4sI", b"II*\0", 8 + len(data))
    return start + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def packed(array):
    """Pairs of 12 bits in three bytes."""
    first, second = array[:, ::2], array[:, 1::2]
    parts = first >> 4, (first & 15) << 4 | second >> 8, second & 255
    return np.stack(parts, axis=-1).astype(np.uint8).tobytes()


def png(colours):
    """A PNG of colours uint16 `[H, W, 3]`, which Pillow does not write."""

    def chunk(name, data):
        end = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + end

    header = struct.pack(">IIBBBBB", *colours.shape[1::-1], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def colours(array):
    return np.repeat(array[..., None], 3, axis=2)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


FLOAT = saved((RAMP / 255).astype(np.float32))
KNOWN = {  # content, range
    "float": (FLOAT, (0.0, 1.0)),
    "float below 0": (saved(RAMP.astype(np.float32) - 100), (-100, 155)),
    "pfm": (saved(RAMP.astype(np.float32), "PPM"), (0, 255)),
    "32 bits": (saved(TWELVE.astype(np.int32)), (0, 4095)),
    "signed 16 bits": (tiff((TWELVE - 1000).tobytes(), 16, kind=2), (-1000, 3095)),
    "12 bits in 16": (saved(TWELVE, "PNG"), (0, 4095)),
    "12 bits": (tiff(packed(TWELVE), 12), ()),
    "pgm of 12 bits": (b"P5 40 30 4095\n" + TWELVE.astype(">u2").tobytes(), ()),
    "jpeg 2000": (saved(SIXTEEN, "JPEG2000"), ()),
    "big-endian": (saved(SIXTEEN.astype(">u2")), ()),
    "white is zero": (tiff((65535 - SIXTEEN).tobytes(), 16, photometric=0), ()),
    "turned": (saved(np.rot90(SIXTEEN), exif=turned(6)), ()),
    "turned png": (saved(np.rot90(SIXTEEN), "PNG", exif=turned(6)), ()),
    "colours": (png(colours(SIXTEEN)), ()),
}


@pytest.mark.parametrize(("channels", "colour"), [(1, True), (1, False), (3, True), (3, False)])
def test_colours_are_not_lost_in_silence(tmp_path, caplog, channels, colour):
    picture = colours(RAMP) if colour else RAMP
    Image.fromarray(picture).save(tmp_path / "a.png")
    values.check([Folder(str(tmp_path))], Decoding(channels))
    lost = "--config.model.channels=3" in caplog.text
    assert lost == (colour and channels == 1)


@pytest.mark.parametrize(("content", "bounds"), KNOWN.values(), ids=KNOWN)
def test_values_of_every_kind_become_the_same_pixels(content, bounds):
    for channels in (1, 3):
        pixels = decode.pixels(content, Decoding(channels, bounds))
        assert (pixels.shape, pixels.dtype) == ((30, 40, channels), np.uint8)
        np.testing.assert_allclose(pixels, colours(RAMP)[..., :channels], atol=0.51)
    assert decode.shape(content, Decoding(3)) == (30, 40)


def test_values_beyond_the_range_are_clipped():
    pixels = decode.pixels(FLOAT, Decoding(1, (0.25, 0.5)))[0, :, 0]
    assert (pixels[RAMP[0] <= 63] == 0).all()
    assert (pixels[RAMP[0] >= 128] == 255).all()


UNKNOWN = {  # content, settings, what the reason says
    "float": (FLOAT, {}, ("mode F", "config.data.range")),
    "pfm": (KNOWN["pfm"][0], {}, ("mode F", "config.data.range")),
    "32 bits": (KNOWN["32 bits"][0], {}, ("mode I", "config.data.range")),
    "nan": (saved(np.full((3, 3), np.nan, np.float32)), {"range": (0, 1)}, ("finite",)),
    "colours": (KNOWN["colours"][0], {"range": (0, 4095)}, ("16 bits", "config.data.range")),
    "64 bits": (tiff(RAMP.astype(float).tobytes(), 64, kind=3), {}, ("TIFF",)),
    "large": (saved(RAMP, "PNG"), {"max_pixels": 1199}, ("1200", "config.data.max_pixels=1199")),
    "twice as large": (saved(RAMP, "JPEG"), {"max_pixels": 500}, ("config.data.max_pixels=500",)),
}


@pytest.mark.parametrize(("content", "settings", "told"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_has_no_right_pixels_is_a_bad_image_with_a_reason(content, settings, told):
    with pytest.raises(BadImageError) as error:
        decode.pixels(content, Decoding(3, **settings))
    assert all(word in str(error.value) for word in told)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as outside of tests
def test_a_large_image_is_read_where_it_is_allowed_also_in_another_process():
    for kind in ("PNG", "JPEG"):
        source = only(saved(RAMP, kind))
        bad = {}
        for limit in (1199, 1200):
            record = loader.EvalRecord(source, Decoding(3, max_pixels=limit), (8, 8), 8)
            bad[limit] = pickle.loads(pickle.dumps(record))(0)["bad"]
        assert bad == {1199: 0, 1200: -1}


def folder_of(root, *contents):
    root.mkdir()
    for i, content in enumerate(contents):
        (root / f"{i}.tiff").write_bytes(content)
    return Folder(str(root))


DOUBTFUL = {  # contents, range, mode, range to set; None where there is none
    "float": ([FLOAT], (), "F", "(0,1)"),
    "32 bits": ([KNOWN["32 bits"][0]], (), "I", "(0,4095)"),
    "below 0": ([KNOWN["float below 0"][0]], (), "F", "(-100,155)"),
    "12 bits in 16": ([KNOWN["12 bits in 16"][0]], (), "I;16", "(0,4095)"),
    "12 bits with an offset": ([saved(TWELVE + 32000)], (), "I;16", "(0,65535)"),
    "beyond": ([KNOWN["32 bits"][0]], (5000, 6000), "I", "(0,4095)"),
    "colours": ([png(colours(TWELVE))], (), "RGB of 16 bits", None),
    "colours with a range": ([png(colours(SIXTEEN))], (0, 4095), "RGB of 16 bits", None),
    "one of many": ([*[saved(RAMP, "PNG")] * 9, FLOAT], (), "F", "(0,1)"),
}


@pytest.mark.parametrize(("contents", "bounds", "mode", "wanted"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_doubtful_values_are_an_error_that_says_what_to_set(
    tmp_path, contents, bounds, mode, wanted
):
    source = folder_of(tmp_path / "x", *contents)
    with pytest.raises(UserError) as error:
        values.check([source], Decoding(3, bounds))
    text = str(error.value)
    assert f"{len(contents) - 1}.tiff: mode {mode}, values " in text
    assert wanted is None or f'--config.data.range="{wanted}"' in text


def test_values_that_are_known_pass(tmp_path, caplog):
    fine = [content for content, bounds in KNOWN.values() if not bounds]
    dark = saved(SIXTEEN // 16)  # one of a set that fills its bits
    values.check([folder_of(tmp_path / "x", dark, b"no image", *fine)], Decoding(3))
    values.check([folder_of(tmp_path / "y", FLOAT)], Decoding(3, (0.0, 1.0)))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        values.check([folder_of(tmp_path / "z", FLOAT)], Decoding(3, (0.0, 0.5)))
    assert [record.args[1] for record in caplog.records] == [(0.0, 0.5)]


def npz(path, decoding, **content):
    np.savez(path, **content)
    return arrays.npz(str(path), "train", decoding).images


def test_arrays_of_numbers_become_pixels(tmp_path):
    path, images = tmp_path / "x.npz", colours(RAMP)[None]
    for array, bounds in (
        (images, ()),
        (images / 255, (0, 1)),
        ((images / 255).astype(np.float16), (0, 1)),
        (colours(TWELVE)[None], (0, 4095)),
        (colours(SIXTEEN)[None], ()),
    ):
        got = npz(path, Decoding(3, bounds), image=array)
        assert got.dtype == np.uint8
        np.testing.assert_allclose(got, images, atol=0.7)
    for array, wanted in (
        (images / 255, "(0,1)"),
        (colours(TWELVE)[None], "(0,4095)"),
        (colours(RAMP)[None].astype(np.int64), "(0,255)"),
        (images // 200, "values 0 to 1: must be 0 to 255"),
        (images // 16, "values 0 to 15: must be 0 to 255"),
        (images / np.where(images > 9, 1, np.nan), "finite"),
    ):
        with pytest.raises(UserError) as error:
            npz(path, Decoding(3), image=array)
        assert wanted in str(error.value)
    blob = np.frombuffer(KNOWN["12 bits in 16"][0], np.uint8)
    files = dict(blob=blob, offsets=[0, len(blob)])
    with pytest.raises(UserError, match=r"x\.npz, image 0: mode I;16, .*\(0,4095\)"):
        npz(path, Decoding(1), **files)
    np.testing.assert_array_equal(npz(path, Decoding(1, (0, 4095)), **files)[0, ..., 0], RAMP)


@pytest.mark.parametrize("channels", [2, 4])
def test_arrays_of_any_channels_are_images(tmp_path, rng, channels):
    pixels = rng.integers(0, 256, (3, 16, 12, channels), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", image=pixels)
    source = arrays.npz(str(tmp_path / "x.npz"), "train", Decoding(channels))
    crop = loader.EvalRecord(source, Decoding(channels), (8, 6), 6)(1)["image"]
    assert crop.shape == (8, 6, channels)
    for i in range(channels):
        alone = arrays.Arrays(pixels[..., i : i + 1], np.zeros(3), [])
        gray = loader.EvalRecord(alone, Decoding(1), (8, 6), 6)(1)["image"]
        np.testing.assert_array_equal(crop[..., i : i + 1], gray)
