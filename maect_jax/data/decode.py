"""Encoded images to pixels."""

import contextlib
import io
import math

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from maect_jax.errors import BadImageError

_ORIENTATION = 0x0112  # the EXIF tag
_SIDEWAYS = range(5, 9)  # its values for which height and width are swapped


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
