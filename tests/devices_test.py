"""One program on 1, 2, 4 and 8 devices: the same masks, neighbours, losses and parameters.

Marked slow: most of the meshes, and the heads, whose steps are a part of the tuning's (`pytest -m
slow tests/devices_test.py`).
"""

import dataclasses
from functools import cache, partial

import jax
import numpy as np
import pytest

from maect_jax import config, sharding
from maect_jax.convert import names as convert
from maect_jax.data import arrays, bad_images, decode
from maect_jax.evals import cluster, features, knn, runner
from maect_jax.stages import STAGES, optim, state
from maect_jax.stages.step import gradients, step
from tests.helpers import CONFIGS
from tests.helpers import golden_figures as figures
from tests.helpers.common import mesh_of
from tests.helpers.contrast_run import assert_parameters, run
from tests.helpers.golden_figures import (
    FORWARD,
    GRADIENT,
    assert_close,
    assert_within,
    norm,
    optimiser_bound,
)
from tests.helpers.gradient_bounds import assert_gradients, grad_parts, scale_of, update_bound
from tests.helpers.rows import row_of
from tests.helpers.tiny_stages import ENCODER, TINY_STAGES, batch_of

# Data-parallel and sharded at once; the slow ones are either alone, and other sizes.
MESHES = [(2, 4)]
FURTHER = [(8, 1), (1, 4), (2, 1), (1, 2), (4, 1), (2, 2), (1, 8)]
on_meshes = pytest.mark.parametrize(
    "shape", [*MESHES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in FURTHER)],
    ids=lambda shape: f"{shape[0]}x{shape[1]}",
)  # fmt: skip
CT = figures.cases("ct")[0]
SLOWER = ("mae", "head", "refine_head")


@on_meshes
def test_three_steps_of_ct_follow_the_authors_as_on_one_device(shape):
    """The bounds are those of one device (`parity_test`)."""
    one, many = run(CT, "start"), run(CT, "start", shape=shape)
    for first, other in zip(one, many, strict=True):
        np.testing.assert_equal(other.neighbours, first.neighbours)
        assert_close("devices, loss", other.scalars["loss"], first.scalars["loss"], FORWARD)
        assert_gradients("devices, ct", other.grads, first.grads, GRADIENT, contrastive=True)
    assert_parameters("devices, ct", CT, many, "start", _off)


def _off(s, name):
    return GRADIENT * norm(grad_parts(CT.under(f"step{s}/grad/"))[name])


def _to_torch(params):
    """Parameters, or a tree of their structure, by the names that the bounds know."""
    parts = {}
    if "encoder" in params:
        parts["encoder"] = convert.encoder_to_torch(params["encoder"], ENCODER.patch_size)
    if "decoder" in params:
        parts["decoder"] = convert.decoder_to_torch(params["decoder"])
    if "projector" in params:
        heads = {name: params[name] for name in ("projector", "predictor")}
        stacked = heads["projector"]["fc1"]["kernel"].ndim == 3
        for i in range(len(heads["projector"]["fc1"]["kernel"]) if stacked else 1):
            own = jax.tree.map(lambda x, i=i: x[i], heads) if stacked else heads
            parts[f"heads/{i}"] = convert.head_to_torch({"params": own})
    return grad_parts(figures.prefixed(**parts))


@cache
def one_step(name, shape):
    """The loss, what was drawn, the gradients, and the parameters before and after one step."""
    stage, mesh = TINY_STAGES[name], mesh_of(*shape)

    def update(now, batch):
        (_, (_, aux)), grads = gradients(stage, now, batch)
        drawn = aux["mask" if name == "mae" else "positions"]
        return *step(stage, now, batch), drawn, grads

    with jax.set_mesh(mesh):
        before = state.create_state(stage, jax.random.key(0), {}, mesh)
        out = (state.state_shardings(before), None, None, None)
        batch = sharding.put_batch(batch_of(0), mesh)
        after, metrics, drawn, grads = jax.jit(update, out_shardings=out)(before, batch)
        trees = (_to_torch(jax.device_get(x)) for x in (grads, before.params, after.params))
        return metrics["loss"], np.asarray(drawn), *trees, after


@on_meshes
@pytest.mark.parametrize(
    "name", ["refine", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOWER)]
)
def test_a_step_equals_that_of_one_device(name, shape):
    """Masks and neighbours are equal; the gradients are compared, and so Adam hides nothing."""
    stage, contrastive = TINY_STAGES[name], name != "mae"
    loss, drawn, grads, before, params, _ = one_step(name, (1, 1))
    got_loss, got_drawn, got_grads, _, got_params, _ = one_step(name, shape)
    np.testing.assert_array_equal(got_drawn, drawn)
    assert_close("devices, loss", got_loss, loss, FORWARD)
    (lr,) = {group.lr for group in stage.groups.values()}
    lr *= max(map(float, optim.factors(stage.groups, stage.steps, stage.warmup, step=0).values()))
    assert params.keys() == got_params.keys()
    for part, want in params.items():
        off = GRADIENT * norm(grads[part])
        spread = lr * update_bound(part, [grads[part]], off, contrastive)
        bound = spread + optimiser_bound(want, want - before[part], 1)
        size = max(norm(want), 1e-30)
        error = norm(got_params[part] - want)
        assert_within("devices, parameters", error / size, bound / size)
    for part in grads:
        if scale_of(part, contrastive) is None:
            assert_close("devices, gradients", got_grads[part], grads[part], GRADIENT)


@pytest.mark.slow
def test_rotary_positions_go_with_the_kept_patches():
    """An MAE's gradients on several devices, each with the positions of its own patches."""
    mae, found = TINY_STAGES["mae"], []
    encoder = ENCODER.clone(registers=1, rope_theta=100.0)
    stage = dataclasses.replace(mae, encoder=encoder, decoder=mae.decoder.clone(extra_tokens=2))
    for shape in ((1, 1), (2, 4)):
        mesh = mesh_of(*shape)
        with jax.set_mesh(mesh):
            now = state.create_state(stage, jax.random.key(0), {}, mesh)
            batch = sharding.put_batch(batch_of(0), mesh)
            (loss, _), grads = jax.jit(partial(gradients, stage))(now, batch)
        found.append(jax.device_get((loss, grads)))
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(found[0][1]))
    for one, many in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(many, one, atol=1e-5 * size)


@pytest.mark.parametrize(("file", "name"), [("mae_vith16", "mae"), ("ct_vith16", "ct")])
def test_parameters_moments_and_averages_are_sharded(file, name):
    """Of the paper's model each of eight devices holds an eighth, but for what is small."""
    stage, mesh = (
        STAGES[name].from_config(config.load(str(CONFIGS / f"{file}.py")), 10_000),
        mesh_of(1, 8),
    )
    start = state.abstract_state(stage, jax.random.key(0), {}, mesh)
    for part in ("params", "opt_state", "ema", "target", "frozen", "queue"):
        leaves = jax.tree.leaves(getattr(start, part))
        whole = sum(leaf.size for leaf in leaves)
        share = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
        assert share <= whole / 8 * 1.01, part


def test_an_evaluation_of_the_same_weights_is_the_same(rng):
    """k-NN, and k-means from the same start, on features from different meshes."""
    encoder = ENCODER
    pictures = rng.integers(0, 256, (160, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(160) % 5
    pictures[..., 0] = 40 * labels[:, None, None] + rng.integers(0, 50, (160, 8, 8))
    params = jax.jit(encoder.init)(jax.random.key(1), pictures[:1] / 255)["params"]
    source, halves = arrays.Arrays(pictures, labels, list("abcde")), (slice(96), slice(96, None))
    settings = (
        "model.image_size=(8,8)", "model.channels=3", "data.short_side=8", "eval.cluster.runs=3",
        "data.mean=(0.5,0.5,0.5)", "data.std=(0.25,0.25,0.25)",
    )  # fmt: skip
    found = []
    for shape in ((1, 1), (8, 1), (2, 4)):
        mesh = mesh_of(*shape)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, sharding.tree_shardings(params, mesh))
            encode = features.encoder(encoder, placed, "cls")
            row = row_of({}, mesh, *settings)
            bad = bad_images.BadImages(source, decode.Decoding(3), 0.0)
            x, y, _ = whole = features.collected(
                runner.Extraction(row.run, source, bad, 32).batches(encode)
            )
            train, test = (features.Features(*(a[s] for a in whole)) for s in halves)
            near = knn.classify(knn.Search(mesh, 64), train, test, (1, 5))
            groups, clustered = cluster.cluster(row, x, y, clusters=0)
        best = {k: v for k, v in groups["best"].items() if k != "chosen_by"}
        found.append((x, [n["accuracy"] for n in near], best, clustered["clusters"]))
    x, accuracies, best, assigned = found[0]
    assert 0.3 < accuracies[0] < 1  # there is something to tell apart
    for other in found[1:]:
        np.testing.assert_allclose(other[0], x, rtol=1e-5, atol=1e-5)
        assert other[1] == accuracies
        # Loss and silhouette are sums, which differ by rounding.
        assert other[2] == pytest.approx(best, rel=1e-4)
        np.testing.assert_array_equal(other[3], assigned)


def test_rows_of_a_process_are_those_that_its_devices_hold(monkeypatch):
    """A TPU slice's mesh gives a process several blocks of the batch."""
    from types import SimpleNamespace

    owners = [0, 0, 1, 1, 0, 0, 1, 1]
    devices = np.array([SimpleNamespace(process_index=i) for i in owners]).reshape(4, 2)
    mesh = SimpleNamespace(devices=devices, local_devices=range(4), size=8)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    rows = sharding.local_rows(16, mesh)
    np.testing.assert_array_equal(rows, [4, 5, 6, 7, 12, 13, 14, 15])
    # Each device's rows are found among the process's own.
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: None)
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, part: part)
    part = sharding.put_batch(rows, mesh)
    for device in (2, 3, 6, 7):
        wanted = range(2 * device, 2 * device + 2)
        index = (slice(wanted.start, wanted.stop),)
        np.testing.assert_array_equal(part(index), list(wanted))


def test_a_batch_is_split_in_the_order_of_the_mesh():
    mesh = mesh_of(4, 2)
    x = np.arange(16)
    batch = sharding.put_batch({"x": x}, mesh)["x"]
    np.testing.assert_array_equal(batch, x)
    parts = {shard.device: shard.data for shard in batch.addressable_shards}
    for i, device in enumerate(mesh.devices.flat):
        np.testing.assert_array_equal(parts[device], [2 * i, 2 * i + 1])
