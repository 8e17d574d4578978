"""What the stages show of the images that a run is watched by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax import sharding
from maect_jax.data import arrays, loader
from maect_jax.data.decode import Decoding
from maect_jax.files import read_saved_arrays
from maect_jax.models import vit
from maect_jax.run import snapshots
from maect_jax.run.folder import Run
from maect_jax.stages import losses, state, support_queue
from maect_jax.stages.step import jitted_snapshot
from tests.helpers.common import mesh_of
from tests.helpers.tiny_stages import SHAPE, TINY_STAGES, started

QUERIES = 8


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (QUERIES, *SHAPE), dtype=np.uint8)


def test_the_targets_of_an_image_fill_it_in_again(rng):
    images = jnp.asarray(rng.normal(size=(3, *SHAPE)), jnp.float32)
    mask = jnp.asarray(rng.integers(0, 2, (3, 4)), jnp.float32)
    target = losses.patch_targets(images, 4)
    filled = losses.fill_patches(images, target, mask, 4)
    np.testing.assert_allclose(filled, images, atol=1e-5)
    # Only what was removed is filled: the other predictions do not matter.
    filled = losses.fill_patches(images, jnp.zeros_like(target), mask, 4)
    changed = (np.abs(filled - images) > 1e-5).any(-1)
    removed = vit.unpatchify(jnp.repeat(mask[..., None], 16, -1), 4, (2, 2))[..., 0] > 0
    assert (changed == removed).all()


def test_mae_shows_the_mask_and_leaves_visible_pixels_as_they_are(images):
    stage = TINY_STAGES["mae"]
    first = started(stage)
    seen = jax.jit(stage.snapshot)(first, images, np.arange(QUERIES))
    seen = {key: np.asarray(value) for key, value in seen.items()}
    assert seen["mask"].shape == (QUERIES, *SHAPE[:2])
    assert (seen["mask"].mean((1, 2)) == 0.75).all()
    np.testing.assert_array_equal(seen["filled"][~seen["mask"]], images[~seen["mask"]])
    assert (seen["filled"][seen["mask"]] != images[seen["mask"]]).mean() > 0.5
    other = jax.jit(stage.init)(jax.random.key(1), {})
    again = jax.jit(stage.snapshot)(other, images, np.arange(QUERIES))
    np.testing.assert_array_equal(again["mask"], seen["mask"])


def contrast_state(stage, rng):
    first = started(stage)
    rows = support_queue.normalise(rng.normal(size=(3, stage.batch_size, 8)))
    ids = jnp.asarray(rng.permutation(48).reshape(3, -1), jnp.int32)
    queue = support_queue.Queue(rows, ids, ids % 3, jnp.int32(1))
    statistics = {"mean": 0.3, "var": 2.0}
    stats = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full_like(x, statistics[path[-1].key]), first.batch_stats
    )
    target = jax.tree.map(lambda x: 1.5 * x, first.target)
    return first.replace(queue=queue, batch_stats=stats, target=target)


@pytest.mark.parametrize("name", ["head", "ct"])
def test_contrast_shows_the_nearest_rows_of_the_queue_by_the_plain_formula(name, images, rng):
    stage = TINY_STAGES[name]
    now = contrast_state(stage, rng)
    ids = np.arange(QUERIES)
    seen = jax.jit(stage.snapshot)(now, images, ids)
    x = (images / 255 - 0.5) / 0.25
    encoder = {**now.frozen["encoder"], **now.params.get("encoder", {})}
    features = stage.encoder.apply({"params": encoder}, jnp.asarray(x, jnp.float32))[:, 0]
    params = (now.target if name == "ct" else now.params)["projector"]
    variables = {"params": params, "batch_stats": now.batch_stats["projector"]}
    rows = np.asarray(stage.projector.apply(variables, features, train=False), np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ np.asarray(now.queue.rows, np.float64).reshape(48, 8).T
    own = np.asarray(now.queue.ids).reshape(-1)
    cosines[own[None] == ids[:, None]] = -np.inf
    order = np.argsort(-cosines, axis=1)[:, :3]
    np.testing.assert_array_equal(seen["neighbours"], own[order])
    assert not (np.asarray(seen["neighbours"]) == ids[:, None]).any()


@pytest.mark.parametrize("name", ["mae", "ct"])
def test_eight_devices_show_what_one_shows(name, images, rng):
    stage = TINY_STAGES[name]
    shown = []
    for mesh in (mesh_of(1, 1), mesh_of(4, 2)):
        first = started(stage) if name == "mae" else contrast_state(
            stage, np.random.default_rng(5)
        )  # fmt: skip
        with jax.set_mesh(mesh):
            first = jax.device_put(first, sharding.tree_shardings(first, mesh))
            ids = np.arange(QUERIES)
            batch = sharding.put_batch({"images": images, "ids": ids}, mesh)
            shown.append(jax.device_get(jitted_snapshot(stage, mesh)(first, batch)))
    for key, value in shown[0].items():
        np.testing.assert_allclose(shown[1][key], value, atol=1e-5)


def test_what_is_watched_is_written_and_read_by_step(tmp_path):
    stage, mesh = TINY_STAGES["mae"], mesh_of(4, 2)
    source = arrays.Arrays(
        np.random.default_rng(0).integers(0, 256, (20, *SHAPE), dtype=np.uint8), np.arange(20), []
    )
    images = snapshots.Examples(
        loader.EvalRecord(source, Decoding(SHAPE[2]), SHAPE[:2], 8),
        held_out=False,
        images={"train": source},
    )
    with jax.set_mesh(mesh):
        now = state.create_state(stage, jax.random.key(0), {}, mesh)
        write = snapshots.writer(stage, images, Run(None, tmp_path, mesh))
        write(10, now)
        write(9, now)
    files = snapshots.saved(tmp_path, "mae")
    assert list(files) == [9, 10]
    seen = read_saved_arrays(files[9])
    assert seen["index"].tolist() == [0, 2, 5, 8, 10, 13, 16, 19]
    assert seen["mask"].shape == (snapshots.IMAGES, *SHAPE[:2])
    visible = ~seen["mask"]
    np.testing.assert_array_equal(seen["filled"][visible], source.images[seen["index"]][visible])
    assert snapshots.saved(tmp_path, "ct") == {}
    other = arrays.Arrays(source.images[::-1], np.arange(20), [])
    assert snapshots.is_of(seen, {"train": source, "val": other})
    assert not snapshots.is_of(seen, {"train": other})
    assert snapshots.is_of({"index": seen["index"]}, {"train": other})  # of version 0.1
