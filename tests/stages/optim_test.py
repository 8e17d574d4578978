"""Schedule, per-tensor rates and AdamW against formulas and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maect_jax.models import vit
from maect_jax.stages import optim


@pytest.mark.parametrize(("steps", "warmup"), [(10, 3), (7, 0), (5, 5)])
def test_schedule_by_formula(steps, warmup):
    factor = optim.schedule(steps, warmup)
    for step in range(steps):
        if step < warmup:
            expected = (step + 1) / (warmup + 1)
        else:
            expected = (1 + np.cos(np.pi * (step - warmup) / (steps - warmup))) / 2
        np.testing.assert_allclose(factor(step), expected, rtol=1e-5)


def test_learning_rate_counts_every_view():
    # The paper's: 1.5e-4 * 1024 images * 2 views / 256.
    assert optim.scaled_lr(1.5e-4, 1024, views=2) == pytest.approx(1.2e-3)
    assert optim.scaled_lr(0.1, 1024, views=1) == pytest.approx(0.4)


def encoder_params(frozen):
    model = vit.ViT(16, 4, 2, 4)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    return vit.split_blocks(params, frozen)[0]


def test_layer_decay_and_weight_decay_of_every_tensor():
    group = optim.Group(lr=2.0, weight_decay=0.05, layer_decay=0.5, depth=4)
    lrs, decays = optim.per_tensor({"encoder": encoder_params(2)}, {"encoder": group})
    lrs, decays = lrs["encoder"], decays["encoder"]
    # Block i of depth D: lr * decay^(D - i); here blocks 2 and 3 of 4.
    for leaf in jax.tree.leaves(lrs["blocks"]):
        np.testing.assert_allclose(leaf.ravel(), [2 * 0.5**2, 2 * 0.5])
    assert lrs["norm"]["scale"] == lrs["norm"]["bias"] == 2.0
    assert decays["blocks"]["fc1"] == {"kernel": 0.05, "bias": 0.0}
    assert decays["blocks"]["norm1"] == {"scale": 0.0, "bias": 0.0}

    lrs, decays = optim.per_tensor({"encoder": encoder_params(0)}, {"encoder": group})
    lrs, decays = lrs["encoder"], decays["encoder"]
    np.testing.assert_allclose(lrs["patch_embed"]["kernel"], 2 * 0.5**5)
    np.testing.assert_allclose(lrs["cls_token"], 2 * 0.5**5)
    assert decays["cls_token"] == 0.05


def test_adamw_equals_numpy(rng):
    params = {"a": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}}
    groups = {"a": optim.Group(lr=0.1, weight_decay=0.3)}
    tx = optim.adamw(params, groups, steps=5, warmup=2)
    got, opt_state = params, tx.init(params)
    want = jax.tree.map(np.array, params)
    m = v = jax.tree.map(np.zeros_like, want)
    for step in range(5):
        grads = {"a": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}}
        updates, opt_state = tx.update(grads, opt_state, got)
        got = optax.apply_updates(got, updates)
        lr = 0.1 * float(optim.schedule(5, 2)(step))
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, grads)

        def update(p, m, v, wd, step=step, lr=lr):
            m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
            return p - lr * wd * p - lr * m_hat / (np.sqrt(v_hat) + 1e-8)

        decay = {"a": {"kernel": 0.3, "bias": 0.0}}
        want = jax.tree.map(update, want, m, v, decay)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_each_group_ends_at_its_own_rate():
    groups = {
        "encoder": optim.Group(0.1, 0.0, end_lr=1e-3),
        "projector": optim.Group(0.2, 0.0, end_lr=1e-3),
        "predictor": optim.Group(0.2, 0.0),
    }
    params = {name: {"kernel": jnp.ones(2)} for name in groups}
    tx = optim.adamw(params, groups, steps=4, warmup=1)
    opt_state = tx.init(params)
    for step in range(5):
        # Adam's update for a constant gradient of 1 is the learning rate.
        updates, opt_state = tx.update(params, opt_state, params)
        for name, group in groups.items():
            fall = (1 + np.cos(np.pi * (step - 1) / 3)) / 2
            wanted = group.end_lr + (group.lr - group.end_lr) * fall if step else group.lr / 2
            np.testing.assert_allclose(-updates[name]["kernel"], wanted, rtol=1e-5, atol=1e-9)
