"""Wrong inputs: each works or ends in one clear line; nothing is left half written.

By default each property has a few examples (`pytest -m slow tests/fuzz_test.py` draws all).
"""

import contextlib
import io
import os

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from maect_jax import config as configs
from maect_jax import pipeline
from maect_jax.data import arrays, decode, loader, sources, subsets
from maect_jax.data.decode import Decoding
from maect_jax.data.transforms import Crops
from maect_jax.errors import BadImageError
from tests.helpers.fuzz import DEEP, bounded, load, one_line, only, refused

CONFIG_NAMES = ("quickstart:test", "ct_vitb16", "eval:test", "finetune:test", "tune_my_images:test")


MODEL = load("quickstart:test").model
KEYS = {name: list(configs.flat(load(name))) for name in CONFIG_NAMES}
NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.integers(0, 70).map(lambda power: str(2**power)),
    st.sampled_from(["1e999", "-1e999", "1e999-1e999", "5e-324", "9" * 5000, "0x" + "f" * 5000]),
)
VALUES = st.one_of(
    NUMBERS,
    st.lists(NUMBERS, max_size=3).map(lambda found: f"({','.join(found)},)"),
    st.sampled_from([
        "", "None", "True", "()", "[1]", "{}", "{[]:1}", "((1,2),(3,))", "('a',)", "([],)", "b'a'",
        "(None,None)", "(" * 300, "-" * 10_000 + "1", "+" * 3000 + "1", DEEP, "x" * 5000, "a\nb",
        "\0", "\ud800", "\u00b2", "folder", "tfds", "random", "/dev/zero", "1+1j", "1_0", "nan%",
    ]),
    st.text(max_size=20),
)  # fmt: skip


@st.composite
def overrides(draw):
    """A config, and some overrides of it: mostly of keys that it has."""
    name = draw(st.sampled_from(CONFIG_NAMES))
    key = st.sampled_from(KEYS[name])
    near = st.tuples(key, st.text(max_size=3)).map("".join) | st.text() | st.just("x" * 100_000)
    known = st.tuples(key, VALUES).map("=".join)
    strange = st.tuples(near, VALUES).map("=".join) | near
    return name, draw(st.lists(known, max_size=2)) + draw(st.lists(known | strange, max_size=1))


def planned(name, changes):
    """As a dry run and a run check a config; with a model, which some take from a run."""
    config = load(name, *changes)
    if "model" not in config:
        with config.unlocked():
            config.model = MODEL
    pipeline.check_stages(config)
    pipeline.check(config, 1)
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline.dry_run(config)


@bounded(250)
@given(overrides())
@example(("quickstart:test", ["ct.epochs=" + "-" * 10_000 + "1"]))
@example(("quickstart:test", ["ct.epochs=" + "+" * 3000 + "1"]))
@example(("quickstart:test", ["ct.epochs=a\nb"]))
@example(("quickstart:test", ["ct.epochs=0x" + "f" * 5000]))
@example(("quickstart:test", ["ct.epochs=1000000000000"]))
@example(("quickstart:test", ["ct.epochs=2000000000"]))
@example(("quickstart:test", ["ct.base_lr=" + "9" * 400]))
@example(("quickstart:test", ["ct.base_lr=1e300"]))
@example(("quickstart:test", ["checkpoint.best=" + "9" * 5000]))
@example(("quickstart:test", ["ct.queue_size=1000000000000000"]))
@example(("quickstart:test", ["model.width=1000000000"]))
@example(("quickstart:test", ["mae.decoder.width=1000000000"]))
@example(("quickstart:test", ["model.image_size=(1000000000,1000000000)"]))
@example(("quickstart:test", ["eval.lowshot.lists=(1,None)"]))
@example(("quickstart:test", [f"eval.lowshot.lists=('{'x' * 300}',)"]))
@example(("quickstart:test", ["eval.cluster.subsets=([],)"]))
@example(("quickstart:test", ["data.mean=(1e999,)"]))
@example(("ct_vitb16", ["model.depth=1000000000"]))
@example(("ct_vitb16", ["ct.layer_decay=1e300"]))
@example(("ct_vitb16", ["model.patch_size=1"]))
@example(("ct_vitb16", ["init_from=" + "x" * 5000]))
@example(("finetune:test", ["finetune.images=/dev/zero"]))
def test_overrides_are_planned_or_refused_in_a_line(case):
    with one_line():
        planned(*case)


def encoded(kind, **options):
    with io.BytesIO() as file:
        ramp = np.add.outer(np.arange(40), np.arange(30)).astype(np.uint8)
        Image.fromarray(np.stack([ramp] * 3, -1)).save(file, kind, **options)
        return file.getvalue()


KINDS = [
    encoded("JPEG"), encoded("JPEG", progressive=True), encoded("PNG"), encoded("GIF"),
    encoded("TIFF", compression="tiff_lzw"), encoded("WebP"), encoded("BMP"),
]  # fmt: skip
# Sides as their headers claim: 2^31 - 1, no pixel at all, and just below what Pillow warns of.
CLAIMS = [
    KINDS[2][:16] + claim + KINDS[2][24:]
    for claim in (b"\x7f\xff\xff\xff" * 2, bytes(8), b"\0\0\x24\0" * 2)
] + [KINDS[3][:6] + claim + KINDS[3][10:] for claim in (b"\xff" * 4, bytes(4))]


@st.composite
def damaged(draw, whole):
    """Bytes of a file: cut short, with bytes changed, or with a piece of another place."""
    raw = bytearray(draw(st.sampled_from(whole)))
    place = st.integers(0, len(raw) - 1)
    for _ in range(draw(st.integers(0, 4))):
        raw[draw(place)] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        start, end = sorted((draw(place), draw(place)))
        raw[start:start] = raw[start : min(end, start + 64)]
    return bytes(raw[: draw(place)] if draw(st.booleans()) else raw)


@bounded(300)
@given(damaged(KINDS) | st.binary(max_size=200))
def test_images_are_read_or_bad(content):
    seen(content)


@pytest.mark.parametrize("content", CLAIMS, ids=["2^31", "none", "large", "gif 2^16", "gif none"])
def test_a_header_may_claim_any_size(content):
    seen(content)


def seen(content):
    for channels in (1, 3):
        with one_line(BadImageError):
            pixels = decode.pixels(content, Decoding(channels))
            assert min(pixels.shape) > 0
            assert (pixels.dtype, pixels.shape[2]) == (np.uint8, channels)
            assert min(decode.shape(content, Decoding(channels))) > 0
    crops = (Crops((8, 8), (0.2, 1.0), 1), Crops((4, 6), (0.05, 0.25), 2))
    with one_line():  # no other image can replace the only one
        make = loader.TrainRecord(only(content), Decoding(3), crops, (0,), scaled_jpeg=True)
        example = make((0, 0))
        assert example["image"].shape == (1, 8, 8, 3)
        assert example["local"].shape == (2, 4, 6, 3)
    assert loader.EvalRecord(only(content), Decoding(3), (8, 8), 8)(0)["image"].shape == (8, 8, 3)


def npz(**found):
    with io.BytesIO() as file:
        np.savez_compressed(file, **found)
        return file.getvalue()


PIXELS = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
FILE = np.frombuffer(KINDS[0], np.uint8)
WHOLE = [
    npz(image=PIXELS, label=[0, 1, 2], names=["a", "b", "c"], is_test=[0, 0, 1]),
    npz(blob=np.tile(FILE, 2), offsets=np.arange(3) * len(FILE)),
]
ODD = [  # arrays that are not images, or impossible labels
    npz(image=PIXELS, label=[0, 1, 2**31 - 1]),
    npz(image=PIXELS, label=np.uint64([0, 1, 2**63])),
    npz(image=PIXELS, names=5),
    npz(image=PIXELS, names=[b"a", b"b"]),
    npz(image=PIXELS[:, :0]),
    npz(blob=FILE, offsets=7),
    npz(blob=FILE, offsets=[0, -5, 2**62]),
    npz(blob=np.float64(3), offsets=[0, 1]),
    npz(blob=FILE, offsets=np.zeros((2, 2), int)),
]


@bounded(200)
@given(content=damaged(WHOLE) | st.binary(max_size=100))
def test_a_file_of_arrays_is_read_or_refused(tmp_path, content):
    arrays_of(tmp_path, content)


@pytest.mark.parametrize("content", ODD)
def test_a_file_of_other_arrays_is_refused(tmp_path, content):
    assert arrays_of(tmp_path, content) is None


def arrays_of(tmp_path, content):
    path = tmp_path / "images.npz"
    path.write_bytes(content)
    with one_line():
        found = arrays.npz(str(path), "train", Decoding(1))
        assert found.images.dtype == np.uint8
        assert len(sources.labels_digest(found)) == 16
        return found


@bounded(100)
@given(lines=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8")))
@example(lines=b"a\0b")
@example(lines=b".")
def test_a_list_of_names_is_read_or_refused(tmp_path, lines):
    path = tmp_path / "list.txt"
    path.write_bytes(lines)
    with one_line():
        subsets.from_list(str(path), ["a/1.png", "a/2.png"])


def test_an_endless_list_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / ("x" * 300), "/dev/zero"):
        with refused("cannot be read"):
            subsets.from_list(str(path), ["a"])
