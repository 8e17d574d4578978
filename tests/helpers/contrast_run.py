"""The package's own contrastive step on reference figures."""

import re
from functools import cache
from typing import NamedTuple

import jax
import numpy as np

from maect_jax import sharding
from maect_jax.convert import names as convert
from maect_jax.data import augment
from maect_jax.models import vit
from maect_jax.stages import state
from maect_jax.stages.step import gradients, jitted_step
from tests.helpers import ROUND_ALIKE
from tests.helpers import golden_figures as figures
from tests.helpers.common import assert_trees_equal, mesh_of
from tests.helpers.golden_figures import TINY, Case, assert_within, norm, optimiser_bound
from tests.helpers.gradient_bounds import grad_parts, joined, update_bound, zero_by_construction

ONE = (1, 1)  # the mesh of one device


class Step(NamedTuple):
    """One step: what it started from, what it computed, what it left."""

    before: state.TrainState
    features: np.ndarray  # of ct tokens [2B, N, D], view 0 first; else [heads, V, B, D]
    aux: dict
    grads: dict[str, np.ndarray]
    neighbours: dict[str, np.ndarray]  # of each head [2, B], as rows of the reference's flat queue
    scalars: dict
    after: state.TrainState


def head_state(case: Case, tensors: dict[str, np.ndarray]) -> dict:
    """Of the head, or the stack of heads, the fields of a `TrainState` that the tensors are of."""
    each = [convert.head_from_torch(figures.under(tensors, f"{head}/")) for head in case.heads]
    if case.kind == "ct":
        return each[0]
    queues = [state.pop("queue") for state in each if "queue" in state]
    heads = jax.tree.map(lambda *x: np.stack(x), *each)
    if queues:
        rows = np.stack([queue.rows for queue in queues])
        heads["queue"] = queues[0].replace(rows=rows)
        for queue in queues:
            assert_trees_equal(queue, heads["queue"].replace(rows=queue.rows))
    return heads


def head_tensors(case: Case, **fields) -> dict[str, np.ndarray]:
    """The inverse of `head_state`, of some fields."""
    size, queue = case.meta["queue_size"], fields.get("queue")
    if case.kind == "ct":
        return figures.prefixed(head=convert.head_to_torch(fields, size))
    tensors = {}
    for i, head in enumerate(case.heads):
        others = {name: field for name, field in fields.items() if field is not queue}
        own = jax.tree.map(lambda x, i=i: x[i], others)
        own |= {"queue": queue.replace(rows=queue.rows[i])} if queue else {}
        tensors |= figures.prefixed(**{head: convert.head_to_torch(own, size)})
    return tensors


def split(case: Case, encoder: dict) -> tuple[dict, dict]:
    """(trained, frozen) parts of an encoder."""
    frozen = case.meta.get("frozen_blocks", 0)
    return vit.split_blocks(encoder, frozen) if case.tunes_encoder else ({}, encoder)


def trained_tree(case: Case, tensors: dict[str, np.ndarray]) -> dict:
    """What is trained, as a tree, from the reference's tensors of encoder and heads.

    The encoder's tensors that are not there (frozen ones) are filled up from the start.
    """
    both = {**case.under("init/"), **tensors}
    encoder = convert.encoder_from_torch(figures.under(both, "encoder/"), case.grid)
    trained, _ = split(case, encoder)
    return {**({"encoder": trained} if trained else {}), **head_state(case, both)["params"]}


def trained_to_torch(case: Case, params: dict) -> dict[str, np.ndarray]:
    patch_size, frozen = case.meta["patch_size"], case.meta.get("frozen_blocks", 0)
    heads = {name: part for name, part in params.items() if name != "encoder"}
    tensors = head_tensors(case, params=heads)
    if "encoder" in params:
        encoder = convert.encoder_to_torch(params["encoder"], patch_size)
        tensors |= figures.prefixed(encoder=behind(frozen, encoder))
    return tensors


def behind(blocks: int, tensors: dict) -> dict:
    """Tensors of the upper blocks of an encoder, by their names behind so many others."""

    def renumbered(match):
        return f"blocks.{int(match[1]) + blocks}."

    return {re.sub(r"^blocks\.(\d+)\.", renumbered, name): x for name, x in tensors.items()}


def started(case: Case, stage, shape=ONE) -> state.TrainState:
    """The stage's first state, from the reference's start, on a mesh of that shape."""
    heads = head_state(case, case.under("init/"))
    target = heads.pop("target", {})
    heads |= heads.pop("params")
    encoder = convert.encoder_from_torch(case.under("init/encoder/"), case.grid)
    start = {"encoder": encoder, **(heads if case.kind == "ct" else {"heads": heads})}
    first = state.create_state(stage, jax.random.key(0), start, mesh_of(*shape))
    assert_trees_equal(first.target, target)
    return first


def batch_of(case: Case, s: int) -> dict[str, np.ndarray]:
    """The batch of step `s`, as the loader makes them."""
    views = {"image": "images"} if case.kind == "ct" else {"image": "global", "local": "local"}
    views = {field: case[f"step{s}/{name}"] for field, name in views.items()}
    return dict(
        index=case[f"step{s}/ids"].astype(np.int32),
        label=case[f"step{s}/labels"].astype(np.int32),
        **{field: x.transpose(1, 0, 3, 4, 2) for field, x in views.items() if len(x)},
    )


def given_state(case: Case, s: int, own: state.TrainState, given: str) -> state.TrainState:
    """`own`, after step `s`, with what the reference gives put in its place (see `run`)."""
    theirs = case.under(f"step{s}/after/")
    if given == "drift":
        ours = trained_to_torch(case, own.params)
        ours |= head_tensors(case, target=own.target, batch_stats=own.batch_stats)
        ours, theirs = grad_parts(ours), grad_parts(theirs)
        theirs = joined({n: theirs[n] if zero_by_construction(n) else x for n, x in ours.items()})
    heads = head_state(case, case.under("init/") | theirs)
    new = own.replace(
        params=trained_tree(case, theirs),
        batch_stats=heads["batch_stats"],
        target=heads.get("target", {}),
    )
    return jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), new, own)


@cache
def programs(case: Case, dtype: str, shape):
    """The stage, its step as `train` jits it, and what looks into the step."""
    stage, mesh = figures.stage_of(case, dtype), mesh_of(*shape)
    with jax.set_mesh(mesh):
        first, batch = started(case, stage, shape), sharding.put_batch(batch_of(case, 0), mesh)
        update = jitted_step(stage, state.state_shardings(first))
        update = update.lower(first, batch).compile(ROUND_ALIKE)

    def look(now, batch):
        (_, (_, aux)), grads = gradients(stage, now, batch)
        views = tuple(augment.views(batch, recipe) for recipe in stage.recipes)
        if case.kind == "refine":
            features = stage.features(now.params, now.frozen, views)
            return aux, grads, features.transpose(2, 1, 0, 3)
        encoder = {**now.frozen["encoder"], **now.params["encoder"]}
        images = views[0].swapaxes(0, 1)
        tokens = stage.encoder.apply({"params": encoder}, images.reshape(-1, *images.shape[2:]))
        return aux, grads, tokens

    return stage, update, jax.jit(look, compiler_options=ROUND_ALIKE)


@cache
def run(case: Case, given: str, dtype: str = "float32", shape=ONE) -> list[Step]:
    """All steps of a case by the package's own step, on a mesh of that shape.

    The first starts from the reference's start; moments and queue are always what the steps
    before have left. What else is `given` from the reference before each further step:
      "start": nothing.
      "drift": the tensors whose gradient is zero by construction. Adam makes updates of full
        size of their rounding, and through the target's last bias they reach the projections.
      "all": parameters, running statistics and target.
    """
    stage, update, look = programs(case, dtype, shape)
    mesh, steps = mesh_of(*shape), []
    with jax.set_mesh(mesh):
        now = started(case, stage, shape)
        for s in range(case.meta["steps"]):
            if given != "start" and s:
                now = given_state(case, s - 1, now, given)
            batch = sharding.put_batch(batch_of(case, s), mesh)
            aux, grads, features = look(now, batch)
            before = jax.device_get(now.replace(rng=None))
            now, scalars = update(now, batch)
            steps.append(
                Step(
                    before=before,
                    features=np.float32(features),
                    aux=jax.device_get(aux),
                    grads=trained_to_torch(case, grads),
                    neighbours=_flat_rows(case, s, before.queue, jax.device_get(aux["positions"])),
                    scalars=jax.device_get(scalars),
                    after=jax.device_get(now.replace(rng=None)),
                )
            )
    return steps


def of_heads(case: Case, x: np.ndarray) -> dict[str, np.ndarray]:
    """Head -> its part of what the step has of all heads: `[B, V, ...]` as `[V, B, ...]`."""
    each = [x] if case.kind == "ct" else x
    return {head: np.swapaxes(x, 0, 1) for head, x in zip(case.heads, each, strict=True)}


def _flat_rows(case: Case, s: int, queue, positions) -> dict[str, np.ndarray]:
    """Ring positions as rows of the reference's flat queue, by their age."""
    size, batch = case.meta["queue_size"], queue.ids.shape[1]
    surplus = queue.ids.size - size  # the oldest rows of the ring, which are none of the queue's
    first = int(case[f"init/{case.heads[0]}/queue_ptr"].item()) + s * batch
    return {
        head: (first - surplus + (x - int(queue.slot) * batch) % queue.ids.size) % size
        for head, x in of_heads(case, positions).items()
    }


def allowed_errors(case: Case, given: str, off) -> list[dict[str, float]]:
    """For each step: name of a part -> the norm by which parameters and target may be off after
    it, where the gradients of step `s` are off by the norm `off(s, name)`."""
    meta, allowed, spent, every_step, gradients = case.meta, {}, {}, [], []
    before = grad_parts(case.under("init/"))
    for s in range(meta["steps"]):
        after = grad_parts(case.under(f"step{s}/after/"))
        gradients.append(grad_parts(case.under(f"step{s}/grad/")))
        # What is given from the reference is not off before the step.
        free = {"start": allowed, "all": {}}.get(given)
        if free is None:
            free = {name: x for name, x in allowed.items() if not zero_by_construction(name)}
        earlier, allowed = free, {}
        for name in gradients[0]:
            lr = case.learning_rate(s, name.split("[")[0])
            spent[name] = np.hypot(spent.get(name, 0.0), off(s, name))
            spread = update_bound(name, [grads[name] for grads in gradients], spent[name])
            allowed[name] = earlier.get(name, 0.0) + lr * spread
        for name, online in [(name, name.replace("target_", "")) for name in after]:
            if name != online and online in gradients[0]:
                kept = meta["target_factor"]
                allowed[name] = kept * earlier.get(name, 0.0) + (1 - kept) * allowed[online]
        for name in allowed:
            allowed[name] += optimiser_bound(after[name], after[name] - before[name], 1)
        every_step.append(allowed)
        before = after | {n: x for n, x in before.items() if n not in after}
    return every_step


def assert_parameters(kind: str, case: Case, steps: list[Step], given: str, off) -> None:
    """What is trained, and the target, after each step within `allowed_errors`."""
    for s, (step, allowed) in enumerate(zip(steps, allowed_errors(case, given, off), strict=True)):
        targets = head_tensors(case, target=step.after.target)
        ours = grad_parts(trained_to_torch(case, step.after.params)) | targets
        theirs = grad_parts(case.under(f"step{s}/after/"))
        assert ours.keys() == allowed.keys()
        for name, x in ours.items():
            quantity = "target" if name in targets else "parameters"
            zero = ", gradient zero" if zero_by_construction(name) else ""
            error, size = norm(x - theirs[name]), max(norm(theirs[name]), TINY)
            assert_within(f"{kind} {quantity}{zero}", error / size, allowed[name] / size)
