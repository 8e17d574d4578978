"""PyTorch as a second witness: the block, the head's BatchNorm and AdamW (extra `[torch]`)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maect_jax import optim
from maect_jax.models import nnclr, vit

torch = pytest.importorskip("torch", reason="the extra [torch] is not installed")


def tensor(x):
    return torch.tensor(np.asarray(x))


def test_block_equals_pytorchs_encoder_layer(rng):
    """Also in bf16, within its rounding: 2^-8 relative at each of a block's dozen operations."""
    x = rng.normal(size=(2, 7, 32)).astype(np.float32)
    params = vit.Block(4).init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
    layer = torch.nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True,
        norm_first=True,
    )  # fmt: skip
    names = {
        "self_attn.in_proj": params["attn"]["qkv"],
        "self_attn.out_proj": params["attn"]["proj"],
        "linear1": params["fc1"],
        "linear2": params["fc2"],
    }
    state = {}
    for name, p in names.items():
        joint = "_" if name.endswith("in_proj") else "."
        state[f"{name}{joint}weight"], state[f"{name}{joint}bias"] = (
            tensor(p["kernel"].T), tensor(p["bias"]),
        )  # fmt: skip
    for name in ("norm1", "norm2"):
        state[f"{name}.weight"] = tensor(params[name]["scale"])
        state[f"{name}.bias"] = tensor(params[name]["bias"])
    layer.load_state_dict(state)
    with torch.no_grad():
        expected = layer(tensor(x)).numpy()
    got, _ = vit.Block(4).apply({"params": params}, x)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    half, _ = vit.Block(4, dtype="bfloat16").apply({"params": params}, jnp.bfloat16(x))
    assert half.dtype == jnp.bfloat16
    error = np.linalg.norm(np.float32(half) - expected) / np.linalg.norm(expected)
    assert error < 12 * 2**-8


def test_batch_norm_in_training_and_its_gradient(rng):
    x, weight = rng.normal(3, 2, (6, 4)).astype(np.float32), rng.normal(size=(6, 4))
    norm, peer = nnclr.BatchNorm(), torch.nn.BatchNorm1d(4)
    variables = norm.init(jax.random.key(0), x, train=True)
    stats = variables["batch_stats"]
    inputs = tensor(x).requires_grad_()
    for _ in range(3):
        (peer(inputs) * tensor(weight)).sum().backward()
        inputs_grad, inputs.grad = inputs.grad.numpy(), None

        def loss(x, stats=stats):
            collections = {"params": variables["params"], "batch_stats": stats}
            y, new = norm.apply(collections, x, train=True, mutable=["batch_stats"])
            return (y * weight).sum(), new["batch_stats"]

        grad, stats = jax.grad(loss, has_aux=True)(x)
        np.testing.assert_allclose(grad, inputs_grad, atol=1e-5)
    np.testing.assert_allclose(stats["mean"], peer.running_mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], peer.running_var, rtol=1e-5)


def test_adamw_equals_pytorchs(rng):
    kernel = rng.normal(size=(5, 3)).astype(np.float32)
    params = {"a": {"kernel": kernel}}
    tx = optim.adamw(params, {"a": optim.Group(0.01, 0.05)}, steps=6, warmup=2)
    opt_state = tx.init(params)
    weight = torch.nn.Parameter(tensor(kernel))
    peer = torch.optim.AdamW([weight], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
    for step in range(6):
        grad = rng.normal(size=(5, 3)).astype(np.float32)
        updates, opt_state = tx.update({"a": {"kernel": grad}}, opt_state, params)
        params = optax.apply_updates(params, updates)
        peer.param_groups[0]["lr"] = 0.01 * float(optim.schedule(6, 2)(step))
        weight.grad = tensor(grad)
        peer.step()
        np.testing.assert_allclose(params["a"]["kernel"], weight.detach(), rtol=1e-5, atol=1e-7)
