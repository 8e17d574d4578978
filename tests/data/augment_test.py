"""Device-side views against Pillow and colorsys."""

import colorsys
import dataclasses
import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats

from maect_jax import sharding
from maect_jax.data import augment, transforms
from maect_jax.data.augment import Photometric, Recipe
from tests.helpers.common import mesh_of


@pytest.fixture
def picture(rng):
    """A smooth picture, mostly red, 40 x 32, as uint8."""
    small = Image.fromarray(rng.integers(0, (256, 160, 80), (6, 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((40, 32), Image.Resampling.BICUBIC))


@pytest.fixture
def x(picture):
    """The same as the device has it: float32 `[C, H, W]` in [0, 1]."""
    return jnp.moveaxis(jnp.asarray(picture / 255, jnp.float32), -1, 0)


def channels_last(x):
    """uint8's range `[H, W, C]` of planes in [0, 1]."""
    return np.moveaxis(np.asarray(x), 0, -1) * 255


def pillow(image, box, size):
    """Pillow's crop and bicubic resize."""
    top, left, height, width = (int(side) for side in box)
    cut = Image.fromarray(image).crop((left, top, left + width, top + height))
    return np.asarray(cut.resize(size[::-1], Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(224, 224), (28, 21)])
@pytest.mark.parametrize("channels", [1, 3])
def test_host_crops_equal_pillows(rng, size, channels):
    """To one of 255 values on average, on noise, for boxes of all sizes."""
    image = rng.integers(0, 256, (384, 512, channels), dtype=np.uint8)
    for _ in range(40):
        box = transforms.random_crop_box(rng, image.shape[:2], (0.01, 1.0))
        got = transforms.crop_resize(image, box, size).astype(int)
        expected = pillow(image if channels == 3 else image[..., 0], box, size)
        assert got.shape == (*size, channels)
        assert np.abs(got - expected.reshape(got.shape)).mean() < 1


@pytest.mark.parametrize("box", [(3, 5, 20, 30), (0, 0, 32, 40), (10, 11, 4, 3), (31, 39, 1, 1)])
@pytest.mark.parametrize("size", [(16, 16), (28, 21)])
def test_device_crop_equals_pillow(picture, box, size):
    crop = jax.jit(augment.crop_resize, static_argnums=2)
    got = crop(jnp.moveaxis(picture, -1, 0), jnp.asarray(box), size)
    expected = pillow(picture, box, size).astype(np.float32)
    difference = np.abs(np.moveaxis(np.asarray(got), 0, -1) - expected)
    assert difference.max() <= 1  # Pillow's fixed-point weights may round the other way
    assert difference.mean() < 0.02


BRIGHTNESS, CONTRAST, SATURATION = range(3)


def test_adjustments_equal_pillow(picture, x):
    """Within what Pillow loses: it rounds the luma (1/2) and cuts a blend to whole values (1)."""
    source = Image.fromarray(picture)
    pairs = [
        (augment.blend(x, BRIGHTNESS, 1.3), ImageEnhance.Brightness(source).enhance(1.3), 1.0),
        (augment.blend(x, CONTRAST, 0.6), ImageEnhance.Contrast(source).enhance(0.6), 1 + 0.4 / 2),
        (augment.blend(x, SATURATION, 1.2), ImageEnhance.Color(source).enhance(1.2), 1 + 0.2 / 2),
        (augment.solarize(x, 128), ImageOps.solarize(source, 128), 0.0),
        (jnp.broadcast_to(augment.to_gray(x), x.shape), source.convert("L").convert("RGB"), 0.5),
    ]
    for got, expected, bound in pairs:
        difference = np.abs(channels_last(got) - np.asarray(expected, np.float32))
        assert difference.max() <= bound + 1e-3


@pytest.mark.parametrize("shift", [0.07, -0.1, 0.5])
def test_hue_equals_colorsys(picture, x, shift):
    got = channels_last(augment.adjust_hue(x, shift)) / 255
    for row, col in itertools.product(range(0, 32, 5), range(0, 40, 5)):
        h, s, v = colorsys.rgb_to_hsv(*(picture[row, col] / 255.0))
        expected = colorsys.hsv_to_rgb((h + shift) % 1, s, v)
        np.testing.assert_allclose(got[row, col], expected, atol=1e-5)


def test_compiled_colours_are_those_of_single_operations(rng):
    """Compiled code may compute the same value twice, with a difference in its last bit."""
    pictures = jnp.asarray(rng.integers(0, 256, (8, 3, 48, 48)) / 255, jnp.float32)
    keys = jax.random.split(jax.random.key(4), 8)
    colour = partial(augment.colour_jitter, recipe=Photometric(brightness=0.4, hue=0.1))
    optimised = {"xla_backend_optimization_level": 3}  # other tests do without
    together = jax.jit(jax.vmap(colour), compiler_options=optimised)(pictures, keys)
    with jax.disable_jit():
        single = [colour(picture, key) for picture, key in zip(pictures, keys, strict=True)]
    np.testing.assert_allclose(together, single, atol=1e-5)


def test_jitter_takes_each_order_as_often(monkeypatch):
    """Each operation writes down its number, in base 5."""
    with monkeypatch.context() as patch:
        patch.setattr(
            augment, "blend", lambda x, kind, factor: jnp.where(factor == 1, x, 5 * x + 1 + kind)
        )
        patch.setattr(augment, "adjust_hue", lambda x, shift: 5 * x + 4)
        keys = jax.random.split(jax.random.key(0), 4800)
        recipe = Photometric()
        jitter = jax.vmap(lambda key: augment.colour_jitter(jnp.float32(0), key, recipe))
        found = jax.jit(jitter)(keys)
    orders, counts = np.unique(np.asarray(found, int), return_counts=True)
    expected = {int("".join(order), 5) for order in itertools.permutations("1234")}
    assert set(orders.tolist()) == expected
    assert stats.chisquare(counts).pvalue > 1e-3


def test_strengths_are_uniform(monkeypatch):
    """Of the factors and the shift that the jitter draws, the blur's sigma, and the coins."""
    monkeypatch.setattr(
        augment, "blend", lambda x, kind, factor: x.at[kind].add(jnp.where(factor == 1, 0, factor))
    )
    monkeypatch.setattr(augment, "adjust_hue", lambda x, shift: x.at[3].set(shift))
    recipe = Photometric(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    keys = jax.random.split(jax.random.key(1), 2000)
    jitter = jax.vmap(lambda key: augment.colour_jitter(jnp.zeros(4), key, recipe))
    found = jax.jit(jitter)(keys)
    drawn = [(values, low, high) for values, low, high in zip(
        np.asarray(found).T, (0.6, 0.7, 0.8, -0.1), (1.4, 1.3, 1.2, 0.1), strict=True)]  # fmt: skip
    monkeypatch.setattr(augment, "gaussian_blur", lambda x, sigma: x + sigma)
    blurred = Photometric(blur=1.0, blur_sigma=(0.1, 2.0))
    sigmas = jax.vmap(lambda key: augment.photometric(jnp.float32(0), key, blurred))(keys)
    for values, low, high in [*drawn, (np.asarray(sigmas), 0.1, 2.0)]:
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3
    some = Photometric(blur=0.3, blur_sigma=(1.0, 1.0))
    share = jax.vmap(lambda key: augment.photometric(jnp.float32(0), key, some))(keys).mean()
    np.testing.assert_allclose(share, 0.3, atol=0.03)


def test_device_boxes_are_drawn_as_the_hosts_are(rng):
    """The same distributions of place, size and ratio, by a Kolmogorov-Smirnov test of each."""
    for shape, scale in (((32, 32), (0.08, 1.0)), ((300, 400), (0.2, 1.0)), ((20, 90), (0.5, 1.0))):
        keys = jax.random.split(jax.random.key(2), 4000)
        draw = jax.jit(jax.vmap(lambda key: augment.random_crop_box(key, shape, scale)))  # noqa: B023
        got = np.asarray(draw(keys))
        expected = np.array([transforms.random_crop_box(rng, shape, scale) for _ in range(4000)])
        for ours, hosts in zip(got.T, expected.T, strict=True):
            assert stats.ks_2samp(ours, hosts).pvalue > 1e-3
        ours, hosts = (drawn[:, 3] / drawn[:, 2] for drawn in (got, expected))
        assert stats.ks_2samp(ours, hosts).pvalue > 1e-3
        assert (got[:, :2] >= 0).all()
        assert (got[:, :2] + got[:, 2:] <= shape).all()
    box = augment.random_crop_box(jax.random.key(0), (10, 100), (1.0, 1.0))
    assert box.tolist() == [0, 43, 10, 13]  # none of ten fits


def test_blur_is_gaussian(picture, x):
    impulse = jnp.zeros((1, 33, 33)).at[0, 16, 16].set(1)
    blur = jax.jit(augment.gaussian_blur)
    got = blur(impulse, 1.5)[0]
    offsets = np.arange(-16, 17)
    line = np.exp(-(offsets**2) / (2 * 1.5**2)) * (np.abs(offsets) <= 8)
    line /= line.sum()
    np.testing.assert_allclose(got, np.outer(line, line), atol=1e-6)
    # Pillow approximates the Gaussian by box filters.
    expected = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.5)))
    assert np.abs(channels_last(blur(x, 1.5)) - expected).mean() < 1
    # Beyond its edges an image goes on as it ends.
    wide = jnp.pad(x, ((0, 0), (8, 8), (8, 8)), mode="edge")
    inner = blur(wide, 2.0)[:, 8:-8, 8:-8]
    np.testing.assert_allclose(blur(x, 2.0), inner, atol=1e-6)


def test_each_view_keeps_its_own_recipe(picture, x):
    colours = (Photometric(grayscale=1.0), Photometric(solarize=1.0))
    recipe = Recipe((32, 40), (1.0, 1.0), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), colours)
    images = np.broadcast_to(picture, (2, 2, *picture.shape))
    batch = {"image": images, "seed": np.arange(4, dtype=np.uint32).reshape(2, 2)}
    views = jax.jit(lambda batch: augment.views(batch, recipe))(batch)
    got = views * jnp.array(recipe.std) + jnp.array(recipe.mean)
    gray = channels_last(jnp.broadcast_to(augment.to_gray(x), x.shape)) / 255
    solarized = channels_last(augment.solarize(x, 128)) / 255
    np.testing.assert_allclose(got[:, 0], [gray] * 2, atol=1e-5)
    np.testing.assert_allclose(got[:, 1], [solarized] * 2, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_views_depend_on_the_images_seed_alone(picture, whole):
    """Not on the row, the number of devices, or how many images a device has."""
    colour = Photometric(jitter=0.8, blur=0.5, grayscale=0.2, solarize=0.2)
    recipe = Recipe((32, 40), (0.08, 1.0), (0.0,) * 3, (1.0,) * 3, (colour, Photometric()))
    seeds = np.random.default_rng(1).integers(0, 2**32, (8, 2), dtype=np.uint32)
    images = np.broadcast_to(picture, (8, *((2,) * (not whole)), *picture.shape))
    program = jax.jit(lambda batch: augment.views(batch, recipe))

    def views(rows, devices=1):
        mesh = mesh_of(devices, 1)
        batch = sharding.put_batch({"image": images[rows], "seed": seeds[rows]}, mesh)
        with jax.set_mesh(mesh):
            return np.asarray(program(batch))

    together, backwards = views(slice(None)), slice(None, None, -1)
    np.testing.assert_allclose(views(backwards)[backwards], together, atol=1e-6)
    np.testing.assert_allclose(views(slice(None), 8), together, atol=1e-6)
    different = together.reshape(16, -1) if whole else together[:, 0].reshape(8, -1)
    assert len(np.unique(different.round(3), axis=0)) >= 0.85 * len(different)


def test_devices_send_each_other_nothing_to_make_views(picture):
    colour = Photometric(jitter=0.8, blur=0.5, grayscale=0.2, solarize=0.2)
    recipe = Recipe((16, 16), (0.08, 1.0), (0.0,) * 3, (1.0,) * 3, (colour, Photometric()))
    mesh = mesh_of(4, 2)
    whole = {"image": np.stack([picture] * 8), "seed": np.zeros((8, 2), np.uint32)}
    cut = whole | {"image": np.zeros((8, 2, 16, 16, 3), np.uint8)}
    for batch in (whole, cut):
        with jax.set_mesh(mesh):
            views = jax.jit(lambda batch: augment.views(batch, recipe))
            program = views.lower(sharding.put_batch(batch, mesh)).compile().as_text()
        assert not re.findall(r"all-\w+|reduce-scatter|collective-\w+", program)


@pytest.mark.parametrize("whole", [True, False])
def test_views_of_a_second_size_are_the_further_ones_of_an_image(picture, whole):
    """No two views share random numbers, of whichever size they are."""
    colour = Photometric(blur=1.0, solarize=0.5)
    every = Recipe((32, 40), (0.2, 0.6), (0.0,) * 3, (1.0,) * 3, (Photometric(), *[colour] * 4))
    further = dataclasses.replace(every, photometric=every.photometric[2:], field="local", first=2)
    seeds = np.arange(8, dtype=np.uint32).reshape(4, 2)
    images = np.broadcast_to(picture, (4, *((5,) * (not whole)), *picture.shape))
    five = jax.jit(lambda batch: augment.views(batch, every))({"image": images, "seed": seeds})
    batch = {"image": images if whole else images[:, :2], "seed": seeds}
    batch |= {} if whole else {"local": images[:, 2:]}
    three = jax.jit(lambda batch: augment.views(batch, further))(batch)
    np.testing.assert_allclose(three, five[:, 2:], atol=1e-6)
    distinct = np.asarray(five[:, 1:]).reshape(16, -1).round(3)
    assert len(np.unique(distinct, axis=0)) == 16
    small = dataclasses.replace(further, size=(16, 8), crop_scale=(0.05, 0.25))
    batch |= {} if whole else {"local": images[:, 2:, :16, :8]}
    views, backwards = jax.jit(lambda batch: augment.views(batch, small)), slice(None, None, -1)
    got = views(batch)
    assert (got.shape, got.dtype) == ((4, 3, 16, 8, 3), "float32")
    other = views({key: x[backwards] for key, x in batch.items()})  # another batch of these images
    np.testing.assert_allclose(other[backwards], got, atol=1e-6)


def test_gray_images_pass_every_operation(rng):
    x = jnp.asarray(rng.random((1, 8, 8)), jnp.float32)
    colour = Photometric(jitter=1.0, blur=1.0, grayscale=1.0, solarize=1.0)
    out = jax.jit(partial(augment.photometric, recipe=colour))(x, jax.random.key(0))
    assert out.shape == x.shape
    assert jnp.isfinite(out).all()


def test_whole_images_are_cut_and_flipped(picture):
    """A view is the crop of a box that may be drawn, or its mirror image; both occur."""
    recipe = Recipe((16, 16), (0.2, 1.0), (0.0,) * 3, (1.0,) * 3, (Photometric(), Photometric()))
    seeds = np.arange(16, dtype=np.uint32).reshape(8, 2)
    views = jax.jit(lambda batch: augment.views(batch, recipe))
    got = views({"image": np.stack([picture] * 8), "seed": seeds})
    box_of = jax.jit(lambda key: augment.random_crop_box(key, picture.shape[:2], (0.2, 1.0)))
    flipped = []
    for image, seed in zip(np.asarray(got) * 255, seeds, strict=True):
        for v, view in enumerate(image):
            key = jax.random.fold_in(jax.random.wrap_key_data(seed), v)
            box_key = jax.random.split(jax.random.split(key)[0])[0]
            box = box_of(box_key)
            cut = pillow(picture, box, (16, 16)).astype(float)
            errors = [np.abs(view - cut).max(), np.abs(view - cut[:, ::-1]).max()]
            assert min(errors) < 1.01
            flipped.append(errors[1] < errors[0])
    assert 3 <= sum(flipped) <= 13
