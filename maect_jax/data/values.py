"""What values that are not 8 bits mean: those of files are checked at the start, in a sample."""

import logging
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np

from maect_jax.data import decode
from maect_jax.data.base import Source
from maect_jax.data.decode import Decoding, Values
from maect_jax.errors import BadImageError, UserError, shown

_SAMPLED = 64  # images of a split
_DARKEST = 32  # what some pixel has in any set of images of 8 bits
_LOGGER = logging.getLogger(__name__)


def check(sources: Iterable[Source], decoding: Decoding) -> None:
    """Checks, in a sample, that the values of images do not become almost nothing when they become
    8 bits. Of images of 8 bits only the headers are read.

    Raises:
      UserError: there are values of 32 bits without `config.data.range`, values of 16 bits that
        fill less than half of what is possible, or none within the range.
    """
    found: dict[tuple[str, int], tuple[str, Values]] = {}
    for source in sources:
        _say_if_colour_is_lost(source, decoding)
        records = np.linspace(0, len(source) - 1, min(len(source), _SAMPLED)).astype(int).tolist()
        with ThreadPoolExecutor() as pool:
            sample = pool.map(partial(_values, source, decoding), records)
        for record, seen in zip(records, sample, strict=True):
            if seen:
                new = source.name(record), seen
                name, known = found.setdefault((seen.mode, seen.possible), new)
                low, high = min(known.low, seen.low), max(known.high, seen.high)
                found[seen.mode, seen.possible] = name, known._replace(low=low, high=high)
    for name, seen in found.values():
        _check(f"{shown(name)}: mode {seen.mode}", seen, decoding.range)


def _say_if_colour_is_lost(source: Source, decoding: Decoding) -> None:
    with suppress(BadImageError, OSError):
        if decoding.channels == 1 and decode.is_coloured(source[0][0], decoding):
            _LOGGER.warning(
                "%s: has colours, and is taken as gray by config.model.channels=1. To keep them, "
                "set --config.model.channels=3, and three numbers each in data.mean and data.std.",
                shown(source.name(0)),
            )


def to_uint8(what: str, array: np.ndarray, bounds: tuple[float, ...]) -> np.ndarray:
    """An array of numbers as pixels.

    Args:
      what: the array, for the error.
      array: of any shape; uint8 is returned unchanged.
      bounds: the values that become 0 and 255; empty for all that uint16 holds.

    Raises:
      UserError: as `check` does; or they are not finite, or uint8 far from 255.
    """
    try:
        low, high = decode.extremes(array)
    except BadImageError as error:
        raise UserError(f"{what}: {error}") from error
    if array.dtype == np.uint8:
        if 0 < high < _DARKEST:
            raise UserError(f"{what}, values {low:g} to {high:g}: must be 0 to 255. Multiply them.")
        return array
    possible = np.iinfo(np.uint16).max if array.dtype == np.uint16 else 0
    _check(what, Values(str(array.dtype), low, high, possible, is_colour=False), bounds)
    return decode.to_8_bits(array, bounds or (0, possible))


def _suggested(low: float, high: float) -> str:
    """How to set `config.data.range` for values from `low` to `high`."""
    if low >= 0:  # all that so many bits hold; of fractions, 1
        low, high = 0, 2 ** math.ceil(math.log2(high + 1)) - 1 if high > 1 else 1
    return f'--config.data.range="({low:.10g},{high:.10g})"'


def _values(source: Source, decoding: Decoding, record: int) -> Values | None:
    try:
        return decode.values(source[record][0], decoding)
    except (BadImageError, OSError):  # counted where it is used
        return None


def _check(what: str, seen: Values, bounds: tuple[float, ...]) -> None:
    """Raises `UserError` if the values `seen` do not fit the `bounds` that the user sets, or may
    not fit those of the file type where there are none."""
    what += f", values {seen.low:.7g} to {seen.high:.7g}"
    set_it = f"Set {_suggested(seen.low, seen.high)}, the values of black and white."
    fills = seen.high - seen.low >= seen.possible / 2 > 0
    if seen.is_colour and (bounds or not fills):
        raise UserError(
            f"{what}: of the 16 bits of a colour only the upper 8 are read, whatever "
            f"config.data.range={bounds} is. Save these images with 8 bits a channel."
        )
    if not bounds and not fills:
        raise UserError(f"{what}: what is black and what white is not known. {set_it}")
    if bounds and (seen.high <= bounds[0] or seen.low >= bounds[1]):
        raise UserError(f"{what}: all are beyond config.data.range={bounds}. {set_it}")
    if bounds and (seen.low < bounds[0] or seen.high > bounds[1]):
        _LOGGER.warning("%s: those beyond config.data.range=%s are clipped", what, bounds)
