"""Equality with the authors' code, figure by figure, on every `.npz` of a folder.

The folder is `MAECT_GOLDEN` where set, else `tests/golden`, whose README explains the arrays.
"""

import jax
import numpy as np
import optax
import pytest

from maect_jax.convert import names as convert
from maect_jax.evals import knn
from maect_jax.evals.features import Features
from maect_jax.models import mae, vit
from maect_jax.stages import optim
from tests.helpers import golden_figures as figures
from tests.helpers.common import assert_trees_equal, mesh_of
from tests.helpers.contrast_run import (
    assert_parameters,
    run,
    started,
    trained_to_torch,
    trained_tree,
)
from tests.helpers.golden_figures import (
    FORWARD,
    GRADIENT,
    TINY,
    assert_close,
    norm,
    optimiser_bound,
)
from tests.helpers.gradient_bounds import assert_gradients, grad_parts

MAE, CT, KNN = (figures.cases(kind) for kind in ("mae", "ct", "knn"))
GIVEN = ("start", "drift", "all")  # what the reference gives (`contrast_run.run`)


def parametrize_ct(test):
    by_case = pytest.mark.parametrize("case", CT, ids=str)
    return by_case(pytest.mark.parametrize("given", GIVEN)(test))


def test_every_file_of_the_folder_is_of_a_known_kind():
    kinds = {case.name: case.meta["kind"] for case in figures.CASES}
    unknown = {name: kind for name, kind in kinds.items() if kind not in ("mae", "ct", "knn")}
    assert not unknown


@pytest.mark.parametrize("case", MAE, ids=str)
def test_mae(case):
    stage = figures.stage_of(case)
    encoder = convert.encoder_from_torch(case.under("encoder/"), case.grid)
    decoder = convert.decoder_from_torch(case.under("decoder/"), case.grid)
    params = {"encoder": encoder, "decoder": decoder}
    images = case["images"].transpose(0, 2, 3, 1)
    noise = case["noise"].reshape(len(images), -1)

    def loss(params):
        got = stage.forward(params, images, noise)
        return got["loss"], got

    (_, got), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_array_equal(got["mask"], case["mask"])
    np.testing.assert_array_equal(got["restore"], case["ids_restore"])
    keep, _, _ = mae.random_mask(noise, stage.mask_ratio)
    kept = np.sort(np.asarray(keep), axis=1)
    np.testing.assert_array_equal(kept, [np.flatnonzero(row == 0) for row in case["mask"]])
    for name in ("latent", "prediction", "loss"):
        assert_close(f"mae {name}", got[name], case[name], FORWARD)
    tokens = stage.encoder.apply({"params": encoder}, images)
    assert_close("mae tokens, unmasked", tokens, case["tokens_unmasked"], FORWARD)
    theirs = case.under("grad/")
    patch_size = case.meta["patch_size"]
    ours = figures.prefixed(
        encoder=convert.encoder_to_torch(grads["encoder"], patch_size),
        decoder=convert.decoder_to_torch(grads["decoder"]),
    )
    assert_gradients("mae", ours, theirs, GRADIENT, contrastive=False)


@parametrize_ct
def test_ct_forward(case, given):
    for s, step in enumerate(run(case, given)):
        for view in (0, 1):
            np.testing.assert_array_equal(step.neighbours[view], case[f"step{s}/nn{view}"])
            for name in ("predicted", "projected")[: 1 if given == "start" else 2]:
                got = step.aux[name][:, view]
                assert_close(f"ct {name}", got, case[f"step{s}/{name}{view}"], FORWARD)
        assert_close("ct loss", step.scalars["loss"], case[f"step{s}/loss"], FORWARD)
        accuracy = case[f"step{s}/nn_accuracy"]
        assert_close("ct nn_accuracy", step.scalars["nn_accuracy"], accuracy, 1e-6)
        # Less the final norm's bias, which is added last and drifts.
        bias = trained_to_torch(case, step.before.params)["encoder/norm.bias"]
        start = case.under(f"step{s - 1}/after/" if s else "init/")
        tokens = case[f"step{s}/tokens"] - start["encoder/norm.bias"]
        assert_close("ct tokens", step.tokens - bias, tokens, FORWARD)


@parametrize_ct
def test_ct_gradients(case, given):
    for s, step in enumerate(run(case, given)):
        theirs = case.under(f"step{s}/grad/")
        assert_gradients("ct", step.grads, theirs, GRADIENT, contrastive=True)
        whole = np.sqrt(sum(norm(x) ** 2 for x in theirs.values()))
        assert_close("ct norm of the gradients", step.scalars["grad_norm"], whole, GRADIENT)


@parametrize_ct
def test_ct_parameters_and_target_after_each_step(case, given):
    def off(s, name):
        return GRADIENT * norm(grad_parts(case.under(f"step{s}/grad/"))[name])

    assert_parameters("ct", case, run(case, given), given, off)


@pytest.mark.parametrize("case", CT, ids=str)
@pytest.mark.parametrize("given", GIVEN[1:])
def test_ct_running_statistics_after_each_step(case, given):
    """Those of the target are the online projector's, as in the authors' code."""
    for s, step in enumerate(run(case, given)):
        theirs = figures.under(case.under(f"step{s}/after/"), "head/")
        ours = convert.head_to_torch(
            {"target": step.after.target, "batch_stats": step.after.batch_stats}
        )
        names = [name for name in theirs if "running_" in name]
        assert len(names) == 2 * (3 + 1 + 3)
        for name in names:
            assert_close("ct running statistics", ours[name], theirs[name], FORWARD)


@parametrize_ct
def test_ct_frozen_is_bit_equal(case, given):
    encoder = convert.encoder_from_torch(case.under("init/encoder/"), case.grid)
    _, frozen = vit.split_blocks(encoder, case.meta["frozen_blocks"])
    for step in run(case, given):
        assert_trees_equal(step.after.frozen["encoder"], frozen)


@parametrize_ct
def test_ct_queue_in_the_end(case, given):
    last = case.meta["steps"] - 1
    theirs = case.under(f"step{last}/after/head/")
    ours = convert.head_to_torch({"queue": run(case, given)[-1].after.queue}, len(theirs["queue"]))
    oldest_first = [
        np.roll(np.arange(len(x["queue"])), -int(x["queue_ptr"].item())) for x in (ours, theirs)
    ]
    mine, order = oldest_first
    for name in ("queue_id", "queue_y"):
        np.testing.assert_array_equal(ours[name][mine], theirs[name][order])
    if given != "start":
        assert_close("ct queue", ours["queue"][mine], theirs["queue"][order], FORWARD)


@pytest.mark.parametrize("case", CT, ids=str)
def test_ct_learning_rate_and_weight_decay_of_every_tensor(case):
    """Also that what has no rate is frozen and the other way round."""
    stage, meta = figures.stage_of(case), case.meta
    params = started(case, stage).params
    lrs, decays = optim.per_tensor(params, stage.groups)
    per_layer = jax.tree.map(np.broadcast_to, lrs, jax.tree.map(np.shape, params))
    full = jax.tree.map(lambda decay, p: np.full(p.shape, decay), decays, params)
    lrs, decays = (trained_to_torch(case, tree) for tree in (per_layer, full))
    factor = optim.schedule(stage.steps, stage.warmup)
    groups = figures.prefixed(encoder=meta["encoder_groups"], head=meta["head_groups"])
    assert groups.keys() == lrs.keys()
    for name, (scale, decay) in groups.items():
        part = int(name.startswith("head/"))
        np.testing.assert_allclose(decays[name], decay, rtol=1e-6)
        assert np.ptp(lrs[name]) == 0
        for s, base in enumerate(meta["base_lr_per_step"]):
            lr = lrs[name].flat[0] * float(factor(s))
            assert_close("ct learning rate", lr, base[part] * scale, 1e-6)


@pytest.mark.parametrize("case", CT, ids=str)
def test_the_optimiser_alone_turns_golden_gradients_into_golden_parameters(case):
    stage = figures.stage_of(case)
    params = started(case, stage).params
    optimizer = stage.optimizer(params)
    update, moments, moved = jax.jit(optimizer.update), optimizer.init(params), {}
    before = case.under("init/")
    for s in range(case.meta["steps"]):
        grads = trained_tree(case, case.under(f"step{s}/grad/"))
        updates, moments = update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        after = case.under(f"step{s}/after/")
        for name, x in trained_to_torch(case, params).items():
            moved[name] = moved.get(name, 0.0) + norm(after[name] - before[name])
            bound = optimiser_bound(after[name], moved[name], s + 1) / max(norm(after[name]), TINY)
            assert_close("ct optimiser alone", x, after[name], bound)
        before = after


@parametrize_ct
def test_the_step_applies_its_optimiser_to_its_gradients(case, given):
    """So that what Adam hides of a gradient is not hidden: with the gradients at 1e-4 and the
    optimiser alone at 1e-6, nothing of an update is left unseen."""
    stage = figures.stage_of(case)
    for step in run(case, given):
        params, moments = step.before.params, step.before.opt_state
        grads = trained_tree(case, step.grads)
        updates, _ = jax.jit(stage.optimizer(params).update)(grads, moments, params)
        want = trained_to_torch(case, optax.apply_updates(params, updates))
        before = trained_to_torch(case, params)
        for name, x in trained_to_torch(case, step.after.params).items():
            size = max(norm(want[name]), TINY)
            bound = optimiser_bound(want[name], want[name] - before[name], 1) / size
            assert_close("ct update of the step's own gradients", x, want[name], bound)


@pytest.mark.parametrize("case", KNN, ids=str)
@pytest.mark.parametrize("standardised", [False, True], ids=["raw", "standardised"])
def test_knn(case, standardised):
    train, test = (
        Features(case[f"{s}_features"], case[f"{s}_labels"], None) for s in ("train", "test")
    )
    ks, temperature = tuple(case.meta["k"]), case.meta["temperature"]
    mesh = mesh_of(1, 1)
    with jax.set_mesh(mesh):
        got = knn.classify(knn.Search(mesh, 64, standardised), train, test, ks, temperature)
    want = case["accuracy/standardised" if standardised else "accuracy/raw"]
    assert [entry["k"] for entry in got] == list(ks)
    # As counts: the reference keeps the share in fp32.
    correct = [
        np.rint(len(test.labels) * np.asarray(x)) for x in (want, [e["accuracy"] for e in got])
    ]
    np.testing.assert_array_equal(*correct)
