"""What is told of a model besides its tensors: by the user, a config.json, a file's header."""

import dataclasses
import json
import math
from collections.abc import Mapping

from maect_jax.errors import UserError

_POOLS = {"token": "cls", "": None, "avg": "mean"}  # timm's names


@dataclasses.dataclass(frozen=True)
class Given:
    """What the user says of a file, which comes before what the file says. `None`: nothing."""

    heads: int | None = None
    decoder_heads: int | None = None
    ln_eps: float | None = None
    image_size: tuple[int, int] | None = None
    pool: str | None = None
    dtype: str | None = None


def number(given, config: Mapping, key: str, kind: type, where: str):
    """What the user says, else what stands beside the tensors; a number above 0, or `None`.

    Raises:
      UserError: it is something else.
    """
    told = config.get(key) if given is None else given
    if told is None:
        return None
    try:
        value = kind(told)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{where}: {key} is {told!r}, must be a number above 0")
    return value


def grid(config: Mapping, patch: int, where: str) -> tuple[int, int] | None:
    """The patch grid of the image size that stands beside the tensors: one side, or two.

    Raises:
      UserError: it is something else.
    """
    told = config.get("image_size")
    try:
        sides = json.loads(told) if isinstance(told, str) else told
    except ValueError:
        sides = told
    if sides is None:
        return None
    sides = sides if isinstance(sides, list) else [sides, sides]
    if len(sides) != 2 or any(type(side) is not int or side < patch for side in sides):
        raise UserError(f"{where}: image_size is {told!r}, must be one side or two, in pixels")
    return sides[0] // patch, sides[1] // patch


def agrees(config: Mapping, key: str, value: int, where: str) -> None:
    """Raises `UserError` where what stands beside the tensors is not what they say."""
    told = config.get(key, value)
    if told != value:
        raise UserError(f"{where}: {key} is {told!r} in its config.json, {value} by its tensors")


def activation(config: Mapping, where: str) -> None:
    """Raises `UserError` for another activation than GELU, which no tensor tells."""
    told = config.get("hidden_act", "gelu")
    if told != "gelu":
        raise UserError(f"{where}: hidden_act is {told!r}, must be 'gelu'")


def timm_pool(config: Mapping, where: str) -> str | None:
    """The pooling that timm's config.json names, by our name; `None` for none.

    Raises:
      UserError: it is of another kind.
    """
    told = config.get("global_pool", "")
    if told not in _POOLS:
        raise UserError(f"{where}: global_pool is {told!r}, must be 'token' or 'avg'")
    return _POOLS[told]


def normalisation(
    config: Mapping, preprocessor: Mapping, channels: int, where: str
) -> dict[str, tuple[float, ...]]:
    """`mean` and `std` of the channels of pixels from 0 to 1, where they are told.

    Raises:
      UserError: they are not a number for each channel.
    """
    timm = config.get("pretrained_cfg")
    timm = timm if isinstance(timm, Mapping) else {}
    found = {key: preprocessor.get(f"image_{key}", timm.get(key)) for key in ("mean", "std")}
    if preprocessor.get("do_normalize") is False:
        found = {"mean": [0.0] * channels, "std": [1.0] * channels}
    if None in found.values():
        return {}
    for key, values in found.items():
        fits = isinstance(values, list) and len(values) == channels
        if not fits or any(type(x) not in (int, float) or not math.isfinite(x) for x in values):
            raise UserError(f"{where}: {key} is {values!r}, must be {channels} numbers")
    return {key: tuple(map(float, values)) for key, values in found.items()}
