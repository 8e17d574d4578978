"""Bounds of the property and fuzz tests, and how an input is refused."""

import contextlib
import time
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from maect_jax import config as configs
from maect_jax.data import arrays
from maect_jax.errors import RunFailedError, UserError
from tests.helpers import CONFIGS


def only(content):
    """A source of one image, given as a file's content."""
    source = arrays.Arrays(np.zeros((1, 1, 1, 3), np.uint8), np.zeros(1), [])
    source.images, source.shape = [content], None
    return source


SLOWEST = 10  # seconds, of a plan on a machine that does something else as well


DEEP = "[" * 3000 + "]" * 3000


def bounded(examples):
    """The same draws in every session: `examples`, or as many as the profile allows."""
    return settings(
        max_examples=min(examples, settings.default.max_examples),
        deadline=None,
        derandomize=True,
        suppress_health_check=(HealthCheck.function_scoped_fixture, HealthCheck.too_slow),
    )


def assert_clear(text):
    assert text.strip()
    assert text.isprintable(), text
    assert len(text) < 2000


@contextlib.contextmanager
def one_line(kinds=(UserError, RunFailedError)):
    """What works passes, and so does one clear line."""
    start = time.monotonic()
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            yield
    except kinds as error:
        assert_clear(str(error))
    assert time.monotonic() - start < SLOWEST


@contextlib.contextmanager
def refused(match):
    """Nothing passes but one clear line."""
    with pytest.raises(UserError, match=match) as found:
        yield
    assert_clear(str(found.value))


def load(name, *overrides):
    stem, _, argument = name.partition(":")
    return configs.load(f"{CONFIGS / stem}.py" + (f":{argument}" if argument else ""), overrides)
