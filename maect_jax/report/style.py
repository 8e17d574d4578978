"""How pictures look, and how a figure becomes a file and a part of the page."""

import functools
import io
import re
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from PIL import Image

INK = "#0b0c0d"  # lines and text; the page gives them the text colour of its theme
FAINT = "#7a828b"  # readable on light and on dark
COLOURS = {
    "pixels": FAINT, "mae": "#2f7ed8", "head": "#8e5bd6", "ct": "#e0662b", "finetune": "#2a9d6f",
}  # fmt: skip
HIDDEN = (122, 130, 139)  # of masked patches: FAINT as red, green, blue
WIDTH = 4.4  # inches; narrow enough to be read on a phone
CLASSES = 20  # with more of them, a picture of all is no picture
# From nothing to the colour of what is tuned, on any ground.
SHADES = LinearSegmentedColormap.from_list("shades", [(*to_rgb(COLOURS["ct"]), a) for a in (0, 1)])
_DPI = 200
_PIXELS = 80  # the longer side of an image in a picture, at most

_RC = {
    "font.size": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called $1$
    "svg.fonttype": "none",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


def figure(height: float) -> Figure:
    """An empty figure, `WIDTH` by `height` inches."""
    drawn = Figure(figsize=(WIDTH, height), layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0.02, hspace=0.02)
    return drawn


def styled(draw):
    """Runs a drawing function under the pictures' settings."""

    @functools.wraps(draw)
    def run(*args, **kwargs):
        with matplotlib.rc_context(_RC):
            return draw(*args, **kwargs)

    return run


def palette(classes: int) -> list:
    """A colour for each class, that can be told apart where there are few."""
    if classes <= 10:
        return list(matplotlib.colormaps["tab10"].colors[:classes])
    return [matplotlib.colormaps["turbo"](i / classes) for i in range(classes)]


def bare(axes) -> None:
    """Takes ticks and frame away, for axes that hold a picture."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def in_colour(image: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, C]` as `[H, W, 3]`."""
    return np.broadcast_to(image, (*image.shape[:2], 3))


def show(axes, image: np.ndarray) -> None:
    """Draws an image, uint8 `[H, W, C]`, pixel by pixel; large ones are made smaller first."""
    bare(axes)
    picture = Image.fromarray(in_colour(image))
    picture.thumbnail((_PIXELS, _PIXELS))
    axes.imshow(picture, interpolation="none")


def save(drawn: Figure, path: Path) -> str:
    """Writes a figure as PNG on white, and returns it as SVG whose ink follows the page's theme."""
    text = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({**_RC, "svg.hashsalt": path.stem}):
        # A name in a script that the font lacks: empty boxes in the PNG, right on the page.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        drawn.savefig(path, dpi=_DPI, facecolor="white")
        options = dict(transparent=True, metadata={"Date": None}, dpi=_DPI)
        drawn.savefig(text, format="svg", **options)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Named by their content, pictures that are drawn twice would share a name.
    svg = re.sub(r' id="image\w+"', "", svg)
    # Nor may figures share names on the page.
    ids = r'(id="|href="#|url\(#)'
    return re.sub(ids, rf"\g<1>{path.stem}-", svg)
