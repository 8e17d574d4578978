"""RandAugment against timm's, operation by operation and as a whole."""

import random

import numpy as np
import pytest
from PIL import Image

from maect_jax.data import randaugment

auto_augment = pytest.importorskip("timm.data.auto_augment")
FILL = (124, 116, 104)
MEAN = (0.485, 0.456, 0.406)


def picture(rng, channels, shape=(23, 31)):
    """Smooth colours and some noise, which is what every operation changes."""
    ramp = np.linspace(20, 200, shape[0] * shape[1] * channels).reshape(*shape, channels)
    found = np.clip(ramp + rng.normal(0, 12, ramp.shape), 0, 255).astype(np.uint8)
    found[0, 0] = 255
    return found


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_every_operation_equals_timms(rng, monkeypatch, name, channels):
    pixels = picture(rng, channels)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    colour = FILL[0] if channels == 1 else FILL
    results = []
    signs = (1, -1) if name in randaugment._TWO_WAYS else (1,)
    for sign in signs:
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda v, sign=sign: sign * v)
        for magnitude in (0.0, 1.0, 4.3, 7.5, 8.9, 10.0):
            for resample in randaugment._RESAMPLING:
                hparams = dict(img_mean=colour, interpolation=resample)
                if name == "PosterizeIncreasing" and magnitude == 10:  # see the test below
                    continue
                want = auto_augment.AugmentOp(name, 1.0, magnitude, hparams)(image)
                filling = dict(resample=resample, fillcolor=colour)
                got = randaugment.OPERATIONS[name](image, sign * magnitude / 10, filling)
                np.testing.assert_array_equal(np.asarray(got), np.asarray(want), str(magnitude))
                results.append(np.asarray(got).tobytes())
    # Not the same whatever the magnitude, but where timm ignores it or there is no colour.
    constant = name in ("AutoContrast", "Equalize", "Invert")
    constant |= name == "ColorIncreasing" and channels == 1
    assert (len(set(results)) == 1) == constant


def test_the_highest_level_posterizes_to_black(rng):
    """As with older versions of Pillow; newer ones refuse it."""
    image = Image.fromarray(picture(rng, 3))
    filling = dict(resample=Image.Resampling.BILINEAR, fillcolor=FILL)
    assert not np.asarray(randaugment.OPERATIONS["PosterizeIncreasing"](image, 1.0, filling)).any()


def test_the_operations_are_timms():
    assert sorted(randaugment.OPERATIONS) == sorted(auto_augment._RAND_INCREASING_TRANSFORMS)


def test_draws_are_distributed_as_timms(rng, monkeypatch):
    """How often each operation is applied, and mean and spread of the magnitudes."""
    draws = 6000
    image = Image.fromarray(picture(rng, 3, (4, 4)))
    drawn = {"ours": [], "timm": []}
    for name in randaugment.OPERATIONS:

        def record(image, level, _, name=name):
            drawn["ours"].append((name, abs(level), level < 0))
            return image

        monkeypatch.setitem(randaugment.OPERATIONS, name, record)
    for _ in range(draws):
        randaugment.randaugment(rng, np.asarray(image), MEAN)

    random.seed(0)
    np.random.seed(0)
    theirs = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", dict(img_mean=FILL))
    for op in theirs.ops:
        op.aug_fn = lambda image, *_, **__: image
        op.level_fn = lambda level, _, op=op: drawn["timm"].append((op.name, level / 10)) or ()
    for _ in range(draws):
        theirs(image)
    for name in randaugment.OPERATIONS:
        ours, timm = ([x for x in drawn[who] if x[0] == name] for who in ("ours", "timm"))
        # 400 are expected of each, with a deviation of 20.
        assert abs(len(ours) - 400) < 80
        assert abs(len(timm) - 400) < 80
        levels = np.array([x[1] for x in ours])
        assert levels.max() <= 1
        assert abs(levels.mean() - np.mean([x[1] for x in timm])) < 0.01
        assert abs(levels.std() - np.std([x[1] for x in timm])) < 0.008
        backwards = np.mean([x[2] for x in ours])
        assert abs(backwards - 0.5 * (name in randaugment._TWO_WAYS)) < 0.12


def test_a_crop_keeps_its_shape_and_its_draws_are_the_generators(rng):
    for channels in (1, 3):
        pixels, mean = picture(rng, channels), MEAN[:channels]
        seen = [
            randaugment.randaugment(np.random.default_rng(seed), pixels, mean) for seed in range(30)
        ]
        assert all(x.shape == pixels.shape and x.dtype == np.uint8 for x in seen)
        again = randaugment.randaugment(np.random.default_rng(7), pixels, mean)
        np.testing.assert_array_equal(seen[7], again)
        changed = sum(not np.array_equal(x, pixels) for x in seen)
        assert 12 < changed < 30  # three of four on average
