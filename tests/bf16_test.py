"""The steps of the reference figures in bf16: as exact as bf16 can be (see `rounding`).

Marked slow: the second pooling of ct, which `parity_test` compares in fp32.
"""

from functools import partial
from unittest import mock

import jax
import numpy as np
import pytest

from maect_jax.convert import names as convert
from maect_jax.stages import support_queue
from maect_jax.stages.step import gradients
from tests.helpers import golden_figures as figures
from tests.helpers.common import mesh_of
from tests.helpers.contrast_run import ONE, assert_parameters, batch_of, run, trained_to_torch
from tests.helpers.golden_figures import FORWARD, assert_close, assert_within, norm
from tests.helpers.gradient_bounds import grad_parts, scale_of
from tests.helpers.rounding import SCALES, assert_as_exact_as_bf16, emulated, rounded

MAE, CT = figures.cases("mae"), figures.cases("ct")
by_ct_case = pytest.mark.parametrize(
    "case", [CT[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CT[1:])], ids=str
)


def stages_of(case):
    return [figures.stage_of(case, dtype) for dtype in ("float32", "bfloat16")]


def tensors_of(grads: dict, contrastive: bool) -> dict:
    """`gradients/name` of every tensor whose gradient is not zero by construction."""
    parts = grad_parts(grads)
    return {f"gradients/{n}": x for n, x in parts.items() if scale_of(n, contrastive) is None}


@pytest.mark.parametrize("case", MAE, ids=str)
def test_mae(case):
    params = {
        "encoder": convert.encoder_from_torch(case.under("encoder/"), case.grid),
        "decoder": convert.decoder_from_torch(case.under("decoder/"), case.grid),
    }
    images = case["images"].transpose(0, 2, 3, 1)
    noise = case["noise"].reshape(len(images), -1)

    def look(stage, params, images):
        def loss(params):
            got = stage.forward(params, images, noise)
            return got["loss"], got

        (_, got), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return got, grads

    @jax.jit
    def draw(scale):
        inputs = rounded((params, images), scale)
        got, grads = emulated(partial(look, single, *inputs), scale)
        return got, rounded(grads, scale)

    def quantities(got, grads):
        grads = figures.prefixed(
            encoder=convert.encoder_to_torch(grads["encoder"], case.meta["patch_size"]),
            decoder=convert.decoder_to_torch(grads["decoder"]),
        )
        return {name: got[name] for name in ("latent", "prediction")} | tensors_of(grads, False)

    single, half = stages_of(case)
    exact, got = (jax.jit(partial(look, stage))(params, images) for stage in (single, half))
    draws = [quantities(*draw(scale)) for scale in SCALES]
    assert_as_exact_as_bf16("mae", quantities(*got), quantities(*exact), draws)
    # The root of the loss is a norm: it moves by no more than the masked patches' pixels.
    exact, got = exact[0], got[0]
    off = np.square(np.subtract(got["prediction"], exact["prediction"])).mean(-1)
    off = np.sqrt(off[case["mask"] == 1].mean())
    error = abs(np.sqrt(got["loss"]) - np.sqrt(exact["loss"]))
    assert_within("bf16 mae root of the loss", error, off * (1 + FORWARD))


@by_ct_case
def test_ct_forward_and_gradients(case):
    """At every step from the same state as fp32, with the same neighbours."""

    def look(stage, state, batch, positions):
        with mock.patch.object(support_queue, "choose", return_value=positions):
            (_, (_, aux)), grads = gradients(stage, state, batch)
        return aux, grads

    @jax.jit
    def draw(state, batch, positions, scale):
        trees = (state.params, state.frozen, state.target, batch["image"])
        params, frozen, target, images = rounded(trees, scale)
        state = state.replace(params=params, frozen=frozen, target=target)
        inputs = (state, {**batch, "image": images}, positions)
        aux, grads = emulated(partial(look, single, *inputs), scale)
        return aux, rounded(grads, scale)

    def quantities(aux, grads):
        stats = convert.head_to_torch({"batch_stats": aux["batch_stats"]})
        return {
            **{name: aux[name] for name in ("projected", "predicted")},
            **{f"running statistics/{name}": x for name, x in stats.items()},
            **tensors_of(trained_to_torch(case, grads), True),
        }

    single, half = stages_of(case)
    exactly, halfly = (jax.jit(partial(look, stage)) for stage in (single, half))
    with jax.set_mesh(mesh_of(*ONE)):
        for s, step in enumerate(run(case, "all")):
            state = step.before.replace(rng=jax.random.key(0))
            inputs = (state, batch_of(case, s), step.aux["positions"].ravel())
            exact, got = quantities(*exactly(*inputs)), quantities(*halfly(*inputs))
            draws = [quantities(*draw(*inputs, scale)) for scale in SCALES]
            assert_as_exact_as_bf16("ct", got, exact, draws)


@by_ct_case
def test_ct_losses_and_neighbours_are_exact_whatever_the_dtype(case):
    """Of the step's own projections and predictions, which alone are off."""
    for s, step in enumerate(run(case, "all", "bfloat16")):
        queue, unit = step.before.queue, np.float64(step.aux["predicted"])
        rows = np.float64(queue.rows.reshape(-1, queue.rows.shape[-1]))
        own = case[f"step{s}/ids"][:, None, None] == queue.ids.ravel()
        cosines = np.where(own, -2, np.float64(step.aux["projected"]) @ rows.T)
        positions = step.aux["positions"]
        chosen = np.take_along_axis(cosines, positions[..., None], -1)[..., 0]
        assert_close("bf16 ct cosine of the nearest", chosen, cosines.max(-1), 1e-6)
        unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
        losses = []
        for view in (0, 1):
            logits = rows[positions[:, view]] @ unit[:, 1 - view].T / case.meta["temperature"]
            losses.append(np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits)))
        assert_close("bf16 ct loss", step.scalars["loss"], np.mean(losses), FORWARD)


@by_ct_case
def test_ct_parameters_and_target_after_each_step(case):
    """Off by no more than what Adam makes of the gradients' errors."""
    steps = run(case, "all", "bfloat16")

    def off(s, name):
        theirs = grad_parts(case.under(f"step{s}/grad/"))[name]
        return norm(grad_parts(steps[s].grads)[name] - theirs)

    assert_parameters("bf16 ct", case, steps, "all", off)
