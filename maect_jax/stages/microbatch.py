"""The encoder over a part of the batch at a time, at a fraction of the memory.

An encoder has no batch statistics, so the features of a batch are those of its parts. What the
backward pass needs of a part is computed again when its turn comes (the idea of GradCache, Gao
et al., 2021, inside one compiled step), while the head sees the whole batch.
"""

from collections.abc import Callable

import jax

from maect_jax import sharding
from maect_jax.models import vit


def over_microbatches(encode: Callable[..., jax.Array], parts: int, *rows: jax.Array) -> jax.Array:
    """`encode(*rows)` on one of `parts` equal parts of the rows after the other.

    Args:
      encode: from arrays `[b, ...]` to an array `[b, ...]`, row by row.
      parts: how many microbatches; each device must hold a multiple of that many rows.
      *rows: arrays `[B, ...]`.

    Returns:
      What `encode` returns for all rows at once, `[B, ...]`, up to rounding.
    """
    if parts == 1:
        return encode(*rows)

    def split(x):
        # [B] -> [B / m, m] keeps every row on its device; the other way round moves them.
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain_batch(x, axis=1)

    # Frozen blocks have no backward pass: what they computed is kept, as it is not large.
    policy = jax.checkpoint_policies.save_only_these_names(vit.FROZEN)
    once = jax.checkpoint(encode, policy=policy, prevent_cse=False)
    _, found = jax.lax.scan(lambda _, part: ((), once(*part)), (), tuple(map(split, rows)))
    return sharding.constrain_batch(found.swapaxes(0, 1).reshape(-1, *found.shape[2:]))
