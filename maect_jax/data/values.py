"""What values that are not 8 bits mean: those of files are checked at the start, in a sample."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np

from maect_jax.data import decode
from maect_jax.data.base import Source, evenly_spaced
from maect_jax.data.decode import Decoding, Values
from maect_jax.errors import BadImageError, UserError, shown

_SAMPLED = 64  # images of a split
_DECODED = 16  # of those that have 8 bits
_DARKEST = 32  # what some pixel has in any set of images of 8 bits
_LOGGER = logging.getLogger(__name__)


def check(sources: Iterable[Source], decoding: Decoding) -> None:
    """Checks, in a sample, that the values of images do not become almost nothing when they become
    8 bits. Of images of 8 bits one is decoded, or few. Raises `UserError` if there are values of 32
    bits without `config.data.range`, most images of 16 bits fill less than half of what is
    possible, none is within the range, or those of 8 bits are far from 255."""
    deep: dict[tuple[str, int], list[tuple[str, Values]]] = defaultdict(list)
    others: list[tuple[Source, int]] = []
    for source in sources:
        _say_if_colour_is_lost(source, decoding)
        records = evenly_spaced(len(source), _SAMPLED)
        with ThreadPoolExecutor() as pool:
            sample = list(pool.map(partial(_values, source, decoding), records))
        rest = [record for record, seen in zip(records, sample, strict=True) if not seen]
        others += [(source, rest[i]) for i in evenly_spaced(len(rest), _DECODED)]
        for record, seen in zip(records, sample, strict=True):
            if seen:
                deep[seen.mode, seen.possible].append((source.name(record), seen))
    _check_8_bit_files(others, decoding)
    for (mode, _), found in deep.items():
        name = next((name for name, seen in found if _is_weak(seen)), found[0][0])
        _check(f"{shown(name)}: mode {mode}", [seen for _, seen in found], decoding.range)


def _say_if_colour_is_lost(source: Source, decoding: Decoding) -> None:
    with suppress(BadImageError, OSError):
        if decoding.channels == 1 and decode.is_coloured(source[0][0], decoding):
            _LOGGER.warning(
                "%s: has colours, and is taken as gray by config.model.channels=1. To keep them, "
                "set --config.model.channels=3, and three numbers each in data.mean and data.std.",
                shown(source.name(0)),
            )


def to_uint8(what: str, array: np.ndarray, bounds: tuple[float, ...]) -> np.ndarray:
    """An array of numbers, of any shape, as pixels; uint8 is returned unchanged. `bounds` are the
    values that become 0 and 255, empty for all that uint16 holds. Raises `UserError`, about `what`
    it is, as `check` does; or if they are not finite, or uint8 far from 255."""
    possible = np.iinfo(np.uint16).max if array.dtype == np.uint16 else 0
    try:
        found = decode.extremes(array)
    except BadImageError as error:
        too = "" if bounds else "; replace them, and set config.data.range, too"
        raise UserError(f"{what}: {error}{too}") from error
    if array.dtype == np.uint8:
        _check_8_bits(what, *found)
        return array
    sample = evenly_spaced(len(array), _SAMPLED)
    seen = [decode.summary(str(array.dtype), possible, array[i]) for i in sample]
    _check(what, seen, bounds, found)
    return decode.to_8_bits(array, bounds or (0, possible))


def _suggested(low: float, high: float) -> str:
    """How to set `config.data.range` for values from `low` to `high`."""
    if low >= 0:  # all that so many bits hold; of fractions, 1
        low, high = 0, 2 ** math.ceil(math.log2(high + 1)) - 1 if high > 1 else 1
    return f'--config.data.range="({low:.10g},{high:.10g})"'


def _values(source: Source, decoding: Decoding, record: int) -> Values | None:
    with suppress(BadImageError, OSError):  # counted where it is used
        return decode.values(source[record][0], decoding)
    return None


def _check_8_bit_files(records: Sequence[tuple[Source, int]], decoding: Decoding) -> None:
    """Decodes files until one is not dark. Raises as `_check_8_bits` does."""
    dark = []
    for source, record in records:
        with suppress(BadImageError, OSError):
            content = source[record][0]
            if not isinstance(content, np.ndarray):
                pixels = decode.pixels(content, replace(decoding, channels=3))
                dark.append((source.name(record), *decode.extremes(pixels)))
                if dark[-1][2] >= _DARKEST:
                    return
    if dark:
        names, lows, highs = zip(*dark, strict=True)
        _check_8_bits(f"{shown(names[0])}, one of {len(names)} images", min(lows), max(highs))


def _check_8_bits(what: str, low: float, high: float) -> None:
    if 0 < high < _DARKEST:
        raise UserError(f"{what}, values {low:g} to {high:g}: must be 0 to 255. Multiply them.")


def _is_weak(seen: Values) -> bool:
    """Whether an image fills less than half of what is possible, or that is not known."""
    return seen.bright - seen.dark < seen.possible / 2 or not seen.possible


def _check(
    what: str, sample: Sequence[Values], bounds: tuple[float, ...], ends: Sequence[float] = ()
) -> None:
    """Raises `UserError` if the values of a sample do not fit the `bounds` that the user sets, or
    may not fit those of the file type where there are none. The `ends` are those of all values."""
    low, high = ends or (min(seen.low for seen in sample), max(seen.high for seen in sample))
    count, possible = len(sample), sample[0].possible
    weak = [seen for seen in sample if _is_weak(seen)]
    usual = sample if bounds else weak or sample  # a few that are not like them set no range
    dark = np.quantile([seen.dark for seen in usual], 0.05, method="nearest")
    bright = np.quantile([seen.bright for seen in usual], 0.95, method="nearest")
    set_it = f"Set {_suggested(float(dark), float(bright))}, the values of black and white."
    what += f", values {low:.7g} to {high:.7g}"
    if sample[0].is_colour and (bounds or len(weak) > count / 2):
        raise UserError(
            f"{what}: of the 16 bits of a colour only the upper 8 are read, whatever "
            f"config.data.range={bounds} is. Save these images with 8 bits a channel."
        )
    if bounds:
        if high <= bounds[0] or low >= bounds[1]:
            raise UserError(f"{what}: all are beyond config.data.range={bounds}. {set_it}")
        if low < bounds[0] or high > bounds[1]:
            _LOGGER.warning("%s: those beyond config.data.range=%s are clipped", what, bounds)
        spans = [min(seen.bright, bounds[1]) - max(seen.dark, bounds[0]) for seen in sample]
        span = max(float(np.median(spans)), 0)
        if span < (bounds[1] - bounds[0]) / 10:
            _LOGGER.warning(
                "%s, most of them %.7g to %.7g: half of the images fill at most %.3g of "
                "config.data.range=%s, and lose their contrast",
                *(what, dark, bright, span, bounds),
            )
    elif len(weak) > count / 2:
        fill = f" ({len(weak)} of {count} images fill less than half of 0 to {possible})"
        bad = sum(not seen.is_finite for seen in sample)
        too = f" {bad} of {count} images have values that are not finite: replace them, too."
        raise UserError(
            f"{what}, most of them {dark:.7g} to {bright:.7g}: what is black and what white is "
            f"not known{fill if possible else ''}. {set_it}{too if bad else ''}"
        )
    elif len(weak) > count / 10:
        _LOGGER.warning(
            "%s: %d of %d images fill less than half of 0 to %d. If these have fewer bits than the "
            "others, multiply them.",
            *(what, len(weak), count, possible),
        )
