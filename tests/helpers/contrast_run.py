"""The package's own contrastive step on reference figures."""

from functools import cache
from typing import NamedTuple

import jax
import numpy as np

from maect_jax import sharding
from maect_jax.convert import names as convert
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
    tokens: np.ndarray  # [2B, N, D], view 0 first
    aux: dict
    grads: dict[str, np.ndarray]
    neighbours: np.ndarray  # [2, B], as rows of the reference's flat queue
    scalars: dict
    after: state.TrainState


def trained_tree(case: Case, tensors: dict[str, np.ndarray]) -> dict:
    """What is trained, as a tree, from the reference's `encoder/...` and `head/...`.

    The encoder's tensors that are not there (frozen ones) are filled up from the start.
    """
    both = {**case.under("init/"), **tensors}
    encoder = convert.encoder_from_torch(figures.under(both, "encoder/"), case.grid)
    trained, _ = vit.split_blocks(encoder, case.meta["frozen_blocks"])
    head = convert.head_from_torch(figures.under(both, "head/"))
    return {"encoder": trained, **head["params"]}


def trained_to_torch(case: Case, params: dict) -> dict[str, np.ndarray]:
    patch_size, frozen = case.meta["patch_size"], case.meta["frozen_blocks"]
    return figures.prefixed(
        encoder=convert.encoder_to_torch(params["encoder"], patch_size, first_block=frozen),
        head=convert.head_to_torch({"params": params}),
    )


def started(case: Case, stage, shape=ONE) -> state.TrainState:
    """The stage's first state, from the reference's start, on a mesh of that shape."""
    head = convert.head_from_torch(case.under("init/head/"))
    start = dict(
        encoder=convert.encoder_from_torch(case.under("init/encoder/"), case.grid),
        batch_stats=head["batch_stats"],
        queue=head["queue"],
        **head["params"],
    )
    first = state.create_state(stage, jax.random.key(0), start, mesh_of(*shape))
    assert_trees_equal(first.target, head["target"])
    return first


def batch_of(case: Case, s: int) -> dict[str, np.ndarray]:
    """The batch of step `s`, as the loader makes them."""
    return dict(
        image=case[f"step{s}/images"].transpose(1, 0, 3, 4, 2),
        index=case[f"step{s}/ids"].astype(np.int32),
        label=case[f"step{s}/labels"].astype(np.int32),
    )


def given_state(case: Case, s: int, own: state.TrainState, given: str) -> state.TrainState:
    """`own`, after step `s`, with what the reference gives put in its place (see `run`)."""
    theirs = case.under(f"step{s}/after/")
    if given == "drift":
        heads = {"target": own.target, "batch_stats": own.batch_stats}
        ours = trained_to_torch(case, own.params)
        ours |= figures.prefixed(head=convert.head_to_torch(heads))
        ours, theirs = grad_parts(ours), grad_parts(theirs)
        theirs = joined({n: theirs[n] if zero_by_construction(n) else x for n, x in ours.items()})
    head = convert.head_from_torch(case.under("init/head/") | figures.under(theirs, "head/"))
    new = own.replace(
        params=trained_tree(case, theirs),
        batch_stats=head["batch_stats"],
        target=head["target"],
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
        encoder = {**now.frozen["encoder"], **now.params["encoder"]}
        views = batch["image"].swapaxes(0, 1)
        tokens = stage.encoder.apply({"params": encoder}, views.reshape(-1, *views.shape[2:]))
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
            aux, grads, tokens = look(now, batch)
            before = jax.device_get(now.replace(rng=None))
            now, scalars = update(now, batch)
            steps.append(
                Step(
                    before=before,
                    tokens=np.float32(tokens),
                    aux=jax.device_get(aux),
                    grads=trained_to_torch(case, grads),
                    neighbours=_flat_rows(case, s, before.queue, aux["positions"]),
                    scalars=jax.device_get(scalars),
                    after=jax.device_get(now.replace(rng=None)),
                )
            )
    return steps


def _flat_rows(case: Case, s: int, queue, positions) -> np.ndarray:
    """Ring positions `[B, 2]` as rows `[2, B]` of the reference's flat queue, by their age."""
    rows, batch = queue.ids.size, queue.ids.shape[1]
    age = (np.asarray(positions).T - int(queue.slot) * batch) % rows
    oldest = int(case["init/head/queue_ptr"].item()) + s * case.meta["batch"]
    return (age + oldest) % rows


def allowed_errors(case: Case, given: str, off) -> list[dict[str, float]]:
    """For each step: name of a part -> the norm by which parameters and target may be off after
    it, where the gradients of step `s` are off by the norm `off(s, name)`."""
    meta, allowed, spent, every_step, gradients = case.meta, {}, {}, [], []
    groups = figures.prefixed(encoder=meta["encoder_groups"], head=meta["head_groups"])
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
            lr = meta["base_lr_per_step"][s][int(name.startswith("head/"))]
            lr *= groups[name.split("[")[0]][0]
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
        targets = figures.prefixed(head=convert.head_to_torch({"target": step.after.target}))
        ours = grad_parts(trained_to_torch(case, step.after.params)) | targets
        theirs = grad_parts(case.under(f"step{s}/after/"))
        assert ours.keys() == allowed.keys()
        for name, x in ours.items():
            quantity = "target" if name in targets else "parameters"
            zero = ", gradient zero" if zero_by_construction(name) else ""
            error, size = norm(x - theirs[name]), max(norm(theirs[name]), TINY)
            assert_within(f"{kind} {quantity}{zero}", error / size, allowed[name] / size)
