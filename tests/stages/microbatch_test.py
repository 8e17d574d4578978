"""Microbatches and rematerialisation: the same gradients, less memory, nothing frozen twice.

Marked slow: either alone for stages that have both below, and the memory.
"""

import dataclasses
from functools import cache
from unittest import mock

import jax
import numpy as np
import pytest

from maect_jax import sharding
from maect_jax.models import vit
from maect_jax.stages import state
from maect_jax.stages.step import gradients
from tests.helpers.common import mesh_of
from tests.helpers.golden_figures import norm
from tests.helpers.tiny_stages import TINY_STAGES, batch_of, contrast_stage, started

# More layers and tokens than the other tests have, so that activations are what memory holds.
ENCODER = vit.ViT(64, 8, 4, 2, frozen_blocks=3)


@cache
def gradients_of(name, shape=(1, 1), microbatches=1, remat="none", platform="cpu"):
    """The loss and all gradients of the first step, as a platform compiles it."""
    stage = TINY_STAGES[name]
    stage = dataclasses.replace(
        stage, encoder=stage.encoder.clone(remat=remat), microbatches=microbatches
    )
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh), mock.patch.object(sharding, "platform", return_value=platform):
        now = state.create_state(stage, jax.random.key(0), {}, mesh)
        batch = sharding.put_batch(batch_of(0), mesh)
        run = jax.jit(lambda now, batch: gradients(stage, now, batch))
        (loss, _), grads = run(now, batch)
    return float(loss), jax.device_get(grads)


BOTH = dict(microbatches=2, remat="blocks")
SPREAD = dict(microbatches=4, shape=(2, 2))
DOTS = dict(remat="dots")
NO_LOOP = dict(remat="dots", platform="gpu", shape=(2, 2))
BY_DEFAULT = [("mae", BOTH), ("ct", BOTH), ("ct", SPREAD), ("ct", DOTS), ("ct", NO_LOOP)]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=[] if (name, how) in BY_DEFAULT else pytest.mark.slow)
        for name in TINY_STAGES
        for how in (BOTH, SPREAD, DOTS, NO_LOOP)
    ],
    ids=str,
)
def test_gradients_equal_those_of_the_whole_batch(name, how):
    loss, whole = gradients_of(name)
    got_loss, parts = gradients_of(name, **how)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-6)
    # Of what is zero by construction rounding is all that there is.
    scale = norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(whole)]))
    for (path, want), got in zip(
        jax.tree.leaves_with_path(whole), jax.tree.leaves(parts), strict=True
    ):
        assert norm(got - want) <= 1e-5 * norm(want) + 1e-7 * scale, jax.tree_util.keystr(path)


def stage_with(**changes):
    encoder = ENCODER.clone(remat=changes.pop("remat", "none"))
    return contrast_stage("ct", encoder=encoder, **changes)


def temporaries(stage, now, batch):
    run = jax.jit(lambda now, batch: gradients(stage, now, batch)[1])
    return run.lower(now, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_each_takes_less_memory():
    now, batch = started(stage_with()), batch_of(0)
    whole = temporaries(stage_with(), now, batch)
    parts = temporaries(stage_with(microbatches=8), now, batch)
    blocks = temporaries(stage_with(remat="blocks"), now, batch)
    dots = temporaries(stage_with(remat="dots"), now, batch)
    assert parts < 0.5 * whole
    assert blocks < dots < whole
    assert blocks < 0.5 * whole


def equations(jaxpr):
    """All equations of a program, each with the equations below it."""
    for equation in jaxpr.eqns:
        bodies = [getattr(v, "jaxpr", v) for v in jax.tree.leaves(list(equation.params.values()))]
        below = [e for body in bodies if hasattr(body, "eqns") for e in equations(body)]
        yield equation, below
        yield from below


def traced(stage):
    """The equations of the gradients of a stage's first step."""
    run = jax.make_jaxpr(lambda now, batch: gradients(stage, now, batch)[1])
    return list(equations(run(started(stage), batch_of(0)).jaxpr))


def scans_with_products(found):
    """`(length, unroll)` of all innermost scans with a matrix product in them."""
    for equation, below in found:
        inner = any(e.primitive.name == "scan" for e, _ in below)
        if equation.primitive.name == "scan" and not inner and "dot_general" in str(equation):
            yield equation.params["length"], equation.params["unroll"]


def test_dots_adds_no_bias_again():
    """Only the bias of qkv has three times the encoder's width."""

    def adds(remat):
        found = traced(stage_with(remat=remat))
        shapes = [e.outvars[0].aval.shape for e, _ in found if e.primitive.name == "add"]
        return sum(shape[-1:] == (192,) for shape in shapes)

    assert adds("none") == adds("dots") < adds("blocks")


def test_frozen_blocks_are_not_computed_again():
    lengths, _ = zip(*scans_with_products(traced(stage_with(microbatches=4))), strict=True)
    # 3 layers are frozen, and run forward; 5 are trained: forward, forward again, and back. The
    # search of the queue is a scan of length 1.
    assert sorted(lengths) == [1, 3, 5, 5, 5]


@pytest.mark.parametrize(("platform", "unrolled"), [("gpu", True), ("tpu", False)])
def test_blocks_are_no_loop_on_a_gpu(monkeypatch, platform, unrolled):
    """There the compiler is kept from undoing what `remat` asks for; within a loop it cannot."""
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    found = traced(stage_with(remat="dots"))
    scans = [(1, 1), *((n, n if unrolled else 1) for n in (3, 5, 5))]
    assert sorted(scans_with_products(found)) == scans
    kept = {e.params["prevent_cse"] for e, _ in found if "prevent_cse" in e.params}
    assert kept == {unrolled}
