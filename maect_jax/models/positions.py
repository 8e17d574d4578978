"""Positions of a grid of patches: MAE's fixed embedding, resizing to another grid, rotary ones."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

Table = np.ndarray | jax.Array  # a position embedding fp32 `[N, D]`


def grid(image_size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches."""
    return image_size[0] // patch_size, image_size[1] // patch_size


def sincos(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed 2-D sine-cosine position embedding, fp32 `[N, D]` (MAE, appendix A.1).

    The first half of the channels encodes the column, the second the row; each half has the
    sines, then the cosines, at frequencies `10000^(-i / (D/4))`. D must be a multiple of 4.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, col = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [index.reshape(-1, 1) * frequencies for index in (col, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


def rotary(grid: tuple[int, int], width: int, theta: float) -> np.ndarray:
    """Angles fp32 `[N, width / 2]` by which rotary positions turn a head of this width (DINOv3).

    The centres of the patches go from -1 to 1 along each axis; the first half of the angles are
    those of the row, the second of the column, `2 pi * centre * theta^(-i / (width / 4))`.
    """
    frequencies = theta ** (-np.arange(width // 4) / (width / 4))
    centres = ((2 * np.arange(side) + 1) / side - 1 for side in grid)
    angles = [
        2 * np.pi * x.reshape(-1, 1) * frequencies for x in np.meshgrid(*centres, indexing="ij")
    ]
    return np.concatenate(angles, 1).astype(np.float32)


def _kernel(distance: np.ndarray, a: float) -> np.ndarray:
    """The cubic kernel (Keys, 1981)."""
    t = np.abs(distance)
    near = ((a + 2) * t - (a + 3)) * t**2 + 1
    return np.where(t <= 1, near, np.where(t < 2, a * (((t - 5) * t + 8) * t - 4), 0))


def _cubic(old: int, new: int, smooth: bool) -> np.ndarray:
    """Matrix `[new, old]` that resizes an axis, as PyTorch's bicubic interpolation does with
    `align_corners=False`: `smooth` is its antialiasing, which has another kernel, too, and treats
    the borders otherwise."""
    x = (np.arange(new) + 0.5) * old / new - 0.5
    if smooth:
        matrix = _kernel((x[:, None] - np.arange(old)) / max(old / new, 1), a=-0.5)
        return matrix / matrix.sum(1, keepdims=True)
    matrix = np.zeros((new, old))
    for tap in (-1, 0, 1, 2):
        pixel = np.floor(x) + tap
        column = np.clip(pixel, 0, old - 1).astype(int)
        np.add.at(matrix, (np.arange(new), column), _kernel(x - pixel, a=-0.75))
    return matrix


def resize(table: Table, old: tuple[int, int], new: tuple[int, int], smooth: bool = False) -> Table:
    """Resizes a position embedding fp32 `[N, D]` from patch grid `old` to `new`, bicubic, with or
    without antialiasing (`smooth`); in float64, but within a jitted function."""
    rows, cols = (_cubic(a, b, smooth) for a, b in zip(old, new, strict=True))
    einsum: Callable = partial(np.einsum, optimize=True)
    if isinstance(table, jax.core.Tracer):
        einsum = partial(jnp.einsum, precision="highest")
    out = einsum("ar,bc,rcd->abd", rows, cols, table.reshape(*old, -1))
    return out.reshape(new[0] * new[1], -1).astype(np.float32)


def is_smooth(registers: int) -> bool:
    """Whether positions of an encoder with so many registers are resized with antialiasing, as in
    DINOv2's with registers; a single one is DeiT's distillation token, without it."""
    return registers > 1


def fitted(
    params: Mapping, old: tuple[int, int], new: tuple[int, int], *, rotary: bool = False
) -> dict:
    """Parameters of an encoder or a decoder, trained on patch grid `old`, for the grid `new`.

    Where the grids differ, the position embedding, learned or fixed, is resized: as in MAE's code,
    or smoothly (`is_smooth`). `rotary` positions fit any grid.
    """
    if old == new or rotary:
        return dict(params)
    if (table := params.get("pos_embed")) is None:
        blocks = params["blocks" if "blocks" in params else "frozen_blocks"]
        table = sincos(old, blocks["norm1"]["scale"].shape[-1])
    registers = np.shape(params["register_token"])[1] if "register_token" in params else 0
    return {**params, "pos_embed": resize(table, old, new, is_smooth(registers))}
