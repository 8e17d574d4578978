"""Equality with the authors' code, figure by figure, on every `.npz` of a folder.

The folder is `MAECT_GOLDEN` where set, else `tests/golden`, whose README explains the arrays.
"""

import os

import jax
import numpy as np
import optax
import pytest

from maect_jax.convert import names as convert
from maect_jax.evals import knn
from maect_jax.evals.features import Features
from maect_jax.models import mae
from maect_jax.stages import optim
from tests.helpers import golden_figures as figures
from tests.helpers.common import assert_trees_equal, mesh_of
from tests.helpers.contrast_run import (
    assert_parameters,
    head_tensors,
    of_heads,
    run,
    split,
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

KINDS = ("mae", "knn", "ct", "refine")
MAE, KNN, CT, REFINE = map(figures.cases, KINDS)
# What the reference gives (`contrast_run.run`). Between MIM-Refiner's projections and the drift of
# what has no gradient there is no averaged projector: what is exact is so from step to step.
GIVEN = {"ct": ("start", "drift", "all"), "refine": ("drift", "all")}
EXACT = {"ct": ("drift", "all"), "refine": ("all",)}
WHOLE = GIVEN | {"refine": EXACT["refine"]}  # also where only ct's averaged projector drifts


def marks(case):
    """The heads' step is a part of the whole one's: of the figures here it is slow."""
    own = "MAECT_GOLDEN" not in os.environ
    return [pytest.mark.slow] if own and case.name == "refine_heads" else []


by_contrast = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=marks(case), id=str(case)) for case in CT + REFINE]
)


def parametrize_contrast(given):
    """With all cases, each with what is given by its kind."""
    return pytest.mark.parametrize(
        ("case", "given"),
        [
            pytest.param(case, how, marks=marks(case), id=f"{case}-{how}")
            for case in CT + REFINE
            for how in given[case.kind]
        ],
    )


def test_every_file_of_the_folder_is_of_a_known_kind():
    assert not {case.name: case.kind for case in figures.CASES if case.kind not in KINDS}


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


@parametrize_contrast(WHOLE)
def test_contrast_forward(case, given):
    for s, step in enumerate(run(case, given)):
        np.testing.assert_equal(step.neighbours, case.neighbours(s))
        for name in ("predicted", "projected")[: 2 if given in EXACT[case.kind] else 1]:
            got, want = of_heads(case, step.aux[name]), case.by_view(s, name)
            for head in case.heads:
                assert_close(f"{case.kind} {name}", got[head], want[head], FORWARD)


@parametrize_contrast(WHOLE)
def test_contrast_features(case, given):
    """The final ones less the final norm's bias, which is added last and drifts."""
    for s, step in enumerate(run(case, given)):
        after = case.under(f"step{s - 1}/after/") if s else {}
        theirs = (case.under("init/") | after)["encoder/norm.bias"]
        ours = trained_to_torch(case, step.before.params).get("encoder/norm.bias", theirs)
        if case.kind == "ct":
            wanted, *others = [(step.features, case[f"step{s}/tokens"])]
        else:
            each = case.by_view(s, "features")
            *others, wanted = zip(step.features, each.values(), strict=True)
        for got, want in (*others, (wanted[0] - ours, wanted[1] - theirs)):
            assert_close(f"{case.kind} features", got, want, FORWARD)


@parametrize_contrast(WHOLE)
def test_contrast_losses_and_accuracies(case, given):
    """In the authors' code an image without a label counts, too."""
    heads = {"": ""}
    if case.kind == "refine":
        heads = {f"{block}/": f"_block{block}" for block in case.meta["blocks"]}
        heads["main/"] = "_final"
    for s, step in enumerate(run(case, given)):
        names = [("loss", f"step{s}/loss")]
        for theirs, ours in heads.items():
            names += [(f"{x}{ours}", f"step{s}/{theirs}{x}") for x in ("loss", "nn_accuracy")]
        for ours, theirs in names:
            if ours.startswith("loss"):
                assert_close(f"{case.kind} loss", step.scalars[ours], case[theirs], FORWARD)
            elif (case[f"step{s}/labels"] >= 0).all():
                got, want = step.scalars[ours], case[theirs]
                assert_close(f"{case.kind} nn_accuracy", got, want, 1e-6)


@parametrize_contrast(WHOLE)
def test_contrast_gradients(case, given):
    for s, step in enumerate(run(case, given)):
        theirs = case.under(f"step{s}/grad/")
        assert_gradients(case.kind, step.grads, theirs, GRADIENT, contrastive=True)
        whole = np.sqrt(sum(norm(x) ** 2 for x in theirs.values()))
        name = f"{case.kind} norm of the gradients"
        assert_close(name, step.scalars["grad_norm"], whole, GRADIENT)


@parametrize_contrast(GIVEN)
def test_contrast_parameters_and_target_after_each_step(case, given):
    def off(s, name):
        return GRADIENT * norm(grad_parts(case.under(f"step{s}/grad/"))[name])

    assert_parameters(case.kind, case, run(case, given), given, off)


@parametrize_contrast(EXACT)
def test_contrast_running_statistics_after_each_step(case, given):
    """Those of the target are the online projector's, as in the authors' code."""
    for s, step in enumerate(run(case, given)):
        theirs = case.under(f"step{s}/after/")
        state = dict(target=step.after.target, batch_stats=step.after.batch_stats)
        ours = head_tensors(case, **state)
        names = [name for name in theirs if "running_" in name]
        assert len(names) == len(case.heads) * 2 * (3 + (4 if case.kind == "ct" else 2))
        for name in names:
            assert_close(f"{case.kind} running statistics", ours[name], theirs[name], FORWARD)


@parametrize_contrast(GIVEN)
def test_contrast_frozen_is_bit_equal(case, given):
    encoder = convert.encoder_from_torch(case.under("init/encoder/"), case.grid)
    _, frozen = split(case, encoder)
    for step in run(case, given):
        assert_trees_equal(step.after.frozen["encoder"], frozen)


@parametrize_contrast(GIVEN)
def test_contrast_queues_in_the_end(case, given):
    theirs = case.under(f"step{case.meta['steps'] - 1}/after/")
    ours = head_tensors(case, queue=run(case, given)[-1].after.queue)
    for head in case.heads:
        mine, order = (
            np.roll(np.arange(case.meta["queue_size"]), -int(x[f"{head}/queue_ptr"].item()))
            for x in (ours, theirs)
        )  # oldest first
        for name in ("queue_id", "queue_y"):
            got, want = (x[f"{head}/{name}"] for x in (ours, theirs))
            np.testing.assert_array_equal(got[mine], want[order])
        if given in EXACT[case.kind]:
            got, want = (x[f"{head}/queue"] for x in (ours, theirs))
            assert_close(f"{case.kind} queue", got[mine], want[order], FORWARD)


@by_contrast
def test_contrast_learning_rate_and_weight_decay_of_every_tensor(case):
    """Also that what has no rate is frozen and the other way round."""
    stage = figures.stage_of(case)
    params = started(case, stage).params
    lrs, decays = optim.per_tensor(params, stage.groups)
    full = jax.tree.map(lambda decay, p: np.full(p.shape, decay), decays, params)
    decays = trained_to_torch(case, full)
    assert case.groups.keys() == decays.keys()
    for name, (_, decay) in case.groups.items():
        np.testing.assert_allclose(decays[name], decay, rtol=1e-6)
    for s in range(case.meta["steps"]):
        now = optim.factors(stage.groups, stage.steps, stage.warmup, step=s)
        scaled = {part: jax.tree.map(lambda x, f=now[part]: f * x, lrs[part]) for part in lrs}
        full = jax.tree.map(lambda lr, p: np.broadcast_to(lr, p.shape), scaled, params)
        for name, lr in trained_to_torch(case, full).items():
            assert np.ptp(lr) == 0
            want = case.learning_rate(s, name)
            assert_close(f"{case.kind} learning rate", lr.flat[0], want, 1e-6)


@by_contrast
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
            assert_close(f"{case.kind} optimiser alone", x, after[name], bound)
        before = after


@parametrize_contrast(GIVEN)
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
            quantity = f"{case.kind} update of the step's own gradients"
            assert_close(quantity, x, want[name], bound)


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
