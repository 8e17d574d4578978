"""Vision Transformer encoder in Flax linen, scanned over its layers.

Sizes follow "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021); position
embedding, initialisation and block order follow MAE (He et al., 2022).

Shapes: B images, H x W pixels, C channels, N patches, T class tokens and registers, D width, L
layers.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from maect_jax import config as configs
from maect_jax import sharding
from maect_jax.config import Rule, Rules, at_most, between, one_of, or_none, positive
from maect_jax.errors import UserError
from maect_jax.models import positions

DTYPES = ("float32", "bfloat16")  # of activations
POOLS = ("cls", "mean", "fc_norm")  # of a model
# Implementations of attention: XLA's, or cuDNN's flash kernels. "auto" is the one that was measured
# to be faster (docs/performance.md).
ATTENTIONS = ("auto", "xla", "cudnn")
# Bounds far above what can be trained, within which a dry run is fast and takes little memory.
MAX_UNITS = 2**16  # width, depth or heads
MAX_PIXELS = 2**14  # side of an image
_MAX_TOKENS = 2**10  # class tokens, and registers
# Names for checkpointing policies: of what linear layers give, and of the frozen blocks' output.
PRODUCT, FROZEN = "product", "frozen"
# Blocks at most that are compiled one by one, not as a loop; compiling takes longer with each.
_UNROLLED = {"cpu": 12, "gpu": 32}
_MAX_POSITIONS = 2**25  # numbers in the position embedding


class Size(NamedTuple):
    """Width, depth and number of attention heads of an encoder."""

    width: int
    depth: int
    heads: int


VARIANTS = {
    "Ti": Size(192, 12, 3),
    "S": Size(384, 12, 6),
    "B": Size(768, 12, 12),
    "L": Size(1024, 24, 16),
    "H": Size(1280, 32, 16),
}

xavier = nn.initializers.xavier_uniform()
token_init = nn.initializers.normal(0.02)


def _torch_bias(fan_in: int) -> nn.initializers.Initializer:
    """The bias of PyTorch's convolutions, uniform in +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Cuts `[B, H, W, C]` into patches `[B, N, P*P*C]`; pixels in row, column, channel order."""
    batch, height, width, channels = images.shape
    rows, cols = height // patch_size, width // patch_size
    x = images.reshape(batch, rows, patch_size, cols, patch_size, channels)
    return x.swapaxes(2, 3).reshape(batch, rows * cols, patch_size**2 * channels)


def unpatchify(patches: jax.Array, patch_size: int, grid: tuple[int, int]) -> jax.Array:
    """The inverse of `patchify`: `[B, N, P*P*C]` to `[B, H, W, C]` for a grid (rows, columns)."""
    batch, (rows, cols) = patches.shape[0], grid
    x = patches.reshape(batch, rows, cols, patch_size, patch_size, -1).swapaxes(2, 3)
    return x.reshape(batch, rows * patch_size, cols * patch_size, -1)


class Linear(nn.Module):
    """Linear layer `[..., D] -> [..., features]` in `dtype`; parameters are fp32.

    The bias is added in fp32, so that its gradient, a sum over all tokens of the batch, is summed
    in fp32: a sum in bf16 stops growing at 2^8 times its addends. Policies know the output as
    `PRODUCT`.
    """

    features: int
    dtype: Any = jnp.float32
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", xavier, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        # With two leading axes XLA's gradient on a CPU contracts over both, and takes up to three
        # times as long; on a TPU merging them copies, unless the tokens are a multiple of 8.
        rows = x.reshape(-1, x.shape[-1]) if sharding.platform() == "cpu" else x
        y = rows.astype(self.dtype) @ kernel.astype(self.dtype)
        y = (y.astype(jnp.float32) + bias).astype(self.dtype)
        return checkpoint_name(y.reshape(*x.shape[:-1], self.features), PRODUCT)


def _below(x: jax.Array) -> jax.Array:
    """`P(X <= x)` of a standard normal X, fp32. By `erf`, as in PyTorch: it takes half the time of
    `erfc`, and is less exact only where this is close to 0."""
    return 0.5 + 0.5 * jax.lax.erf(x.astype(jnp.float32) * math.sqrt(0.5))


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """`x P(X <= x)` of a standard normal X (Hendrycks & Gimpel, 2016), of the shape of `x`.

    Its gradient is one pass over `x`, which is all that it keeps; JAX's own takes four times as
    long on a CPU.
    """
    return (x * _below(x)).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return ((grad * (_below(x) + wide * density)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of bf16 queries, keys and values `[B, N, heads, D / heads]` by cuDNN's kernels.

    JAX differentiates these for an even number of tokens alone (up to 0.12 at least): an odd number
    gets another token, which is masked.
    """
    attend = partial(jax.nn.dot_product_attention, implementation="cudnn")
    batch, tokens = q.shape[:2]
    if tokens % 2 == 0:
        return attend(q, k, v)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full(batch, tokens, jnp.int32)
    x = attend(q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    return x[:, :tokens]


Rotary = tuple[jax.Array, jax.Array]  # cosines and sines fp32, each `[1 or B, N, 1, D / heads / 2]`


def rotate(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Queries or keys `[B, N, heads, D / heads]`, turned by their positions (RoPE; Su et al.,
    2021): of each head, channel i of the first half and of the second half are a pair."""
    cos, sin = rotary
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention `[B, N, D] -> [B, N, D]` with one qkv projection.

    `kind` is one of `ATTENTIONS`; cuDNN's works in bf16 only, XLA's takes its place in fp32.
    `rotary` are positions that turn queries and keys (`rotate`).
    """

    heads: int
    dtype: Any = jnp.float32
    kind: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, rotary: Rotary | None = None) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = Linear(3 * width, self.dtype, name="qkv")(x)
        # Kept as three: on a TPU each has a layout of its own, which taking them apart copies into.
        parts = (checkpoint_name(part, PRODUCT) for part in jnp.split(qkv, 3, axis=-1))
        q, k, v = (part.reshape(batch, tokens, self.heads, -1) for part in parts)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if self.kind == "cudnn" and q.dtype == jnp.bfloat16:
            x = cudnn_attention(q, k, v)
        else:
            x = jax.nn.dot_product_attention(q, k, v, implementation="xla")
        x = x.reshape(batch, tokens, width)
        return Linear(width, self.dtype, name="proj")(x)


def drop_paths(key: jax.Array, rate: float, batch: int, depth: int) -> jax.Array:
    """Stochastic depth (Huang et al., 2016): factors fp32 `[B, L, 2]` of the branches of each
    block, attention and MLP.

    A branch is dropped (factor 0) with a probability that rises linearly over the depth from 0 to
    `rate`; the factors of the others keep the mean.
    """
    kept = 1 - jnp.linspace(0, rate, depth)[:, None]
    return jax.random.bernoulli(key, kept, (batch, depth, 2)) / kept


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(x, scale, bias, eps):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + eps)
    y = (wide - mean) * (factor * scale) + bias
    return y.astype(x.dtype), (x, mean, factor, scale)


def _layer_norm_backward(eps, kept, grad):
    x, mean, factor, scale = kept
    grad = grad.astype(jnp.float32)
    normalised = (x.astype(jnp.float32) - mean) * factor
    scaled = grad * scale
    along = (scaled * normalised).mean(-1, keepdims=True)
    of_x = factor * (scaled - scaled.mean(-1, keepdims=True) - normalised * along)
    rows = (*range(x.ndim - 1),)
    return of_x.astype(x.dtype), (grad * normalised).sum(rows), grad.sum(rows)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba et al., 2016): computed in fp32, of the dtype and
    shape of its input.

    Its gradient is written out: on a CPU JAX's own makes a block take 5 % longer.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return _layer_norm(x, scale, bias, self.epsilon)


def _residual(x: jax.Array, y: jax.Array, factor: jax.Array | None) -> jax.Array:
    """`x + y`, `[B, N, D]`; with `factor [B]`, fp32, `x + factor * y`, rounded once."""
    return x + y if factor is None else (x + factor[:, None, None] * y).astype(x.dtype)


Parts = tuple[tuple[int, int | None], ...]  # of tokens: (first, end) of each part


class Block(nn.Module):
    """Transformer block; returns `(x, feature)`, the signature that a scan needs.

    Norms come before the two branches, with `post_norm` behind the sums. `paths [2, B]`, if given,
    are the branches' factors (`drop_paths`); `rotary` is for the attention. The feature is that of
    the `tapped` parts of its output (`_means`), None without any.
    """

    heads: int
    ln_eps: float = 1e-6
    dtype: Any = jnp.float32
    attention: str = "auto"
    post_norm: bool = False
    tapped: Parts = ()

    @nn.compact
    def __call__(
        self, x: jax.Array, paths: jax.Array | None = None, rotary: Rotary | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        width = x.shape[-1]

        def attend(y):
            return Attention(self.heads, self.dtype, self.attention, name="attn")(y, rotary)

        def mlp(y):
            y = gelu(Linear(4 * width, self.dtype, name="fc1")(y))
            return Linear(width, self.dtype, name="fc2")(y)

        factors = (None, None) if paths is None else paths
        for branch, name, factor in zip((attend, mlp), ("norm1", "norm2"), factors, strict=True):
            norm = LayerNorm(self.ln_eps, name=name)
            if self.post_norm:
                x = norm(_residual(x, branch(x), factor))
            else:
                x = _residual(x, branch(norm(x)), factor)
        # Without it the compiler may replace the batch sharding of the residual stream by that of
        # the weights, at several times the memory.
        x = sharding.constrain_batch(x)
        return x, _means(x, self.tapped) if self.tapped else None


# What a backward pass recomputes instead of storing it: nothing, everything within a block except
# its linear layers (with their biases: without them it would add each again), or everything within
# a block.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "blocks": jax.checkpoint_policies.nothing_saveable,
}


def scanned_blocks(module: nn.Module, depth: int, name: str, remat: str, **settings) -> nn.Module:
    """`depth` blocks of a module, with their parameters stacked along a leading layer axis; called
    with what a `Block` is, but `paths [L, 2, B]` are those of all, as are the features
    `[L, B, D]`. `settings` are the block's others."""
    policy, platform = REMAT[remat], sharding.platform()
    # A loop copies what its backward pass needs into a stack and out of it, which takes an eighth
    # of the time of a step on a CPU, where it fills the stack with zeros, too, and on a GPU.
    unrolled = depth <= _UNROLLED.get(platform, 0) and (not policy or platform == "gpu")
    # In a loop the compiler cannot undo what `remat` asks for.
    body = nn.remat(Block, policy=policy, prevent_cse=unrolled) if policy else Block
    blocks = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=depth,
        unroll=depth if unrolled else 1,
    )
    shared = module.heads, module.ln_eps, module.dtype, module.attention
    return blocks(*shared, name=name, **settings)


def position_embedding(module: nn.Module, grid: tuple[int, int]) -> jax.Array | np.ndarray:
    """The parameter `pos_embed [N, D]` of a module, if it has one; else the fixed embedding."""
    learned: jax.Array | None = module.get_variable("params", "pos_embed")
    return positions.sincos(grid, module.width) if learned is None else learned


def _rows(table: jax.Array | np.ndarray, keep: jax.Array | None) -> jax.Array:
    """A table `[N, D]` of the patches as `[1, N, D]`; with `keep [B, K]` its rows `[B, K, D]`."""
    table = jnp.asarray(table)
    return table[None] if keep is None else table[keep]


class ViT(nn.Module):
    """Encoder `[B, H, W, C] -> [B, T + N, D]`: class tokens, registers and patch tokens after the
    final norm (before it without `final_norm`).

    Class tokens are learned, and their mean is a feature; registers are learned, and are no part of
    any (Darcet et al., 2024).

    Parameters: `patch_embed`, `cls_token [1, cls_tokens, D]` and `register_token [1, registers, D]`
    (if there are any), `frozen_blocks` (the first `frozen_blocks` layers, if any), `blocks` (the
    other layers), `norm`. Both stacks have a leading layer axis: trained and frozen layers are
    separate leaves (`split_blocks`). A parameter `pos_embed [N, D]`, if there is one, is a learned
    position embedding and replaces the fixed one. `remat` is a key of `REMAT`.

    With `rope_theta` no position is added: those of this base turn queries and keys of the patches
    (DINOv3; `positions.rotary`). With `post_norm` there is a norm `embed_norm` of all tokens before
    the blocks, norms in the blocks are behind the sums, and there is no final one (data2vec 2).

    `tap`, a way to `pool`, has it return the features behind every block as well, `[L, B, D]`: of a
    block's output no more is kept than that.
    """

    width: int
    depth: int
    heads: int
    patch_size: int
    cls_tokens: int = 1
    registers: int = 0
    rope_theta: float | None = None
    post_norm: bool = False
    frozen_blocks: int = 0
    ln_eps: float = 1e-6
    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    final_norm: bool = True
    tap: str = ""

    @property
    def extra_tokens(self) -> int:
        """T: those before the patches."""
        return self.cls_tokens + self.registers

    def _tokens(self, name: str, count: int, batch: int) -> list[jax.Array]:
        """The parameter `[1, count, D]`, if there are any, for each image of a batch."""
        if not count:
            return []
        tokens = self.param(name, token_init, (1, count, self.width))
        # Broadcast before the cast, so that its gradient is summed over the batch in fp32.
        return [jnp.broadcast_to(tokens, (batch, count, self.width)).astype(self.dtype)]

    def _rotary(self, grid: tuple[int, int], keep: jax.Array | None) -> Rotary | None:
        """The positions of all tokens, if they are rotary; those that are no patches stay."""
        if self.rope_theta is None:
            return None
        of_grid = positions.rotary(grid, self.width // self.heads, self.rope_theta)
        angles = jnp.pad(_rows(of_grid, keep), ((0, 0), (self.extra_tokens, 0), (0, 0)))
        return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]

    @nn.compact
    def __call__(
        self, images: jax.Array, keep: jax.Array | None = None, paths: jax.Array | None = None
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Encodes images; with `keep [B, K]` only these patches, in this order (MAE).
        `paths [B, L, 2]` are the factors of the branches in `blocks` (`drop_paths`)."""
        grid = positions.grid(images.shape[1:3], self.patch_size)
        patches = patchify(images, self.patch_size)
        if keep is not None:
            # Pixels are gathered, not embedded patches: only the kept patches are embedded.
            patches = jnp.take_along_axis(patches, keep[..., None], axis=1)
        # As in MAE's code, where it is a convolution whose weight is drawn anew, its bias not.
        bias_init = _torch_bias(patches.shape[-1])
        x = Linear(self.width, self.dtype, bias_init, name="patch_embed")(patches)
        rotary = self._rotary(grid, keep)
        if rotary is None:
            x = x + _rows(position_embedding(self, grid), keep).astype(self.dtype)
        cls_tokens = self._tokens("cls_token", self.cls_tokens, len(x))
        registers = self._tokens("register_token", self.registers, len(x))
        x = sharding.constrain_batch(jnp.concatenate([*cls_tokens, *registers, x], axis=1))
        if self.post_norm:
            x = LayerNorm(self.ln_eps, name="embed_norm")(x)
        tapped = _parts(self, self.tap) if self.tap else ()
        stack = partial(scanned_blocks, self, post_norm=self.post_norm, tapped=tapped)
        inner = []
        if self.frozen_blocks:
            x, found = stack(self.frozen_blocks, "frozen_blocks", "none")(x, None, rotary)
            x = checkpoint_name(x, FROZEN)
            inner.append(found)
        if (rest := self.depth - self.frozen_blocks) > 0:
            layers = None if paths is None else jnp.moveaxis(paths, 0, -1)
            x, found = stack(rest, "blocks", self.remat)(x, layers, rotary)
            inner.append(found)
        if self.final_norm and not self.post_norm:
            x = LayerNorm(self.ln_eps, name="norm")(x)
        return (x, jnp.concatenate(inner)) if tapped else x


def split_blocks(params: dict, frozen_blocks: int) -> tuple[dict, dict]:
    """Splits parameters of a whole encoder into `(trained, frozen)`.

    Frozen are a learned position embedding and, if any blocks are frozen, what comes before them:
    the patch embedding, the class tokens, the registers, `embed_norm`; and these first blocks.
    """
    if not frozen_blocks:
        frozen = {k: v for k, v in params.items() if k == "pos_embed"}
        return {k: v for k, v in params.items() if k not in frozen}, frozen
    lower = jax.tree.map(lambda x: x[:frozen_blocks], params["blocks"])
    upper = jax.tree.map(lambda x: x[frozen_blocks:], params["blocks"])
    blocks = {"blocks": upper} if jax.tree.leaves(upper)[0].shape[0] else {}
    rest = {k: v for k, v in params.items() if k not in ("blocks", "norm")}
    norm = {"norm": params["norm"]} if "norm" in params else {}
    return norm | blocks, {**rest, "frozen_blocks": lower}


def merge_blocks(params: dict) -> dict:
    """The inverse of `split_blocks`, for the union of both parts: one stack `blocks [L, ...]`."""
    params = dict(params)
    if "frozen_blocks" in params:
        stacks = [params.pop(key) for key in ("frozen_blocks", "blocks") if key in params]
        params["blocks"] = jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)
    return params


def apply(module: nn.Module, variables: Mapping, *inputs, **settings) -> jax.Array:
    """`module.apply`, of a module that returns one array and changes no variables."""
    # Flax types it as a union with the pair that it returns where variables may change.
    return module.apply(variables, *inputs, **settings)  # type: ignore[return-value]


def _parts(model: ViT, how: str) -> Parts:
    """The tokens whose means are a feature: class tokens ("cls") or patches ("mean", "fc_norm")."""
    of = {"cls": (0, model.cls_tokens), "mean": (model.extra_tokens, None)}
    return tuple(of[part] for part in how.replace("fc_norm", "mean").split("+"))


def _means(tokens: jax.Array, parts: Parts) -> jax.Array:
    means = (tokens[:, first:end].astype(jnp.float32).mean(1) for first, end in parts)
    return jnp.concatenate([*means], axis=1)


def pool(model: ViT, tokens: jax.Array, how: str) -> jax.Array:
    """`[B, T + N, D]` -> fp32 `[B, D]`: the class token, of several their mean ("cls"), or the mean
    of the patches ("mean"); or `[B, 2 * D]`, both concatenated ("cls+mean")."""
    return _means(tokens, _parts(model, how))


def features(model: ViT, params: dict, images: jax.Array, how: str, **inputs) -> jax.Array:
    """Pooled features fp32 `[B, D]` of normalised images `[B, H, W, C]` (`pool`); for "fc_norm" the
    final norm of the mean of the patches, as in MAE's fine-tuning. `inputs` are the model's others.
    """
    return block_features(model, params, images, how, blocks=(), **inputs)[:, 0]


def block_features(
    model: ViT, params: dict, images: jax.Array, how: str, *, blocks: tuple[int, ...], **inputs
) -> jax.Array:
    """Features fp32 `[B, K + 1, D]` from one pass: those behind K `blocks`, counted from 0, pooled
    without a norm, and the final one (`features`)."""
    norm_of_mean = how == "fc_norm" and model.final_norm
    module = model.clone(
        final_norm=model.final_norm and not norm_of_mean, tap=how if blocks else ""
    )
    tokens = apply(module, {"params": params}, images, **inputs)
    tokens, inner = tokens if blocks else (tokens, None)
    x = pool(model, tokens, how)
    if norm_of_mean:
        x = apply(LayerNorm(model.ln_eps), {"params": params["norm"]}, x)
    taken = [] if inner is None else [inner[block] for block in blocks]
    return jnp.stack([*taken, x], axis=1)


# From the `model` section of a config

KIND = ("cls_tokens", "registers", "rope_theta", "post_norm")  # what is not a size


def size_of(model) -> Size:
    """Width, depth and heads: the variant's, unless they are set."""
    changes = {key: model[key] for key in Size._fields if model[key] is not None}
    return VARIANTS[model.variant]._replace(**changes)


def from_config(model, frozen_blocks: int = 0, remat: str = "none") -> ViT:
    """The encoder that a `model` section describes."""
    settings = dict(patch_size=model.patch_size, ln_eps=model.ln_eps, dtype=model.dtype)
    settings |= {key: model[key] for key in ("attention", *KIND)}
    return ViT(*size_of(model), frozen_blocks=frozen_blocks, remat=remat, **settings)


def are_sides(sides: tuple[int, ...], model) -> bool:
    """Whether they are the height and width of images that a model takes."""
    fit = (
        type(side) is int and 0 < side <= MAX_PIXELS and side % model.patch_size == 0
        for side in sides
    )
    return len(sides) == 2 and all(fit)


_UNITS = or_none(at_most(MAX_UNITS))
_SIDES = "(height, width), each a multiple of the patch size {patch_size}, and at most "
RULES: Rules = {
    "variant": one_of(VARIANTS),
    **dict.fromkeys(Size._fields, _UNITS),
    **dict.fromkeys(("patch_size", "channels", "ln_eps"), positive),
    **dict.fromkeys(("cls_tokens", "registers"), between(0, _MAX_TOKENS)),
    "rope_theta": or_none(positive),
    "pool": one_of(POOLS),
    "dtype": one_of(DTYPES),
    "attention": Rule(
        f"one of {ATTENTIONS}; cudnn needs an NVIDIA GPU, and model.dtype='bfloat16'",
        lambda v, model: (
            v in ATTENTIONS
            and (v != "cudnn" or (jax.default_backend() == "gpu" and model.dtype == "bfloat16"))
        ),
    ),
    "image_size": Rule(f"{_SIDES}{MAX_PIXELS:,}", are_sides),
}


def check(config) -> None:
    """Checks the `model` section of a config. Raises `UserError`."""
    configs.check(config, "model", RULES)
    size = size_of(config.model)
    check_width(config.model, "model.width", size.width, size.heads)
    check_pool(config.model, "config.model.pool", config.model.pool)
    if config.model.rope_theta is not None and size.width // size.heads % 4:
        raise UserError(
            f"config.model.rope_theta={config.model.rope_theta}: needs heads whose width is a "
            f"multiple of 4, not {size.width} / {size.heads} = {size.width // size.heads}"
        )


def blocks_rule(model) -> Rule:
    """Different blocks of the encoder, by their numbers."""
    depth = size_of(model).depth
    return Rule(
        f"different numbers of blocks, from 0 to {depth - 1}",
        lambda v, _: (
            len(set(v)) == len(v) and all(type(block) is int and 0 <= block < depth for block in v)
        ),
    )


def check_pool(model, key: str, how: str) -> None:
    """Raises `UserError` where a feature, of this key, needs what the encoder does not have."""
    if "cls" in how.split("+") and not model.cls_tokens:
        raise UserError(f"{key}={how!r}: the encoder has no class token; use mean or fc_norm")
    if how == "fc_norm" and model.post_norm:
        raise UserError(f"{key}={how!r}: a post-norm encoder has no final norm; use cls or mean")


def check_width(model, key: str, width: int, heads: int) -> None:
    """Raises `UserError` where a width, of config key `key`, does not fit the heads, or gives a
    position embedding (a row a patch) that is too large to compute."""
    if width % 4 or width % heads:
        raise UserError(f"config.{key}={width}: must be a multiple of 4 and of the {heads} heads")
    if model.attention == "cudnn" and width // heads % 8:
        raise UserError(
            f"config.model.attention='cudnn': config.{key}={width} must give each of the {heads} "
            f"heads a multiple of 8, not {width // heads}; or set config.model.attention=xla"
        )
    patches = math.prod(positions.grid(model.image_size, model.patch_size))
    if patches * width > _MAX_POSITIONS:
        raise UserError(
            f"config.model.image_size={model.image_size}: must be at most "
            f"{_MAX_POSITIONS // width:,} patches of {model.patch_size} x {model.patch_size} "
            f"pixels for a width of {width}"
        )
