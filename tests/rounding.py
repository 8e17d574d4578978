"""How far off bf16 must be: the fp32 program, rounded to bf16 wherever the bf16 one rounds.

A bound that takes every rounding to be the worst one would be hundreds of times too wide; and how
much a batch normalisation, a ReLU or a sum that cancels makes of a rounding depends on the
figures. So the error is sampled (Monte Carlo arithmetic; Parker, 1997): what is stored or handed
on in bf16 (parameters, images, the results of linear layers, norms, attention and blocks, and the
gradients that come back to them) is rounded to eight significant bits on a grid that is shifted
by a random factor, once a draw. The bf16 program is one more draw, with half as many places to
round again (scores, softmax, the sums of a block): its error may be `ALLOWED` times the largest
of the draws.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from maect_jax.models import vit
from tests.figures import assert_within

ALLOWED = 2.0
DRAWS = 8
_ROUNDED = (nn.Dense, nn.LayerNorm, vit.Attention, vit.Block)


def _round(x, scale):
    return (x * scale).astype(jnp.bfloat16).astype(jnp.float32) / scale


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
    """`f()`, which calls fp32 modules, with their results rounded."""

    def intercept(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, _ROUNDED) and context.method_name == "__call__":
            y = jax.tree.map(lambda x: _round_both_ways(x, scale), y)
        return y

    with nn.intercept_methods(intercept):
        return f()


def assert_as_exact_as_bf16(kind: str, got: dict, exact: dict, draw) -> None:
    """Asserts that each quantity of `got` is as near to `exact` as bf16 can be.

    Args:
      kind: for the table of errors.
      got, exact: name -> tree of arrays, of the bf16 and of the fp32 program.
      draw: `scale -> dict` of the same quantities, emulated.
    """

    def off(name, other):
        difference = jax.tree.map(np.subtract, other[name], exact[name])
        return float(optax.tree.norm(difference) / optax.tree.norm(exact[name]))

    scales = 2.0 ** np.random.default_rng(0).uniform(size=DRAWS)
    draws = [jax.device_get(draw(np.float32(scale))) for scale in scales]
    got, exact = jax.device_get((got, exact))
    for name in exact:
        must = max(off(name, other) for other in draws)
        assert_within(f"bf16 {kind} {name}", off(name, got), ALLOWED * must)
