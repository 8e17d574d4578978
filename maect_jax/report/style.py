"""How figures look, and how one becomes a PNG and an SVG."""

import io
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import color_sequences, colormaps
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from maect_jax.data import sources
from maect_jax.errors import shown
from maect_jax.stages import STAGES

SETTINGS = Path(__file__).with_name("report.mplstyle")  # for drawing and saving
GREY = "#7a828b"  # readable on light and on dark
GREY_RGB = (122, 130, 139)
BLUE, ORANGE = "#2f7ed8", "#e0662b"
# By row of the results; grey for what is no stage.
_OF_STAGES = (BLUE, "#8e5bd6", ORANGE, "#b58a1c", "#d1478c", "#2a9d6f")
COLOURS = defaultdict(lambda: GREY, zip(STAGES, _OF_STAGES, strict=True))
# From the first block to the last; none is too light or too dark for its background.
_DEPTHS = LinearSegmentedColormap.from_list("depths", ["#5fae4e", "#2aa3b5", "#4f7fe0", "#a04fd0"])
# From transparent to orange, so that it fits any background.
SHADES = LinearSegmentedColormap.from_list("shades", [(*to_rgb(ORANGE), a) for a in (0, 1)])
WIDTH = 4.4  # inches; narrow enough to be read on a phone
MANY_CLASSES = 20  # more are not listed one by one
_DPI = 200
_LONGEST_NAME = 40  # characters
_THUMBNAIL = 80  # pixels of an image's longer side, at most


def palette(count: int) -> list[str]:
    """So many colours, as different as can be."""
    few, many = color_sequences["tab10"], colormaps["turbo"](np.linspace(0.1, 0.9, count))
    return [to_hex(colour) for colour in (few if count <= len(few) else many)][:count]


def depths(count: int) -> list[str]:
    """So many colours in the order of depth."""
    return [to_hex(colour) for colour in _DEPTHS(np.linspace(0, 1, count))]


def class_name(classes: Sequence[str], label: int) -> str:
    """The name of a label (`sources.class_name`) as a figure has room for it and fonts have it."""
    return shown(sources.class_name(classes, label), _LONGEST_NAME)


def new_figure(height: float, wspace: float = 0.02) -> Figure:
    """An empty figure, `WIDTH` by `height` inches; between axes is `wspace` of their width."""
    layout = ConstrainedLayoutEngine(w_pad=0.015, h_pad=0.015, wspace=wspace, hspace=0.02)
    return Figure(figsize=(WIDTH, height), layout=layout)


def hide_axes(axes) -> None:
    """Removes ticks and frame, for axes that hold an image."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def to_rgb_image(image: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, C]` as `[H, W, 3]`: its first three channels, or the first as gray."""
    drawn = image[..., : 3 if image.shape[2] >= 3 else 1]
    return np.broadcast_to(drawn, (*image.shape[:2], 3))


def show(axes, image: np.ndarray) -> None:
    """Draws an image, uint8 `[H, W, C]`, pixel by pixel; a large one as a thumbnail."""
    hide_axes(axes)
    thumbnail = Image.fromarray(to_rgb_image(image))
    thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
    axes.imshow(thumbnail, interpolation="none")


@contextmanager
def _any_script() -> Iterator[None]:
    """The font may lack a script: empty boxes in a PNG, but correct in the browser."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def save(figure: Figure, path: Path) -> str:
    """Writes a figure as PNG on white; returns it as `svg`."""
    with _any_script():
        figure.savefig(path, dpi=_DPI, facecolor="white")
    return svg(figure, path.stem)


def svg(figure: Figure, name: str) -> str:
    """A figure as SVG in the text colour of its surroundings, with a name of its own in a document.

    Call it, as the drawing functions, under `SETTINGS`.
    """
    text = io.StringIO()
    with _any_script(), matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", dpi=_DPI, transparent=True, metadata={"Date": None})
    source = "<svg" + text.getvalue().partition("<svg")[2]
    source = source.replace(matplotlib.rcParams["text.color"], "currentColor")
    # An image's id is a hash of its content, so that an image drawn twice has one id twice.
    source = re.sub(r' id="image\w+"', "", source)
    # The figures of a report share one document: the name of each is put before its ids.
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", source)
