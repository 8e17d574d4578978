"""PyTorch as a second witness (extra `[torch]`): block, BatchNorm, AdamW, and whole steps."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maect_jax.models import nnclr, vit
from maect_jax.stages import optim
from tests.helpers import ROOT

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


def test_parity_on_other_sizes_than_those_of_the_figures(tmp_path):
    """The tests of parity and of bf16 on figures that PyTorch makes: images that are not square,
    every pooling, nothing or everything frozen, other patches, schedules and batches."""
    from tests.helpers import torch_peer

    sizes = dict(width=24, heads=3)
    torch_peer.mae(
        tmp_path / "mae_wide.npz", 0, image_size=(8, 20), patch_size=4, depth=2, mask_ratio=0.6,
        dec_width=16, dec_depth=1, dec_heads=2, batch=3, **sizes,
    )  # fmt: skip
    torch_peer.mae(
        tmp_path / "mae_14.npz", 1, image_size=42, patch_size=14, depth=1, mask_ratio=0.9,
        dec_width=32, dec_depth=3, dec_heads=4, batch=5, **sizes,
    )  # fmt: skip
    head = dict(proj_hidden=32, pred_hidden=48, output_dim=12, encoder_lr=1e-3, head_lr=5e-4)
    shared = dict(**sizes, **head, depth=3, temperature=0.15, target_factor=0.995, steps=3)
    torch_peer.ct(
        tmp_path / "ct_all_trained.npz", 5, image_size=(12, 8), patch_size=4, frozen_blocks=0,
        queue_size=36, queue_ptr=24, batch=12, warmup_percent=0, total_steps=9,
        pooling="mean_patch", **shared,
    )  # fmt: skip
    torch_peer.ct(
        tmp_path / "ct_one_trained.npz", 3, image_size=21, patch_size=7, frozen_blocks=2,
        queue_size=50, queue_ptr=0, batch=10, warmup_percent=50, total_steps=4,
        pooling="class_token", **shared,
    )  # fmt: skip
    torch_peer.ct(
        tmp_path / "ct_all_frozen.npz", 4, image_size=16, patch_size=8, frozen_blocks=3,
        queue_size=8, queue_ptr=0, batch=8, warmup_percent=20, total_steps=20,
        pooling="class_token", **shared,
    )  # fmt: skip
    files = ["tests/parity_test.py", "tests/bf16_test.py"]
    command = [sys.executable, "-m", "pytest", "-q", *files]
    environment = {**os.environ, "MAECT_GOLDEN": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
