"""Encoded images to pixels."""

import contextlib
import io
import math

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from maect_jax.errors import BadImageError

_ORIENTATION = 0x0112  # the EXIF tag
_SWAPPING = range(5, 9)  # of its values: height and width change places


def shape(image: bytes | np.ndarray) -> tuple[int, int]:
    """Height and width of an image, from the header of its file. Raises as `pixels` does."""
    if isinstance(image, np.ndarray):
        return image.shape[:2]
    with _opened(image) as picture:
        swapped = picture.getexif().get(_ORIENTATION) in _SWAPPING
        return picture.size if swapped else picture.size[::-1]


def pixels(image: bytes | np.ndarray, channels: int, least: float = 1.0) -> np.ndarray:
    """The pixels of an image, uint8 `[H, W, channels]`: gray for one channel, RGB for three.

    Takes any format that Pillow reads: gray, palette, CMYK, 16 bits (the upper eight are kept).
    Transparency is dropped, as torchvision does; a turned camera (EXIF) is turned back.

    Args:
      image: a file's content, or pixels uint8 `[H, W, C]`, which are taken as they are.
      channels: 1 or 3.
      least: a plain JPEG may be given at a smaller scale than its own, but not below this.

    Raises:
      BadImageError: the content is cut short, or no image.
    """
    if isinstance(image, np.ndarray):
        return image
    mode = "L" if channels == 1 else "RGB"
    with _opened(image) as picture:
        if picture.format == "JPEG" and picture.mode == mode and not _turned(picture):
            sides = [math.ceil(least * side) for side in picture.size]
            smallest = dict(zip(("min_width", "min_height"), sides, strict=True))
            # The same pixels as Pillow's in less time; but it refuses what is only odd.
            with contextlib.suppress(ValueError):
                kind = "GRAY" if channels == 1 else "RGB"
                return simplejpeg.decode_jpeg(image, kind, **smallest)
        found = np.asarray(_converted(picture, mode))
    return found.reshape(*found.shape[:2], channels)


@contextlib.contextmanager
def _opened(image: bytes):
    try:
        with Image.open(io.BytesIO(image)) as picture:
            yield picture
    except UnidentifiedImageError as error:  # whose text names an object in memory
        raise BadImageError("cannot be identified as an image") from error
    except Exception as error:  # a damaged file makes Pillow raise any of a dozen kinds
        raise BadImageError(str(error).strip() or repr(error)) from error


def _turned(picture: Image.Image) -> bool:
    return picture.getexif().get(_ORIENTATION, 1) != 1


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode.startswith("I;16"):  # which Pillow would clip
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if _turned(picture):
        picture = ImageOps.exif_transpose(picture)
    return picture.convert(mode)
