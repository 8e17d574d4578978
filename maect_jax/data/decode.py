"""Encoded images to pixels."""

import contextlib
import io
import math
import os
import warnings
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile, StubImageFile
from PIL.TiffImagePlugin import TiffImageFile

from maect_jax.errors import BadImageError

with contextlib.suppress(ImportError):  # the extra [heif]
    import pillow_heif

    pillow_heif.register_heif_opener()

HEIF_ENDINGS = (".heic", ".heics", ".heif", ".heifs", ".hif")
# Pillow knows no pixels of MPEG, and runs another program for those of EPS.
_NOT_DECODED = ("MPEG", "EPS")
_ORIENTATION = 0x0112  # the EXIF tag
_SIDEWAYS = range(5, 9)  # its values for which height and width are swapped
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of half the limit
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how such a file starts
_WORD = 2**16 - 1
_NOT_FINITE = "has values that are not finite numbers"
_SUMMED = 2**17  # values of an image, of those that it may have


@dataclass(frozen=True)
class Decoding:
    """How the files of a data set become pixels."""

    channels: int  # 1 (gray) or 3 (RGB)
    # The values that become 0 and 255 in images of more than 8 bits a channel; empty for all that
    # 16 bits can hold.
    range: tuple[float, ...] = ()
    # Of an image; one that has more is not read, as it may fill the memory.
    max_pixels: int = 178_956_970  # Pillow's own


class Values(NamedTuple):
    """The values of an image of more than 8 bits a channel, as they are in the file."""

    mode: str  # Pillow's
    possible: int  # the highest value that the file can hold, 0 where that means nothing
    is_colour: bool  # of which Pillow reads the upper 8 of 16 bits
    low: float
    high: float
    dark: float  # almost all are from `dark` to `bright`
    bright: float
    is_finite: bool  # if not, the numbers above are those of its finite values


def ending(name: str) -> str:
    """The ending of a file's name, in small letters, with its dot; empty if it has none."""
    return os.path.splitext(name)[1].lower()


@cache
def endings() -> frozenset[str]:
    """The endings of the formats that can be decoded: Pillow's own, and those of its plugins."""

    def is_decoded(kind: str) -> bool:
        factory = Image.OPEN[kind][0] if kind in Image.OPEN else None
        # A stub knows the format, but leaves the pixels to a program of the user.
        is_stub = isinstance(factory, type) and issubclass(factory, StubImageFile)
        return kind == "MPO" or bool(factory and not is_stub and kind not in _NOT_DECODED)

    found = Image.registered_extensions().items()
    return frozenset(name for name, kind in found if is_decoded(kind))


def shape(image: bytes | np.ndarray, decoding: Decoding) -> tuple[int, int]:
    """Height and width of an image, from the header of its file. Raises as `pixels` does."""
    if isinstance(image, np.ndarray):
        return image.shape[:2]
    with _opened(image, decoding) as picture:
        # Of a TIFF Pillow gives the size after turning.
        sideways = picture.format != "TIFF" and picture.getexif().get(_ORIENTATION) in _SIDEWAYS
        return picture.size if sideways else picture.size[::-1]


def pixels(image: bytes | np.ndarray, decoding: Decoding, min_scale: float = 1.0) -> np.ndarray:
    """The pixels of an image, uint8 `[H, W, channels]`: gray for one channel, RGB for three.

    Takes any format that Pillow reads: gray, palette, CMYK, more than 8 bits (`Decoding.range`).
    Of several frames the first is read. Transparency is dropped, as in torchvision; the camera's
    orientation (EXIF) is applied.

    Args:
      image: a file's content, or pixels uint8 `[H, W, C]`, which are returned unchanged.
      decoding: the data set's settings.
      min_scale: a plain JPEG may be decoded at a smaller scale than 1, but not below this.

    Raises:
      BadImageError: the content is truncated, is not an image, is too large, or has values whose
        range is not known.
    """
    if isinstance(image, np.ndarray):
        return image
    mode = "L" if decoding.channels == 1 else "RGB"
    with _opened(image, decoding) as picture:
        bounds = _bounds(picture, decoding)
        is_upright = picture.getexif().get(_ORIENTATION, 1) == 1  # decodes a PNG
        if picture.format == "JPEG" and picture.mode == mode and is_upright:
            width, height = (math.ceil(min_scale * side) for side in picture.size)
            kind = "GRAY" if mode == "L" else mode
            # The same pixels as Pillow's in less time; it refuses files that are merely unusual.
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(image, kind, min_height=height, min_width=width)
        if not is_upright:
            picture = ImageOps.exif_transpose(picture)
        if bounds:  # Pillow would clip the values
            picture = Image.fromarray(to_8_bits(np.asarray(picture), bounds))
        picture.info.pop("transparency", None)  # of which Pillow may warn
        array = np.asarray(picture.convert(mode))
    return array.reshape(*array.shape[:2], decoding.channels)


def values(image: bytes | np.ndarray, decoding: Decoding) -> Values | None:
    """The values of an image of more than 8 bits a channel; None for others, which are not
    decoded. Raises as `pixels` does."""
    if isinstance(image, np.ndarray):
        return None
    with _opened(image, decoding) as picture:
        if _is_deep(picture):
            return summary(picture.mode, _possible(picture), np.asarray(picture))
        if _has_deep_colours(picture):
            upper = np.asarray(picture.convert("RGB"), np.uint16) << 8
            return summary(f"{picture.mode} of 16 bits", _WORD, upper)._replace(is_colour=True)
    return None


def summary(mode: str, possible: int, array: np.ndarray) -> Values:
    """The `Values` of an array of numbers. Raises `BadImageError` if none is finite."""
    finite = np.isfinite(array)
    is_finite = bool(finite.all())
    numbers = array.ravel() if is_finite else array[finite]
    if not numbers.size:
        raise BadImageError(_NOT_FINITE)
    ordered = np.sort(numbers[:: -(-numbers.size // _SUMMED)]).astype(np.float64)
    dark, bright = _bulk(ordered)
    # A value for "no data" or of dead pixels lies far from all others.
    between = ordered[(ordered > ordered[0]) & (ordered < ordered[-1])]
    if between.size > ordered.size / 2:
        low, high = _bulk(between)
        if bright - dark > 4 * (high - low) > 0:
            dark, bright = low, high
    return Values(mode, possible, False, *extremes(numbers), dark, bright, is_finite)


def _bulk(ordered: np.ndarray) -> tuple[float, float]:
    """The quantiles 0.1 % and 99.9 % of ordered numbers."""
    last = ordered.size - 1
    return float(ordered[round(0.001 * last)]), float(ordered[round(0.999 * last)])


def is_coloured(image: bytes | np.ndarray, decoding: Decoding) -> bool:
    """Whether the header of a file says that it has colours. Raises as `pixels` does."""
    if isinstance(image, np.ndarray):
        return False  # which must have the channels of the model
    with _opened(image, decoding) as picture:
        return picture.mode not in ("1", "L", "LA", "La") and not _is_deep(picture)


def to_8_bits(array: np.ndarray, bounds: tuple[float, ...]) -> np.ndarray:
    """Numbers as uint8: the `bounds` become 0 and 255, and what is beyond them, too. Raises
    `BadImageError` if a value is not a finite number."""
    extremes(array)
    low, high = bounds
    exact = np.result_type(array.dtype, np.float32)
    scaled = (array.astype(exact) - low) * (255 / (high - low))
    return np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled).astype(np.uint8)


def extremes(array: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest value. Raises `BadImageError` if they are not finite numbers."""
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadImageError(_NOT_FINITE)
    return low, high


def _is_deep(picture: Image.Image) -> bool:
    """Whether it has one channel of more than 8 bits."""
    return picture.mode in ("I", "F") or picture.mode.startswith("I;")


def _bounds(picture: ImageFile, decoding: Decoding) -> tuple[float, ...]:
    """The values of black and white; empty where all channels have 8 bits. Raises
    `BadImageError` where they are not known."""
    if not _is_deep(picture):
        if decoding.range and _has_deep_colours(picture):
            raise BadImageError(
                "has colours of 16 bits, for which there is no config.data.range; save them with 8"
            )
        return ()
    bounds = decoding.range or (0, _possible(picture))
    if bounds == (0, 0):
        extremes(np.asarray(picture))  # what is not finite needs more than a range
        raise BadImageError(
            f'has values of mode {picture.mode}; set --config.data.range="(BLACK,WHITE)"'
        )
    # Pillow inverts images of 8 bits alone.
    inverted = isinstance(picture, TiffImageFile) and picture.tag_v2.get(_PHOTOMETRIC) == 0
    return bounds[::-1] if inverted else bounds


def _possible(picture: Image.Image) -> int:
    """The highest value that a file of more than 8 bits a channel can hold, 0 where that means
    nothing: in floating point, and in 32 bits, which are never filled."""
    if isinstance(picture, TiffImageFile) and picture.mode.startswith("I;16"):
        return 2 ** picture.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    # Pillow scales the values of PGM and JPEG 2000 to 16 bits.
    is_pgm = picture.format == "PPM" and picture.mode == "I"
    return _WORD if is_pgm or picture.mode.startswith("I;16") else 0


def _has_deep_colours(picture: ImageFile) -> bool:
    """Whether Pillow reads the upper 8 of 16 bits of each colour, asked before they are decoded."""
    return not _is_deep(picture) and any(";16" in str(tile[3]) for tile in picture.tile)


@contextlib.contextmanager
def _opened(image: bytes, decoding: Decoding):
    # From twice this number on Pillow raises an error, also for what is within another file.
    Image.MAX_IMAGE_PIXELS = decoding.max_pixels / 2  # type: ignore[assignment]
    try:
        with Image.open(io.BytesIO(image)) as picture:
            yield picture
    except Image.DecompressionBombError as error:
        size, limit = str(error).partition(" exceeds")[0], decoding.max_pixels
        raise BadImageError(f"{size} is above config.data.max_pixels={limit}; raise it") from error
    except UnidentifiedImageError as error:  # its text names an object in memory
        is_tiff = "is a TIFF of a kind that Pillow does not read, such as 64 bits or many channels"
        other = "cannot be identified as an image"
        raise BadImageError(is_tiff if image.startswith(_TIFF) else other) from error
    except BadImageError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise any of a dozen kinds
        raise BadImageError(str(error).strip() or repr(error)) from error
