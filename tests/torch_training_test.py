"""The trainer in plain PyTorch that benchmarks use does what the package does (extra `[torch]`)."""

import copy
import re

import jax
import numpy as np
import pytest

from maect_jax import config as configs
from maect_jax import load_encoder
from maect_jax.convert import names as convert
from maect_jax.stages import STAGES, optim
from tests.helpers.contrast_run import behind
from tests.helpers.golden_figures import prefixed

torch = pytest.importorskip("torch", reason="the extra [torch] is not installed")
from benchmarks import torch_training  # noqa: E402
from tests.helpers import torch_peer  # noqa: E402

IMAGES = 8000


def quickstart(*overrides):
    return configs.load("quickstart:test", overrides)


def to_torch(config, stage, params):
    """Parameters of a stage under the trainer's names."""
    parts = {}
    if "projector" in params:
        parts["head"] = convert.head_to_torch({"params": params})
    if "encoder" in params:
        trained = convert.encoder_to_torch(params["encoder"], config.model.patch_size)
        parts["encoder"] = behind(STAGES[stage].frozen_blocks(config), trained)
    if "decoder" in params:
        parts["decoder"] = convert.decoder_to_torch(params["decoder"])
    return {key.replace("/", "."): x for key, x in prefixed(**parts).items()}


def listed(updates, key):
    """What the groups of the trainer have under a key, by parameter."""
    found = {}
    for group in updates.optimiser.param_groups:
        names = group["param_names"]
        values = group[key] if key == "params" else [group[key]] * len(names)
        found |= dict(zip(names, values, strict=True))
    return found


@pytest.mark.parametrize("name", torch_training.STEPS)
def test_every_learning_rate_and_weight_decay_is_the_packages(name):
    config = quickstart("ct.layer_decay=0.65", "ct.frozen_blocks=1", "ct.epochs=2")
    stage = STAGES[name].from_config(config, IMAGES)
    params = jax.eval_shape(stage.init, jax.random.key(0), {}).params
    trainer = torch_training.Trainer(config, IMAGES)
    torch_training.STEPS[name](trainer)
    updates = trainer.updates
    assert (updates.steps, updates.warmup) == (stage.steps, stage.warmup)
    lrs, decays = optim.per_tensor(params, stage.groups)

    def ours(tree):
        full = jax.tree.map(lambda x, p: np.broadcast_to(x, p.shape), tree, params)
        return {key: x.flat[0] for key, x in to_torch(config, name, full).items()}

    assert ours(decays) == listed(updates, "weight_decay")
    for step in (0, stage.warmup - 1, stage.warmup, stage.steps // 2, stage.steps - 1):
        updates.done = step
        updates.set_rates()
        now = optim.factors(stage.groups, stage.steps, stage.warmup, step=step)
        scaled = {part: jax.tree.map(lambda x, f=now[part]: f * x, lrs[part]) for part in lrs}
        want, got = ours(scaled), listed(updates, "lr")
        assert want.keys() == got.keys()
        for key in want:
            np.testing.assert_allclose(got[key], want[key], rtol=1e-4, atol=1e-12, err_msg=key)


def test_weights_start_from_the_packages_distributions():
    config = quickstart("model.width=96", "model.heads=3", "mae.decoder.width=64")
    trainer = torch_training.Trainer(config, IMAGES)
    for name in ("mae", "head"):
        stage = STAGES[name].from_config(config, IMAGES)
        params = jax.jit(stage.init)(jax.random.key(0), {}).params
        torch_training.STEPS[name](trainer)
        ours, theirs = to_torch(config, name, params), listed(trainer.updates, "params")
        for key, x in ours.items():
            y = theirs[key].detach().numpy()
            assert y.shape == x.shape
            assert np.ptp(x) > 0 or np.array_equal(x, y), key
            rtol = 0.05 if x.size > 1000 else 0.4
            np.testing.assert_allclose(y.std(), x.std(), rtol=rtol, err_msg=key)


def test_steps_of_ct_compute_what_the_reference_does():
    """With the nearest neighbour. In the second step the rows of the images themselves are in the
    queue, and would be the nearest."""
    config = quickstart("ct.top_k=1", "ct.ema_decay=0.9", "ct.queue_size=16")
    torch.manual_seed(0)
    trainer = torch_training.Trainer(config, IMAGES)
    step = torch_training.STEPS["ct"](trainer)
    encoder, head = trainer.encoder, trainer.head
    views, own = torch.randn(12, 2, 1, 28, 28), torch.arange(12)
    meta = dict(pooling="class_token", temperature=config.ct.temperature)
    average, target = (
        {name: p.clone() for name, p in module.named_parameters()}
        for module in (trainer.average, head.target_projector)
    )
    for place in (0, 12):
        queue = dict(queue=head.queue.clone(), queue_id=head.ids.clone())
        reference = copy.deepcopy(encoder), copy.deepcopy(head), queue, views.transpose(0, 1), own
        _, _, projected, _, loss = torch_peer.forward(*reference, meta)
        np.testing.assert_allclose(step(views, own), loss.detach(), rtol=1e-5)
        rows = (place + np.arange(12)) % 16
        np.testing.assert_allclose(head.queue[rows], projected[0], atol=1e-6)
        assert head.ids[rows].tolist() == own.tolist()
        for means, got, new, decay in (
            (average, trainer.average, encoder, 0.9),
            (target, head.target_projector, head.projector, config.ct.target_factor),
        ):
            for name, p in new.named_parameters():
                means[name] = decay * means[name] + (1 - decay) * p.detach()
                torch.testing.assert_close(got.get_parameter(name).detach(), means[name])


def test_an_encoder_is_read_from_its_file(tmp_path, rng):
    trainer = torch_training.Trainer(quickstart(), IMAGES)
    torch_training.write(trainer.encoder, tmp_path / "mae.safetensors", heads=2)
    images = rng.integers(0, 256, (4, 28, 28, 1), np.uint8)
    got = load_encoder(tmp_path / "mae.safetensors", mean=(0.286,), std=(0.353,))(images)
    pixels = torch.tensor((images / 255 - 0.286) / 0.353, dtype=torch.float32)
    with torch.no_grad():
        want = trainer.pooled(trainer.encoder(pixels.permute(0, 3, 1, 2)))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_difference_of_both_sides_is_told_in_standard_errors():
    pytest.importorskip("torchvision")
    from benchmarks import side_by_side

    def side(mae, ct):
        rows = {"mae": mae, "ct": ct, "ct - mae": ct - mae}
        return {row: {"k-NN": value} for row, value in rows.items()}

    percent = {
        "maect_jax": {"0": side(69, 75), "1": side(72, 75), "2": side(75, 75)},
        "PyTorch": {"1": side(70, 70), "0": side(70, 70), "2": side(70, 70)},
    }
    tables = side_by_side.summary(percent).split("\n\n")
    ours, theirs, apart = (re.split(r"  +", table.splitlines()[-1])[1:] for table in tables)
    assert ours == ["72.0 +- 3.0", "75.0 +- 0.0", "+3.0 +- 3.0"]
    assert theirs == ["70.0 +- 0.0", "70.0 +- 0.0", "+0.0 +- 0.0"]
    assert apart == ["+2.0 (+1.2)", "+5.0", "+3.0 (+1.7)"]  # 3 / sqrt(3) is 1.73
