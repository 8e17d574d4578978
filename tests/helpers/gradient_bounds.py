"""Where a gradient is zero by construction, and how far Adam may carry a gradient's rounding."""

import numpy as np

from tests.helpers.golden_figures import TINY, assert_close, assert_within, norm

BETA1, BETA2, EPS = 0.9, 0.95, 1e-8

# The gradient is zero by construction, so what is computed is rounding, for
# - the key third of every `qkv.bias`: it adds the same to all of a query's scores;
# - the bias of the encoder's final norm and that of the projector's last BatchNorm: a linear
#   layer and a BatchNorm follow, which takes off what is the same for the whole batch.
# Each with the tensor whose gradient gives the scale.
ZERO_GRADIENT = {
    "attn.qkv.bias[k]": "attn.qkv.bias[q]",
    "encoder/norm.bias": "encoder/norm.weight",
    "projector.7.bias": "projector.7.weight",
}


def grad_parts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors with every `qkv.bias` cut into its thirds."""
    parts = {}
    for name, x in tensors.items():
        if name.endswith("attn.qkv.bias"):
            parts |= {f"{name}[{n}]": third for n, third in zip("qkv", np.split(x, 3), strict=True)}
        else:
            parts[name] = x
    return parts


def joined(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `grad_parts`."""
    thirds = {}
    for name, x in parts.items():
        thirds.setdefault(name.split("[")[0], []).append(x)
    return {name: np.concatenate(xs) if len(xs) > 1 else xs[0] for name, xs in thirds.items()}


def zero_by_construction(name: str) -> bool:
    """Of the contrastive step's tensors; for the target's too, which is an average of them."""
    return scale_of(name.replace("target_", ""), contrastive=True) is not None


def scale_of(name: str, contrastive: bool) -> str | None:
    """For a tensor whose gradient is zero by construction, the name of the one that gives the
    scale."""
    for zero, scale in ZERO_GRADIENT.items():
        if name.endswith(zero) and (contrastive or zero.endswith("[k]")):
            return name.removesuffix(zero) + scale
    return None


def _values_of_one_token(name: str, theirs: dict) -> str | None:
    """For queries and keys of an encoder that sees the class token alone, the values' name: a
    softmax over one score has no gradient, and what the reference has there is rounding."""
    if not name.endswith(("[q]", "[k]")):
        return None
    values = f"{name[:-3]}[v]"
    return values if norm(theirs[name]) < 1e-6 * norm(theirs[values]) else None


def assert_gradients(kind: str, ours: dict, theirs: dict, bound: float, contrastive: bool) -> None:
    """Every gradient to `bound`, and zero where it is zero by construction."""
    assert ours.keys() == theirs.keys()
    ours, theirs = grad_parts(ours), grad_parts(theirs)
    for name, want in theirs.items():
        scale = _values_of_one_token(name, theirs) or scale_of(name, contrastive)
        if scale is None:
            assert_close(f"{kind} gradients", ours[name], want, bound)
        else:
            zero = max(norm(ours[name]), norm(want)) / max(norm(theirs[scale]), TINY)
            assert_within(f"{kind} gradients that are zero", zero, bound)


def update_bound(
    name: str, gradients: list[np.ndarray], off: float, contrastive: bool = True
) -> float:
    """How far two of Adam's updates may be apart, as the norm over a tensor.

    One follows `gradients`, one for each step so far; the other's are off by d, `[steps, ...]`,
    of norm `off`. With the bias-corrected moments m and v, s = sqrt(v) + eps and u = m / s, and
    d_i the largest |d| of entry i over the steps: m is a mean of the gradients and sqrt(v) a norm
    of them, so both are off by at most d_i, and

        |u' - u| = |(m' - m) - u' (s' - s)| / s <= (1 + c) d_i / s,

    where |u| <= c by Cauchy and Schwarz; and |u' - u| <= 2 c whatever d is. At worst, d is spent
    on the entries of the smallest s, each as far as 2 c: those whose sign may flip. Where the
    gradient is zero by construction, each may.
    """
    t = len(gradients)
    ages = np.arange(t - 1, -1, -1)
    a = (1 - BETA1) * BETA1**ages / (1 - BETA1**t)
    b = (1 - BETA2) * BETA2**ages / (1 - BETA2**t)
    c = np.sqrt((a**2 / b).sum())
    g = np.stack(gradients).astype(np.float64).reshape(t, -1)
    if scale_of(name, contrastive):
        return 2 * c * np.sqrt(g.shape[1])
    s = np.sort(np.sqrt(b @ g**2) + EPS)
    price = (2 * c * s / (1 + c)) ** 2  # what it takes of off^2 to move an entry by 2 c
    left = off**2 - np.cumsum(price)
    flipped = int(np.searchsorted(-left, 0, side="right"))
    share = (left[flipped] + price[flipped]) / price[flipped] if flipped < len(s) else 0.0
    return 2 * c * np.sqrt(flipped + share)
