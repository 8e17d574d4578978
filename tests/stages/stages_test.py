"""The update of each training stage on tiny models: what moves, what must not, and by how much."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax import config as configs
from maect_jax import pipeline
from maect_jax.data import sources
from maect_jax.data.transforms import Crops
from maect_jax.errors import UserError
from maect_jax.models import vit
from maect_jax.stages import STAGES, support_queue
from maect_jax.stages.step import abstract_batch, gradients, step
from tests.helpers import CONFIGS
from tests.helpers.common import assert_trees_equal, mesh_of
from tests.helpers.tiny_stages import (
    BATCH,
    SHAPE,
    TINY_STAGES,
    batch_of,
    contrast_stage,
    started,
    with_local_views,
)  # fmt: skip


@cache
def compiled(name):
    return jax.jit(partial(step, TINY_STAGES[name]))


def updated(name, train_state, batches):
    for batch in batches:
        train_state, metrics = compiled(name)(train_state, batch)
    return train_state, metrics


@pytest.mark.parametrize(
    "name",
    [
        "mae",
        "head",
        "ct",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("refine_head", "refine")),
    ],
)
def test_loss_falls_on_one_batch(name):
    train_state = started(TINY_STAGES[name])
    _, first = updated(name, train_state, [batch_of(0)])
    train_state, last = updated(name, train_state, [batch_of(0)] * 40)
    assert last["loss"] < 0.9 * first["loss"]
    assert train_state.step == 40


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("refine_head", "ct"),
        ("refine", "refine_head"),
        ("refine", "refine"),
        ("refine_head", "refine"),
        ("head", "refine"),
    ],
)
def test_a_stage_starts_with_what_the_one_before_hands_on(name, before):
    pages = [configs.load(f"{CONFIGS}/quickstart.py{variant}") for variant in ("", ":refine")]
    stages = {
        stage: STAGES[stage].from_config(page, 1024)
        for page in pages
        for stage in page.stages
        if stage in (name, before)
    }

    def started(key, taken):
        first = stages[before].init(key, {})
        parts = {field: getattr(first, field) for field in STAGES[before].saved}
        handed = STAGES[before].handover(parts)
        return stages[name].init(key, {part: handed[part] for part in taken})

    key = jax.eval_shape(jax.random.key, 0)
    alone, after = (
        jax.eval_shape(partial(started, taken=taken), key) for taken in ((), STAGES[name].takes)
    )
    assert after == alone


def test_heads_start_from_different_random_weights_and_the_last_is_the_final_one():
    config = configs.load(f"{CONFIGS}/quickstart.py:refine")
    stage = STAGES["refine_head"].from_config(config, 1024)

    @jax.jit
    def heads(key):
        state = stage.init(key, {})
        final, queue = stage._final_head(state)
        kernels = [state.params[part]["fc1"]["kernel"] for part in ("projector", "predictor")]
        return (*kernels, state.queue.rows), (final["params"]["fc1"]["kernel"], queue.rows)

    of_all, of_final = heads(jax.random.key(0))
    for stack in of_all:
        assert len(np.unique(stack[:, 0].reshape(3, -1), axis=0)) == 3
    for stack, last in zip(of_all[::2], of_final, strict=True):
        np.testing.assert_array_equal(stack[-1], last)


def test_averages_follow_their_formula():
    """Encoder EMA and target projector: decay * old + (1 - decay) * new, from the first update."""
    states = [started(TINY_STAGES["ct"])]
    for seed in range(3):
        states.append(updated("ct", states[-1], [batch_of(seed)])[0])
    for average, part, decay in (("ema", "encoder", 0.99), ("target", "projector", 0.9)):
        want = jax.tree.map(lambda x: np.asarray(x, np.float64), states[0].params[part])
        for after in states[1:]:
            want = jax.tree.map(
                lambda m, x, d=decay: d * m + (1 - d) * np.asarray(x, np.float64),
                want, after.params[part],
            )  # fmt: skip
            got = getattr(after, average)[part]
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_frozen_stays_bit_equal_and_everything_trained_moves():
    for name in ("head", "ct"):
        before = started(TINY_STAGES[name])
        after, _ = updated(name, before, [batch_of(0), batch_of(1)])
        assert jax.tree.leaves(before.frozen)
        assert_trees_equal(before.frozen, after.frozen)
        for path, x in jax.tree.leaves_with_path(before.params):
            y = after.params
            for entry in path:
                y = y[entry.key]
            assert not np.array_equal(x, y), jax.tree_util.keystr(path)
    assert set(before.frozen["encoder"]) == {"patch_embed", "cls_token", "frozen_blocks"}
    assert set(before.params["encoder"]) == {"blocks", "norm"}
    assert not before.opt_state[0].mu["encoder"].keys() & before.frozen["encoder"].keys()


def test_ct_takes_over_the_whole_head():
    """Encoder, projector, predictor, their statistics and the queue of the stage before."""
    head, _ = updated("head", started(TINY_STAGES["head"]), [batch_of(0), batch_of(1)])
    parts = {part: getattr(head, part) for part in STAGES["head"].saved}
    ct = jax.jit(TINY_STAGES["ct"].init)(
        jax.random.key(9),
        {part: STAGES["head"].handover(parts)[part] for part in STAGES["ct"].takes},
    )
    for part in ("projector", "predictor"):
        assert_trees_equal(ct.params[part], head.params[part])
    assert_trees_equal(ct.target["projector"], head.params["projector"])
    assert_trees_equal(ct.batch_stats, head.batch_stats)
    assert_trees_equal(ct.queue, head.queue)
    assert head.queue.slot == 2
    whole = vit.merge_blocks({**ct.frozen["encoder"], **ct.params["encoder"]})
    assert_trees_equal(whole, head.frozen["encoder"])
    assert_trees_equal(ct.ema["encoder"], ct.params["encoder"])


def test_view_0_enters_the_queue_and_own_rows_are_excluded():
    stage = contrast_stage("ct", top_k=1)
    train_state = started(stage)
    batch = batch_of(0)
    run = jax.jit(stage.loss)
    views = jnp.asarray(batch["image"], jnp.float32) / 255
    _, (_, aux) = run(train_state.params, train_state, (views,), batch, jax.random.key(0))
    pushed = stage.update_buffers(train_state, aux, True).queue
    np.testing.assert_array_equal(pushed.rows[0], aux["projected"][:, 0])
    np.testing.assert_array_equal(pushed.ids[0], batch["index"])
    np.testing.assert_array_equal(pushed.labels[0], batch["label"])
    # The same images again: the nearest row is the image's own, and must not be chosen.
    train_state = train_state.replace(queue=pushed)
    _, (metrics, aux) = run(train_state.params, train_state, (views,), batch, jax.random.key(0))
    own = np.arange(BATCH)
    assert not (aux["positions"][:, 0] == own).any()
    free = train_state.replace(queue=pushed.replace(ids=jnp.full_like(pushed.ids, -1)))
    _, (_, unchecked) = run(free.params, free, (views,), batch, jax.random.key(0))
    np.testing.assert_array_equal(unchecked["positions"][:, 0], own)
    # Neighbour accuracy: view 0's neighbours, by the labels in the queue.
    labels = np.asarray(pushed.labels).ravel()[aux["positions"][:, 0]]
    np.testing.assert_allclose(metrics["nn_accuracy"], (labels == batch["label"]).mean())


def test_loss_is_symmetric_and_mixes_neighbour_and_prediction():
    stage = contrast_stage("ct", top_k=1)
    train_state, batch = started(stage), batch_of(0)
    views = jnp.asarray(batch["image"], jnp.float32) / 255
    loss, (_, aux) = jax.jit(stage.loss)(
        train_state.params, train_state, (views,), batch, jax.random.key(0)
    )
    queue = np.asarray(train_state.queue.rows).reshape(48, -1)
    neighbours = queue[np.asarray(aux["positions"])]
    unit = np.asarray(support_queue.normalise(aux["predicted"]))
    terms = []
    for view in (0, 1):
        logits = neighbours[:, view] @ unit[:, 1 - view].T / 0.2
        terms.append(np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits)))
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)


def test_the_head_alone_gets_gradients_through_the_predictor_only():
    """Stage 2 looks neighbours up with the projector's own output, without gradient."""
    stage, batch = TINY_STAGES["head"], batch_of(0)
    train_state = started(stage)
    views = jnp.asarray(batch["image"], jnp.float32) / 255
    _, (_, aux) = jax.jit(stage.loss)(
        train_state.params, train_state, (views,), batch, jax.random.key(0)
    )
    features = stage.features(train_state.params, train_state.frozen, (views,))[:, :, 0]
    z, _ = stage.projector.apply(
        {
            "params": train_state.params["projector"],
            "batch_stats": train_state.batch_stats["projector"],
        },
        features[:, 0], train=True, mutable=["batch_stats"],
    )  # fmt: skip
    np.testing.assert_allclose(
        aux["projected"][:, 0], support_queue.normalise(z), rtol=1e-5, atol=1e-6
    )

    def look_up(params):
        projected, _, _ = stage.head(params, train_state.batch_stats, {}, features)
        return jnp.square(projected - 1).sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(look_up))(train_state.params)):
        assert not leaf.any()


def test_a_stage_may_have_views_of_two_sizes(monkeypatch):
    crops = Crops((14, 21), (0.05, 0.25), 3)
    kind, config = with_local_views(crops), configs.load(str(CONFIGS / "quickstart.py:test"), [])
    pipeline.check(config, devices=1)
    images = sources.make(config.data, "train", 1)
    stage, make = kind.for_images(config, images), kind.example_maker(config, images)
    assert make.crops == (Crops((28, 28), config.head.crop_scale, 2), crops)
    assert [(r.size, r.field, r.first) for r in stage.recipes] == [
        ((28, 28), "image", 0), ((14, 21), "local", 2)
    ]  # fmt: skip
    assert kind.views_of_image(config) == 5
    # Each size goes through the encoder by itself, in equal parts on each device.
    config.encoder_microbatches = 64
    kind.check(config, devices=4)
    config.encoder_microbatches = 128
    with pytest.raises(UserError, match=r"encoder_microbatches=128: .* 192 crops.* views: 3, dev"):
        kind.check(config, devices=4)
    seen = []

    def loss(self, params, state, views, batch, key):
        seen.extend(x.shape for x in views)
        return sum(x.sum() for x in jax.tree.leaves(params)), ({}, {})

    monkeypatch.setattr(kind, "loss", loss)
    state = jax.eval_shape(stage.init, jax.random.key(0), {})
    batch = abstract_batch(kind, config, images, mesh_of(1, 1))
    jax.eval_shape(partial(gradients, stage), state, batch)
    assert seen == [(256, 2, 28, 28, 1), (256, 3, 14, 21, 1)]


@pytest.mark.parametrize("name", ["mae", "ct"])
def test_a_step_that_is_not_finite_changes_nothing(name):
    before, _ = updated(name, started(TINY_STAGES[name]), [batch_of(0)])
    bad = batch_of(1)
    bad["image"] = np.full((BATCH, 2, *SHAPE), np.nan, np.float32)
    after, metrics = updated(name, before, [bad])
    assert not metrics["finite"]
    assert after.step == before.step + 1
    assert_trees_equal(before.replace(step=after.step), after)
    _, metrics = updated(name, before, [batch_of(1)])
    assert metrics["finite"]
