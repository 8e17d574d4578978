"""How pictures look, and how a figure becomes a file and a part of the page."""

import functools
import io
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

INK = "#0b0c0d"  # lines and text; the page gives them the text colour of its theme
FAINT = "#7a828b"  # readable on light and on dark
COLOURS = {"pixels": FAINT, "mae": "#2f7ed8", "head": "#8e5bd6", "ct": "#e0662b"}
HIDDEN = (0.48, 0.51, 0.55, 1.0)  # of masked patches, red to alpha
WIDTH = 5.0  # inches; narrow enough to be read on a phone
CLASSES = 20  # with more of them, a picture of all is no picture

_RC = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


def figure(height: float, **options) -> Figure:
    """An empty figure, `WIDTH` by `height` inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained", **options)


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


def show(axes, image, **options) -> None:
    """Draws an image `[H, W, C]` pixel by pixel; one channel is drawn in grey."""
    bare(axes)
    gray = {"cmap": "gray", "vmin": 0, "vmax": 255} if image.shape[-1] == 1 else {}
    axes.imshow(image.squeeze(-1) if gray else image, interpolation="none", **gray, **options)


def save(drawn: Figure, path: Path) -> str:
    """Writes a figure as PNG on white, and returns it as SVG whose ink follows the page's theme."""
    drawn.savefig(path, dpi=200, facecolor="white")
    # The salt keeps the names inside one figure apart from those of the others on the page.
    with matplotlib.rc_context({**_RC, "svg.hashsalt": path.stem}):
        text = io.StringIO()
        drawn.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Named by their content, pictures that are drawn twice would share a name.
    svg = re.sub(r' id="image\w+"', "", svg)
    ids = r'(id="|href="#|url\(#)'
    return re.sub(ids, rf"\g<1>{path.stem}-", svg)
