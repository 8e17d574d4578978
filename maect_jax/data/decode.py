"""Encoded images to pixels."""

import contextlib
import io
import math
import os
from functools import cache

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from maect_jax.errors import BadImageError

with contextlib.suppress(ImportError):  # the extra [heif]
    import pillow_heif

    pillow_heif.register_heif_opener()

HEIF_ENDINGS = (".heic", ".heics", ".heif", ".heifs", ".hif")
# Pillow knows no pixels of MPEG, and runs another program for those of EPS.
_NOT_DECODED = ("MPEG", "EPS")
_ORIENTATION = 0x0112  # the EXIF tag
_SIDEWAYS = range(5, 9)  # its values for which height and width are swapped


def ending(name: str) -> str:
    """The ending of a file's name, in small letters, with its dot; empty if it has none."""
    return os.path.splitext(name)[1].lower()


@cache
def endings() -> frozenset[str]:
    """The endings of the formats that can be decoded: Pillow's own, and those of its plugins."""

    def is_decoded(kind: str) -> bool:
        factory = Image.OPEN[kind][0] if kind in Image.OPEN else None
        # A stub knows the format, but leaves the pixels to a program of the user.
        is_stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        return kind == "MPO" or bool(factory and not is_stub and kind not in _NOT_DECODED)

    found = Image.registered_extensions().items()
    return frozenset(name for name, kind in found if is_decoded(kind))


def shape(image: bytes | np.ndarray) -> tuple[int, int]:
    """Height and width of an image, from the header of its file. Raises as `pixels` does."""
    if isinstance(image, np.ndarray):
        return image.shape[:2]
    with _opened(image) as picture:
        sideways = picture.getexif().get(_ORIENTATION) in _SIDEWAYS
        return picture.size if sideways else picture.size[::-1]


def pixels(image: bytes | np.ndarray, channels: int, min_scale: float = 1.0) -> np.ndarray:
    """The pixels of an image, uint8 `[H, W, channels]`: gray for one channel, RGB for three.

    Takes any format that Pillow reads: gray, palette, CMYK, 16 bits (the upper eight remain).
    Transparency is dropped, as in torchvision; the camera's orientation (EXIF) is applied.

    Args:
      image: a file's content, or pixels uint8 `[H, W, C]`, which are returned unchanged.
      channels: 1 or 3.
      min_scale: a plain JPEG may be decoded at a smaller scale than 1, but not below this.

    Raises:
      BadImageError: the content is truncated, or is not an image.
    """
    if isinstance(image, np.ndarray):
        return image
    mode = "L" if channels == 1 else "RGB"
    with _opened(image) as picture:
        is_upright = picture.getexif().get(_ORIENTATION, 1) == 1
        if picture.format == "JPEG" and picture.mode == mode and is_upright:
            width, height = (math.ceil(min_scale * side) for side in picture.size)
            kind = "GRAY" if channels == 1 else "RGB"
            # The same pixels as Pillow's in less time; it refuses files that are merely unusual.
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(image, kind, min_height=height, min_width=width)
        if picture.mode.startswith("I;16"):  # Pillow would clip the values
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        elif not is_upright:
            picture = ImageOps.exif_transpose(picture)
        array = np.asarray(picture.convert(mode))
    return array.reshape(*array.shape[:2], channels)


@contextlib.contextmanager
def _opened(image: bytes):
    try:
        with Image.open(io.BytesIO(image)) as picture:
            yield picture
    except UnidentifiedImageError as error:  # its text names an object in memory
        raise BadImageError("cannot be identified as an image") from error
    except Exception as error:  # a damaged file makes Pillow raise any of a dozen kinds
        raise BadImageError(str(error).strip() or repr(error)) from error
