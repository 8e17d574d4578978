"""Device-side views against Pillow and colorsys."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from maect_jax.data import augment, transforms
from maect_jax.data.augment import Photometric, Recipe


@pytest.fixture
def picture(rng):
    """A smooth colour picture, 40 x 32, as uint8."""
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((40, 32), Image.Resampling.BICUBIC))


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
    got = augment.crop_resize(jnp.asarray(picture), jnp.asarray(box), size)
    expected = pillow(picture, box, size).astype(np.float32)
    difference = np.abs(np.asarray(got) - expected)
    assert difference.max() <= 1  # Pillow's fixed-point weights may round the other way
    assert difference.mean() < 0.02


def test_adjustments_equal_pillow(picture):
    """Within what Pillow loses: it rounds the luma (1/2) and cuts a blend to whole values (1)."""
    x, source = jnp.asarray(picture / 255.0, jnp.float32), Image.fromarray(picture)
    pairs = [
        (augment.adjust_brightness(x, 1.3), ImageEnhance.Brightness(source).enhance(1.3), 1.0),
        (augment.adjust_contrast(x, 0.6), ImageEnhance.Contrast(source).enhance(0.6), 1 + 0.4 / 2),
        (augment.adjust_saturation(x, 1.2), ImageEnhance.Color(source).enhance(1.2), 1 + 0.2 / 2),
        (augment.solarize(x, 128), ImageOps.solarize(source, 128), 0.0),
        (jnp.broadcast_to(augment.to_gray(x), x.shape), source.convert("L").convert("RGB"), 0.5),
    ]
    for got, expected, bound in pairs:
        difference = np.abs(np.asarray(got) * 255 - np.asarray(expected, np.float32))
        assert difference.max() <= bound + 1e-3


def test_hue_equals_colorsys(picture):
    got = augment.adjust_hue(jnp.asarray(picture / 255.0, jnp.float32), 0.07)
    for row, col in ((0, 0), (13, 22), (31, 39), (20, 5)):
        h, s, v = colorsys.rgb_to_hsv(*(picture[row, col] / 255.0))
        expected = colorsys.hsv_to_rgb((h + 0.07) % 1, s, v)
        np.testing.assert_allclose(got[row, col], expected, atol=1e-5)


def test_blur_is_gaussian(picture):
    x = jnp.asarray(picture / 255.0, jnp.float32)
    impulse = jnp.zeros((33, 33, 1)).at[16, 16].set(1)
    got = augment.gaussian_blur(impulse, 1.5)[..., 0]
    offsets = np.arange(-16, 17)
    line = np.exp(-(offsets**2) / (2 * 1.5**2)) * (np.abs(offsets) <= 8)
    line /= line.sum()
    np.testing.assert_allclose(got, np.outer(line, line), atol=1e-6)
    # Pillow approximates the Gaussian by box filters.
    expected = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.5)))
    assert np.abs(np.asarray(augment.gaussian_blur(x, 1.5)) * 255 - expected).mean() < 1


def test_each_view_keeps_its_own_recipe(picture):
    colours = (Photometric(grayscale=1.0), Photometric(solarize=1.0))
    recipe = Recipe((32, 40), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), colours)
    views = np.broadcast_to(picture, (2, 2, *picture.shape))
    batch = {"image": views, "seed": np.arange(4, dtype=np.uint32).reshape(2, 2)}
    got = augment.views(batch, recipe) * jnp.array(recipe.std) + jnp.array(recipe.mean)
    x = jnp.asarray(picture / 255.0)
    gray = jnp.broadcast_to(augment.to_gray(x), x.shape)
    np.testing.assert_allclose(got[:, 0], [gray] * 2, atol=1e-5)
    np.testing.assert_allclose(got[:, 1], [augment.solarize(x, 128)] * 2, atol=1e-5)


def test_views_depend_on_the_images_seed_alone(picture):
    colour = Photometric(jitter=0.8, blur=0.5, grayscale=0.2, solarize=0.2)
    recipe = Recipe((32, 40), (0.0,) * 3, (1.0,) * 3, (colour, colour))
    seeds = np.random.default_rng(1).integers(0, 2**32, (6, 2), dtype=np.uint32)
    views = np.broadcast_to(picture, (6, 2, *picture.shape))
    together = augment.views({"image": views, "seed": seeds}, recipe)
    reversed_ = augment.views({"image": views, "seed": seeds[::-1]}, recipe)
    np.testing.assert_allclose(together, reversed_[::-1], atol=1e-6)
    flat = np.asarray(together).reshape(12, -1)
    assert len(np.unique(flat.round(3), axis=0)) >= 10  # views differ, between images and within


def test_gray_images_pass_every_operation(rng):
    x = jnp.asarray(rng.random((8, 8, 1)), jnp.float32)
    colour = Photometric(jitter=1.0, blur=1.0, grayscale=1.0, solarize=1.0)
    out = augment.photometric(x, jax.random.key(0), colour)
    assert out.shape == x.shape
    assert jnp.isfinite(out).all()


def test_whole_images_are_cut_and_flipped(picture):
    recipe = Recipe((16, 16), (0.0,) * 3, (1.0,) * 3, (Photometric(), Photometric()))
    boxes = np.array([[[3, 5, 20, 30], [0, 0, 32, 40]]], np.int32)
    batch = {
        "image": picture[None],
        "box": boxes,
        "flip": np.array([[False, True]]),
        "seed": np.zeros((1, 2), np.uint32),
    }
    got = augment.views(batch, recipe)[0] * 255
    first = pillow(picture, boxes[0, 0], (16, 16))
    second = pillow(picture, boxes[0, 1], (16, 16))[:, ::-1]
    np.testing.assert_allclose(got, np.stack([first, second]), atol=1.01)
