"""How far off bf16 must be: the fp32 program, rounded to bf16 wherever the bf16 one rounds.

A bound that takes every rounding to be the worst one would be hundreds of times too wide; and how
much a batch normalisation, a ReLU or a sum that cancels makes of a rounding depends on the
figures. So the error is sampled (Monte Carlo arithmetic; Parker, 1997): what is stored or handed
on in bf16 (parameters and their gradients, images, the results of linear layers, norms, attention
and blocks, and the gradients that come back to them) is rounded to eight significant bits on a
grid that is shifted by a random factor, once a draw. The bf16 program rounds some 18 results a
block, this 9 of them, and roundings add up in squares: sqrt(2) times as much is to be expected of
it. `ALLOWED` times the largest of the draws leaves the rest to its being one more draw.
"""

from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.models import vit
from tests.helpers.golden_figures import assert_within, norm

ALLOWED = 2.0
SCALES = 2.0 ** np.random.default_rng(0).uniform(size=16).astype(np.float32)
_ROUNDED = (vit.Linear, nn.Dense, nn.LayerNorm, vit.Block)


def _round(x, scale):
    # Compilers for GPUs drop a conversion to bf16 that is converted back.
    return jax.lax.reduce_precision(x * scale, exponent_bits=8, mantissa_bits=7) / scale


@jax.custom_vjp
def _round_both_ways(x, scale):
    return _round(x, scale)


_round_both_ways.defvjp(
    lambda x, scale: (_round(x, scale), scale), lambda scale, g: (_round(g, scale), 0.0 * scale)
)


def rounded(tree, scale):
    """Every array of `tree` on the bf16 grid that `scale` shifts."""
    return jax.tree.map(lambda x: _round(jnp.asarray(x), scale), tree)


def emulated(f, scale):
    """`f()`, which calls fp32 modules, with their results and the attention weights rounded."""

    def attention(q, k, v, implementation):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        weights = _round_both_ways(jax.nn.softmax(scores), scale)
        return _round_both_ways(jnp.einsum("bhqk,bkhd->bqhd", weights, v), scale)

    def intercept(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, _ROUNDED) and context.method_name == "__call__":
            y = jax.tree.map(lambda x: _round_both_ways(x, scale), y)
        return y

    attend = mock.patch.object(jax.nn, "dot_product_attention", attention)
    with attend, nn.intercept_methods(intercept):
        return f()


def assert_as_exact_as_bf16(kind: str, got: dict, exact: dict, draws: list[dict]) -> None:
    """Asserts that each quantity of `got` is as near to `exact` as bf16 can be, and no nearer.

    Args:
      kind: for the table of errors.
      got, exact: name (`quantity` or `quantity/tensor`) -> array, of the bf16 and the fp32 program.
      draws: the same of the emulated program, once a draw.
    """
    for name, x in exact.items():
        if not np.any(x):  # of queries and keys, where there is one token alone
            assert not np.any(got[name]), name
            continue
        error, *others = (norm(np.subtract(other[name], x)) / norm(x) for other in (got, *draws))
        assert error > 0, f"{name} was not computed in bf16"
        assert_within(f"bf16 {kind} {name.split('/')[0]}", error, ALLOWED * max(others))
