"""Crops, colours and boxes against torchvision (extra [peers]); skipped without it.

Its float tensors have the same definitions, its Pillow images lose what whole values lose.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from maect_jax.data import augment, transforms

torch = pytest.importorskip("torch")
v2 = pytest.importorskip("torchvision.transforms.v2")
F = v2.functional


@pytest.fixture
def pictures(rng):
    """Eight smooth colour pictures, 48 x 64, as uint8."""
    small = rng.integers(0, 256, (8, 6, 8, 3), dtype=np.uint8)
    sized = [Image.fromarray(x).resize((64, 48), Image.Resampling.BICUBIC) for x in small]
    return np.stack([np.asarray(x) for x in sized])


# Ours, torchvision's, and the bounds in 255ths: the largest difference from its float tensors, and
# the mean difference from its Pillow images.
COLOURS = {
    "brighter": (lambda x: augment.blend(x, 0, 1.4), lambda x: F.adjust_brightness(x, 1.4), 0.5),
    "darker": (lambda x: augment.blend(x, 0, 0.6), lambda x: F.adjust_brightness(x, 0.6), 0.5),
    "contrast": (lambda x: augment.blend(x, 1, 1.4), lambda x: F.adjust_contrast(x, 1.4), 0.6),
    "less contrast": (lambda x: augment.blend(x, 1, 0.6), lambda x: F.adjust_contrast(x, 0.6), 0.6),
    "saturation": (lambda x: augment.blend(x, 2, 1.2), lambda x: F.adjust_saturation(x, 1.2), 0.6),
    "paler": (lambda x: augment.blend(x, 2, 0.8), lambda x: F.adjust_saturation(x, 0.8), 0.6),
    "hue": (lambda x: augment.adjust_hue(x, 0.1), lambda x: F.adjust_hue(x, 0.1), 1.5),
    "hue back": (lambda x: augment.adjust_hue(x, -0.1), lambda x: F.adjust_hue(x, -0.1), 1.5),
    "gray": (
        lambda x: jnp.broadcast_to(augment.to_gray(x), x.shape),
        lambda x: F.rgb_to_grayscale(x, 3), 0.3,
    ),
    "solarize": (
        lambda x: augment.solarize(x, 128),
        lambda x: F.solarize(x, 128 / 255 if isinstance(x, torch.Tensor) else 128), 1e-3,
    ),
    "blur": (
        lambda x: augment.gaussian_blur(x, 1.3), lambda x: F.gaussian_blur(x, [17, 17], [1.3, 1.3]),
        0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "bound"), COLOURS.values(), ids=COLOURS.keys())
def test_colours_equal_torchvisions(pictures, ours, theirs, bound):
    for picture in pictures:
        planes = np.moveaxis(picture, -1, 0) / np.float32(255)
        got = np.asarray(ours(jnp.asarray(planes))) * 255
        exact = theirs(torch.tensor(planes)).numpy() * 255
        blurred_edge = 8 if ours is COLOURS["blur"][0] else 0  # torchvision mirrors the picture
        inner = (slice(None),) + (slice(blurred_edge, -blurred_edge or None),) * 2
        # Its luma has weights of four digits, which ours are not.
        np.testing.assert_allclose(got[inner], exact[inner], atol=0.05)
        whole = np.moveaxis(np.asarray(theirs(Image.fromarray(picture))), -1, 0)
        assert np.abs(got[inner] - whole[inner]).mean() < bound


def test_normalise_equals_torchvisions(pictures):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    tensors = F.normalize(torch.tensor(pictures).permute(0, 3, 1, 2) / 255, mean, std)
    got = np.moveaxis(np.asarray(augment.normalise_pixels(pictures, mean, std)), -1, 1)
    np.testing.assert_allclose(got, tensors.numpy(), atol=1e-6)


SHAPES = [((375, 500), (0.08, 1.0)), ((32, 32), (0.2, 1.0)), ((40, 300), (0.3, 1.0))]


@pytest.mark.parametrize(("shape", "scale"), SHAPES)
def test_boxes_are_drawn_as_torchvision_draws_them(rng, shape, scale):
    """On the host and on the device: Kolmogorov-Smirnov tests of place, size and ratio."""
    crop, image = v2.RandomResizedCrop(8, scale), torch.zeros(3, *shape)
    torch.manual_seed(0)
    keys = ("top", "left", "height", "width")
    drawn = [crop.make_params([image]) for _ in range(4000)]
    theirs = np.array([[params[key] for key in keys] for params in drawn])
    host = np.array([transforms.random_crop_box(rng, shape, scale) for _ in range(4000)])
    draw = jax.vmap(lambda key: augment.random_crop_box(key, shape, scale))
    device = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    for ours in (host, device):
        for one, other in zip(ours.T, theirs.T, strict=True):
            assert stats.ks_2samp(one, other).pvalue > 1e-3
        one, other = (drawn[:, 3] / drawn[:, 2] for drawn in (ours, theirs))
        assert stats.ks_2samp(one, other).pvalue > 1e-3


@pytest.mark.parametrize("shape", [(384, 512), (301, 299), (503, 375), (60, 41)])
def test_crops_equal_torchvisions(rng, shape):
    """For a given box, and in evaluation, to a hundredth of 255 on average, on photograph-like
    smoothness, and to one on noise."""
    noise = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((shape[1] // 10, shape[0] // 10)).resize(shape[::-1])
    evaluate = v2.Compose([
        v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])  # fmt: skip
    for image, bound in ((noise, 1.0), (np.asarray(smooth), 0.05)):
        box = transforms.random_crop_box(rng, shape, (0.08, 1.0))
        pairs = [(
            transforms.crop_resize(image, box, (224, 224)),
            F.resized_crop(Image.fromarray(image), *box, [224, 224], v2.InterpolationMode.BICUBIC),
        ), (
            transforms.centre_crop(image, 256, (224, 224)), evaluate(Image.fromarray(image))
        )]  # fmt: skip
        for got, expected in pairs:
            assert np.abs(got.astype(int) - np.asarray(expected)).mean() < bound
