"""Encoder, masking, losses and head against plain NumPy."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from maect_jax import config as configs
from maect_jax.errors import UserError
from maect_jax.models import mae, nnclr, positions, vit
from maect_jax.stages import losses
from tests.helpers.common import assert_trees_equal
from tests.helpers.tiny_stages import mae_stage_of


def np_layer_norm(x, p, eps):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * p["scale"] + p["bias"]


def np_linear(x, p):
    return x @ p["kernel"] + p["bias"]


def np_attention(x, p, heads, turns):
    batch, tokens, width = x.shape
    qkv = np_linear(x, p["qkv"])
    q, k, v = qkv.reshape(batch, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    if turns is not None:
        half = q.shape[-1] // 2
        turned = ((z[..., :half] + 1j * z[..., half:]) * turns[:, None] for z in (q, k))
        q, k = (np.concatenate([z.real, z.imag], -1) for z in turned)
    scores = q @ k.swapaxes(2, 3) / np.sqrt(width // heads)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np_linear((weights @ v).swapaxes(1, 2).reshape(x.shape), p["proj"])


def np_mlp(x, p):
    y = np_linear(x, p["fc1"])
    return np_linear(y * (1 + erf(y / np.sqrt(2))) / 2, p["fc2"])


def np_blocks(x, params, eps, turns=None):
    for layer in range(params["blocks"]["fc1"]["bias"].shape[0]):
        p = jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
        norm1, norm2 = (partial(np_layer_norm, p=p[name], eps=eps) for name in ("norm1", "norm2"))
        if "embed_norm" in params:
            x = norm1(x + np_attention(x, p["attn"], 2, turns))
            x = norm2(x + np_mlp(x, p))
        else:
            x = x + np_attention(norm1(x), p["attn"], 2, turns)
            x = x + np_mlp(norm2(x), p)
    return x


def np_tokens(params, batch):
    names = [name for name in ("cls_token", "register_token") if name in params]
    return [np.repeat(params[name], batch, 0) for name in names]


def np_vit(params, images, patch, eps, position=0, turns=None):
    batch, height, width, _ = images.shape
    patches = np.stack(
        [
            images[:, r : r + patch, c : c + patch].reshape(batch, -1)
            for r in range(0, height, patch)
            for c in range(0, width, patch)
        ],
        axis=1,
    )
    x = np_linear(patches, params["patch_embed"]) + position
    x = np.concatenate([*np_tokens(params, batch), x], 1)
    if "embed_norm" in params:
        return np_blocks(np_layer_norm(x, params["embed_norm"], eps), params, eps)
    return np_layer_norm(np_blocks(x, params, eps, turns), params["norm"], eps)


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def perturbed_vit(rng, model, images):
    """Parameters with random norms and biases, so that a forgotten one shows."""
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


@pytest.mark.parametrize(
    ("shape", "patch", "eps", "tokens"),
    [((8, 12, 3), 4, 1e-6, (1, 0)), ((9, 6, 1), 3, 1e-2, (3, 2)), ((4, 4, 5), 2, 1e-6, (0, 0))],
)
def test_encoder_equals_numpy(rng, shape, patch, eps, tokens):
    model = vit.ViT(16, 3, 2, patch, *tokens, ln_eps=eps)
    images = rng.normal(size=(2, *shape)).astype(np.float32)
    params = perturbed_vit(rng, model, images)
    position = positions.sincos((shape[0] // patch, shape[1] // patch), 16)
    expected = np_vit(float64(params), images, patch, eps, position)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply({"params": params}, images), expected, atol=2e-5)
    # A learned position embedding replaces the fixed one.
    learned = rng.normal(size=position.shape).astype(np.float32)
    got = apply({"params": {**params, "pos_embed": learned}}, images)
    expected = np_vit(float64(params), images, patch, eps, learned)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_a_post_norm_encoder_equals_numpy(rng):
    model = vit.ViT(16, 3, 2, 4, registers=1, post_norm=True, ln_eps=1e-2)
    images = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
    params = perturbed_vit(rng, model, images)
    assert "norm" not in params
    expected = np_vit(float64(params), images, 4, 1e-2, positions.sincos((2, 3), 16))
    np.testing.assert_allclose(
        jax.jit(model.apply)({"params": params}, images), expected, atol=2e-5
    )
    trained, frozen = vit.split_blocks(params, 1)
    assert trained.keys() == {"blocks"}  # what comes before the frozen blocks is frozen
    got = model.clone(frozen_blocks=1).apply({"params": trained | frozen}, images)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert_trees_equal(vit.merge_blocks(trained | frozen), params)


@pytest.mark.parametrize("extra", [(1, 2), (0, 0)])
def test_rotary_positions_equal_numpy(rng, extra):
    """Queries and keys of the patches turn by the centres of these, in whatever order they come;
    those of other tokens do not."""
    theta, model = 30.0, vit.ViT(16, 3, 2, 4, *extra, rope_theta=30.0)
    images = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
    params = perturbed_vit(rng, model, images)
    angles = [
        [2 * np.pi * centre * theta ** (-i / 2) for centre in (row, column) for i in (0, 1)]
        for row in (-1 / 2, 1 / 2)
        for column in (-2 / 3, 0, 2 / 3)
    ]
    turns = np.tile(np.exp(1j * np.array([[0.0] * 4] * sum(extra) + angles)), (2, 1, 1))
    expected = np_vit(float64(params), images, 4, 1e-6, turns=turns)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply({"params": params}, images), expected, atol=2e-5)
    trained, frozen = vit.split_blocks(params, 2)
    got = model.clone(remat="blocks", frozen_blocks=2).apply({"params": trained | frozen}, images)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    order = np.stack([rng.permutation(6) for _ in images])
    got = apply({"params": params}, images, order)
    moved = np.take_along_axis(expected[:, sum(extra) :], order[..., None], 1)
    np.testing.assert_allclose(got[:, sum(extra) :], moved, atol=2e-5)
    # In bf16 the turn is computed in fp32: no worse than the rest of bf16's rounding.
    rounded = model.clone(dtype="bfloat16").apply({"params": params}, images)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(rounded, float), expected, atol=0.1)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 2**-7)])
def test_gelu_and_its_gradient(rng, dtype, error):
    x = jnp.asarray(np.concatenate([rng.normal(0, 2, 500), [-30, -6, 0, 6, 30]]), dtype)
    cotangent = jnp.asarray(rng.normal(size=len(x)), dtype)
    value, gradient = jax.vjp(vit.gelu, x)
    wide = np.asarray(x, np.float64)
    below = 0.5 * (1 + erf(wide / np.sqrt(2)))
    slope = below + wide * np.exp(-(wide**2) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(np.asarray(value, float), wide * below, error, error)
    got = np.asarray(gradient(cotangent)[0], float)
    np.testing.assert_allclose(got, np.asarray(cotangent, float) * slope, error, error)
    assert gradient(cotangent)[0].dtype == value.dtype == x.dtype


@pytest.mark.parametrize(("dtype", "error"), [("float32", 2e-6), ("bfloat16", 2**-7)])
def test_layer_norm_and_its_gradients(rng, dtype, error):
    x, cotangent = (jnp.asarray(rng.normal(3, 2, size=(5, 7, 16)), dtype) for _ in range(2))
    params = {key: jnp.asarray(rng.normal(size=16), "float32") for key in ("scale", "bias")}

    def norm(module):
        return lambda params, x: module.apply({"params": params}, x)

    value, gradients = jax.vjp(norm(vit.LayerNorm(1e-2)), params, x)
    flax = norm(nn.LayerNorm(1e-2, use_fast_variance=False))
    expected, plain_gradients = jax.vjp(flax, params, x.astype("float32"))
    assert value.dtype == x.dtype
    of_params, of_x = gradients(cotangent)
    assert of_x.dtype == x.dtype
    assert of_params["scale"].dtype == jnp.float32
    wide = plain_gradients(cotangent.astype("float32"))
    pairs = zip(
        jax.tree.leaves((value, of_params, of_x)), jax.tree.leaves((expected, wide)), strict=True
    )
    for got, want in pairs:
        scale = np.abs(want).max()
        np.testing.assert_allclose(np.asarray(got, float) / scale, want / scale, atol=error)


def test_the_attention_of_a_gpu_is_asked_for(rng, monkeypatch):
    """cuDNN's in bf16; in fp32, which it lacks, XLA's."""
    asked = []
    attention = jax.nn.dot_product_attention

    def noted(q, k, v, implementation, **lengths):
        asked.append((str(q.dtype), implementation))
        return attention(q, k, v, **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", noted)
    x = jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float32):
        vit.Attention(2, dtype, "cudnn").init(jax.random.key(0), x)
    vit.Attention(2, jnp.bfloat16).init(jax.random.key(0), x)
    turns = 2 * [jnp.ones((1, 5, 1, 4))]  # fp32, as those of rotary positions are
    vit.Attention(2, jnp.bfloat16, "cudnn").init(jax.random.key(0), x, turns)
    cudnn, xla = ("bfloat16", "cudnn"), ("bfloat16", "xla")
    assert asked == [cudnn, ("float32", "xla"), xla, cudnn]


@pytest.mark.parametrize("tokens", [4, 5])
def test_the_token_that_cudnn_wants_changes_nothing(rng, monkeypatch, tokens):
    """XLA's attention in its place, which takes any number: values and gradients are its own."""
    attention, seen = jax.nn.dot_product_attention, set()

    def even_only(q, k, v, implementation, **lengths):
        seen.add((implementation, q.shape[1]))
        return attention(q, k, v, **lengths)

    q, k, v, cotangent = jnp.asarray(rng.normal(size=(4, 2, tokens, 3, 8)), jnp.float32)
    want, want_back = jax.vjp(attention, q, k, v)
    monkeypatch.setattr(jax.nn, "dot_product_attention", even_only)
    got, back = jax.vjp(vit.cudnn_attention, q, k, v)
    assert seen == {("cudnn", tokens + tokens % 2)}
    for x, y in zip((got, *back(cotangent)), (want, *want_back(cotangent)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("tokens", [50, 197, 257])
@pytest.mark.parametrize("width", [64, 80])
def test_jax_differentiates_cudnn_attention(monkeypatch, tokens, width):
    """As far as JAX checks sizes without a GPU."""
    checks = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{checks}.check_cudnn_version", lambda: 91_000)
    q, k, v = 3 * (jax.ShapeDtypeStruct((2, tokens, 16, width), jnp.bfloat16),)
    gradient = jax.grad(lambda *qkv: vit.cudnn_attention(*qkv).astype(jnp.float32).sum())
    assert jax.eval_shape(gradient, q, k, v).shape == q.shape


def test_cudnn_refuses_heads_that_are_no_multiple_of_8(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    sizes = ["model.attention=cudnn", "model.heads=8"]
    vit.check(configs.load("ct_vitb16", [*sizes, "model.width=192"]))
    with pytest.raises(UserError, match=r"model.width=200 must give each of the 8 heads a mult"):
        vit.check(configs.load("ct_vitb16", [*sizes, "model.width=200"]))


def test_position_embedding_by_hand():
    table = positions.sincos((2, 3), 8)
    row, col = 1, 2
    angles = [col, col / 100, row, row / 100]
    expected = [*np.sin(angles[:2]), *np.cos(angles[:2]), *np.sin(angles[2:]), *np.cos(angles[2:])]
    np.testing.assert_allclose(table[row * 3 + col], expected, rtol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_split_encoder_is_the_same_function_and_merges_back(rng, frozen):
    images = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    whole = vit.ViT(16, 3, 2, 4)
    params = jax.jit(whole.init)(jax.random.key(0), images)["params"]
    trained, kept = vit.split_blocks(params, frozen)
    assert not set(trained) & set(kept)
    split = whole.clone(frozen_blocks=frozen)
    np.testing.assert_allclose(
        jax.jit(split.apply)({"params": {**kept, **trained}}, images),
        jax.jit(whole.apply)({"params": params}, images),
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    assert_trees_equal(vit.merge_blocks({**kept, **trained}), params)
    # A learned position embedding is never trained.
    trained, kept = vit.split_blocks({**params, "pos_embed": 0}, frozen)
    assert "pos_embed" in kept
    assert "pos_embed" not in trained


@pytest.mark.parametrize(
    ("kind", "how", "frozen"),
    [({"registers": 2, "cls_tokens": 0}, "fc_norm", 2), ({"post_norm": True}, "cls+mean", 0)],
)
def test_features_behind_a_block_are_those_of_an_encoder_that_ends_there(rng, kind, how, frozen):
    model, blocks = vit.ViT(16, 3, 2, 4, **kind), (2, 0)
    images = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    params = perturbed_vit(rng, model, images)
    trained, kept = vit.split_blocks(params, frozen)
    whole = model.clone(frozen_blocks=frozen)
    get = jax.jit(partial(vit.block_features, whole, how=how), static_argnames="blocks")
    got, final = (get(trained | kept, images, blocks=numbers) for numbers in (blocks, ()))
    np.testing.assert_allclose(got[:, -1:], final, atol=2e-6)
    for place, block in enumerate(blocks):
        ends = model.clone(depth=block + 1, final_norm=False)
        stack = jax.tree.map(lambda x, n=block: x[: n + 1], params["blocks"])
        want = vit.features(ends, params | {"blocks": stack}, images, how)
        np.testing.assert_allclose(got[:, place], want, atol=2e-6)


def test_pool(rng):
    tokens, model = rng.normal(size=(2, 5, 3)).astype(np.float32), vit.ViT(3, 1, 1, 1)
    np.testing.assert_array_equal(vit.pool(model, tokens, "cls"), tokens[:, 0])
    several = model.clone(cls_tokens=2, registers=1)
    for part, how, first, last in (
        (model, "mean", 1, 5), (several, "cls", 0, 2), (several, "mean", 3, 5),
        (model.clone(cls_tokens=0), "mean", 0, 5),
    ):  # fmt: skip
        got = vit.pool(part, tokens, how)
        np.testing.assert_allclose(got, tokens[:, first:last].mean(1), rtol=1e-5)
    half = jnp.asarray(tokens, jnp.bfloat16)  # pooled in fp32 all the same
    for how in ("cls", "mean"):
        got = vit.pool(model, half, how)
        np.testing.assert_array_equal(got, vit.pool(model, half.astype(jnp.float32), how))
        assert got.dtype == jnp.float32


def test_patches_round_trip(rng):
    images = rng.normal(size=(2, 6, 8, 3))
    patches = vit.patchify(images, 2)
    np.testing.assert_array_equal(patches[1, 5], images[1, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(vit.unpatchify(patches, 2, (3, 4)), images)


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 4), (0.5, 8), (0.0, 16), (0.9, 1)])
def test_mask_keeps_the_smallest_noise(rng, ratio, kept):
    noise = rng.random((3, 16))
    keep, restore, mask = (np.asarray(x) for x in mae.random_mask(jnp.asarray(noise), ratio))
    for i in range(3):
        np.testing.assert_array_equal(keep[i], np.argsort(noise[i])[:kept])
        assert mask[i].sum() == 16 - kept
        assert not mask[i][keep[i]].any()
        # Kept-then-removed, put back by `restore`, is the original order.
        np.testing.assert_array_equal(np.argsort(noise[i])[restore[i]], np.arange(16))


def test_encoder_sees_only_the_kept_patches(rng):
    model = vit.ViT(16, 2, 2, 4)
    images = rng.normal(size=(1, 8, 8, 1)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    keep = jnp.array([[2, 1]])
    apply = jax.jit(model.apply)
    seen = apply({"params": params}, images, keep)
    assert seen.shape == (1, 3, 16)
    images[:, :4, :4], images[:, 4:, 4:] = 9.0, -9.0  # patches 0 and 3
    np.testing.assert_array_equal(apply({"params": params}, images, keep), seen)


@pytest.mark.parametrize("tokens", [(1, 0), (3, 2)])
def test_mae_forward_equals_numpy(rng, tokens):
    """Masking, encoder, decoder and loss together, for a grid that is not square."""
    count = sum(tokens)
    images = rng.normal(size=(2, 6, 8, 3)).astype(np.float32)
    noise = rng.random((2, 12))
    encoder, decoder = vit.ViT(16, 2, 2, 2, *tokens), mae.Decoder(8, 2, 2, 2, 3, count)
    stage = mae_stage_of(encoder, decoder, (6, 8, 3), 0.75)
    params = jax.jit(stage.init)(jax.random.key(0), {}).params
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    got = jax.jit(stage.forward)(params, images, jnp.asarray(noise))
    p = float64(params)
    kept = np.argsort(noise, 1)[:, :3]
    patches = np.asarray(vit.patchify(images, 2), np.float64)
    x = np_linear(patches, p["encoder"]["patch_embed"]) + positions.sincos((3, 4), 16)
    x = np.stack([row[keep] for row, keep in zip(x, kept, strict=True)])
    latent = np.concatenate([*np_tokens(p["encoder"], 2), x], 1)
    latent = np_layer_norm(np_blocks(latent, p["encoder"], 1e-6), p["encoder"]["norm"], 1e-6)
    np.testing.assert_allclose(got["latent"], latent, atol=2e-5)
    d = p["decoder"]
    y = np_linear(latent, d["embed"])
    full = np.repeat(d["mask_token"], 2, 0).repeat(12, 1)
    for i, keep in enumerate(kept):
        full[i, keep] = y[i, count:]
    full = np.concatenate([y[:, :count], full + positions.sincos((3, 4), 8)], 1)
    full = np_layer_norm(np_blocks(full, d, 1e-6), d["norm"], 1e-6)
    prediction = np_linear(full[:, count:], d["pred"])
    np.testing.assert_allclose(got["prediction"], prediction, atol=5e-5)
    mean, var = patches.mean(-1, keepdims=True), patches.var(-1, keepdims=True, ddof=1)
    errors = ((prediction - (patches - mean) / np.sqrt(var + 1e-6)) ** 2).mean(-1)
    removed = np.ones((2, 12), bool)
    np.put_along_axis(removed, kept, False, axis=1)
    np.testing.assert_allclose(got["loss"], errors[removed].mean(), rtol=1e-5)


def test_bf16_sums_its_gradients_over_the_batch_in_fp32(rng):
    """Of biases, scales and tokens: 10,000 addends of one sign, where a sum in bf16 loses a third
    and more; what is left is the rounding of the addends (2^-8 each)."""
    images = jnp.asarray(rng.normal(size=(400, 8, 10, 3)), jnp.float32)
    noise, towards = jnp.asarray(rng.random((400, 20))), jnp.asarray(rng.normal(size=12))

    def gradient(dtype):
        networks = vit.ViT(16, 1, 2, 2, dtype=dtype), mae.Decoder(16, 1, 2, 2, 3, dtype=dtype)
        stage = mae_stage_of(*networks, (8, 10, 3), 0.5)
        params = jax.jit(stage.init)(jax.random.key(0), {}).params
        return jax.jit(
            jax.grad(lambda p: (stage.forward(p, images, noise)["prediction"] * towards).sum())
        )(params)

    exact = gradient("float32")
    for (path, x), y in zip(
        jax.tree.leaves_with_path(exact), jax.tree.leaves(gradient("bfloat16")), strict=True
    ):
        x, y = (np.delete(g, np.s_[16:32], -1) if g.shape[-1] == 48 else g for g in (x, y))
        error = np.linalg.norm(y - x) / np.linalg.norm(x)
        assert error < 0.05, (jax.tree_util.keystr(path), error)


def test_reconstruction_loss_equals_numpy(rng):
    images = rng.normal(size=(2, 4, 4, 3)).astype(np.float32)
    patches = np.asarray(vit.patchify(images, 2), np.float64)
    mean, var = patches.mean(-1, keepdims=True), patches.var(-1, keepdims=True, ddof=1)
    target = (patches - mean) / np.sqrt(var + 1e-6)
    np.testing.assert_allclose(losses.patch_targets(images, 2), target, rtol=1e-4, atol=1e-5)
    prediction, mask = rng.normal(size=target.shape), np.array([[1, 0, 1, 1], [0, 0, 0, 1.0]])
    per_patch = ((prediction - target) ** 2).mean(-1)
    expected = per_patch[mask == 1].mean()
    np.testing.assert_allclose(losses.reconstruction(prediction, target, mask), expected, rtol=1e-6)
    assert losses.reconstruction(prediction, target, 0 * mask) == 0


def test_contrastive_loss_equals_numpy(rng):
    neighbours, predicted = rng.normal(size=(2, 6, 8))
    neighbours /= np.linalg.norm(neighbours, axis=1, keepdims=True)
    unit = predicted / np.linalg.norm(predicted, axis=1, keepdims=True)
    logits = neighbours @ unit.T / 0.3
    expected = np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))
    got = losses.nearest_neighbour(jnp.asarray(neighbours), jnp.asarray(predicted), 0.3)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_batch_norm_equals_numpy(rng):
    x = rng.normal(3, 2, size=(6, 4)).astype(np.float32)
    norm = nnclr.BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=True)
    y, new = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    mean, var = x.mean(0, dtype=np.float64), x.var(0, dtype=np.float64)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-4, atol=1e-6)
    stats = new["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-5)
    stats = {"mean": np.full(4, 2.0), "var": np.full(4, 4.0)}
    y = norm.apply({"params": variables["params"], "batch_stats": stats}, x, train=False)
    np.testing.assert_allclose(y, (x - 2) / np.sqrt(4 + 1e-5), rtol=1e-5)


def test_batch_norm_is_fp32_whatever_comes_in(rng):
    x = jnp.asarray(rng.normal(3, 0.1, size=(6, 4)), jnp.bfloat16)
    norm = nnclr.BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=True)
    got, exact = (
        norm.apply(variables, y, train=True, mutable=["batch_stats"])
        for y in (x, x.astype(jnp.float32))
    )
    assert_trees_equal(got, exact)
    assert got[0].dtype == jnp.float32


def test_head_is_initialised_like_pytorch_linear():
    init = jax.jit(partial(nnclr.Projector(400, 30).init, train=True))
    params = init(jax.random.key(0), jnp.zeros((2, 100)))
    kernel = params["params"]["fc1"]["kernel"]
    assert kernel.shape == (100, 400)
    np.testing.assert_allclose(jnp.abs(kernel).max(), 1 / np.sqrt(100), rtol=1e-3)
    np.testing.assert_allclose(kernel.std(), 1 / np.sqrt(3 * 100), rtol=0.01)


def test_transformer_is_initialised_like_mae():
    init = jax.jit(vit.ViT(64, 2, 4, 8).init)
    params = init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    fans = {"patch_embed": (192, 64), "qkv": (64, 192), "fc1": (64, 256)}
    kernels = dict(
        patch_embed=params["patch_embed"]["kernel"],
        qkv=params["blocks"]["attn"]["qkv"]["kernel"],
        fc1=params["blocks"]["fc1"]["kernel"],
    )
    for name, (fan_in, fan_out) in fans.items():
        bound = np.sqrt(6 / (fan_in + fan_out))
        np.testing.assert_allclose(jnp.abs(kernels[name]).max(), bound, rtol=1e-2)
        np.testing.assert_allclose(kernels[name].std(), bound / np.sqrt(3), rtol=0.05)
    assert not jnp.array_equal(kernels["fc1"][0], kernels["fc1"][1])
    np.testing.assert_allclose(params["cls_token"].std(), 0.02, rtol=0.3)
    bias, bound = params["patch_embed"]["bias"], 1 / np.sqrt(192)
    np.testing.assert_allclose([bias.min(), bias.max()], [-bound, bound], rtol=0.1)
    for zero in (params["blocks"]["fc1"]["bias"], params["norm"]["bias"]):
        assert not zero.any()
