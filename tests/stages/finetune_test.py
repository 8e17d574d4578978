"""Fine-tuning: drop path, mixing, erasing, learning rates, records, and the whole stage.

Marked slow: the loss on any devices and microbatches.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maect_jax import config as configs
from maect_jax import load_encoder, pipeline
from maect_jax.convert import __main__ as convert
from maect_jax.convert import exporting
from maect_jax.data import arrays, augment, folder, loader, mix, sources, subsets
from maect_jax.data.augment import Photometric, Recipe
from maect_jax.data.decode import Decoding
from maect_jax.data.transforms import Crops
from maect_jax.errors import RunFailedError, UserError
from maect_jax.evals import runner
from maect_jax.evals.classifier import accuracies
from maect_jax.models import vit
from maect_jax.run import checkpoints
from maect_jax.run.checkpoints import Checkpoints
from maect_jax.stages import STAGES, optim, state
from maect_jax.stages.finetune import Finetune
from maect_jax.stages.step import abstract_batch, gradients, step
from tests.helpers import CONFIGS
from tests.helpers.common import assert_trees_equal, mesh_of, run_on, save

FILE = str(CONFIGS / "finetune.py")
BATCH, CLASSES, SHAPE = 16, 3, (8, 8, 3)
ENCODER = vit.ViT(16, 4, 2, 4)
MEAN, STD = (0.5,) * 3, (0.25,) * 3
PLAIN = dict(drop_path=0.0, label_smoothing=0.0, mixup_alpha=0.0, cutmix_alpha=0.0, erasing=0.0)
FULL = dict(drop_path=0.5, label_smoothing=0.1, mixup_alpha=0.8, cutmix_alpha=1.0, erasing=0.25)


def stage_of(**changes):
    settings = dict(
        encoder=ENCODER, image_shape=SHAPE, pool="cls", classes=CLASSES,
        recipes=(Recipe(SHAPE[:2], (0.5, 1.0), MEAN, STD, (Photometric(),)),),
        groups={"encoder": optim.Group(0.003, 0.05, 0.75, 4),
                "classifier": optim.Group(0.003, 0.05)},
        steps=60, warmup=5,
    )  # fmt: skip
    return Finetune(**settings | PLAIN | changes)


def batch_of(seed, labels=None):
    """Noise whose mean colour tells the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, BATCH).astype(np.int32) if labels is None else labels
    image = rng.integers(0, 120, (BATCH, 1, *SHAPE))
    image[np.arange(BATCH), ..., labels] += 100
    return dict(
        image=image.astype(np.uint8),
        index=np.arange(BATCH, dtype=np.int32),
        label=labels,
        seed=rng.integers(0, 2**32, (BATCH, 2), dtype=np.uint32),
    )


# Drop path.


def test_drop_path_rises_linearly_and_keeps_the_mean():
    found = np.asarray(vit.drop_paths(jax.random.key(0), 0.4, 20_000, 5))
    assert found.shape == (20_000, 5, 2)
    rates = np.array([0, 0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose((found == 0).mean(0), np.stack([rates] * 2, 1), atol=0.012)
    np.testing.assert_allclose(found.mean(0), 1, atol=0.02)
    for block, rate in enumerate(rates):
        kept = found[:, block][found[:, block] > 0]
        np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=1e-6)
    # Images and branches are drawn one by one.
    last = found[:, -1] == 0
    assert abs((last[:, 0] & last[:, 1]).mean() - 0.16) < 0.012
    again = vit.drop_paths(jax.random.key(0), 0.4, 20_000, 5)
    np.testing.assert_array_equal(found, again)
    assert (found != np.asarray(vit.drop_paths(jax.random.key(1), 0.4, 20_000, 5))).any()


def test_no_drop_path_changes_nothing_and_a_dropped_block_is_none(rng):
    images = jnp.asarray(rng.normal(size=(6, *SHAPE)), jnp.float32)
    params = jax.jit(ENCODER.init)(jax.random.key(0), images)["params"]
    run = jax.jit(lambda params, paths: ENCODER.apply({"params": params}, images, paths=paths))
    plain = run(params, None)
    none = vit.drop_paths(jax.random.key(0), 0.0, 6, 4)
    np.testing.assert_array_equal(run(params, none), plain)
    # Image 2 loses block 1, image 4 the attention of the last block.
    paths = jnp.ones((6, 4, 2)).at[2, 1].set(0).at[4, 3, 0].set(0)
    got = np.asarray(run(params, paths))
    whole = np.array([0, 1, 3, 5])
    np.testing.assert_array_equal(got[whole], plain[whole])

    def silenced(*names, layer):
        silent = jax.tree.map(jnp.copy, params)
        for *parents, leaf in names:
            part = silent["blocks"]
            for name in parents:
                part = part[name]
            part[leaf] = jax.tree.map(lambda x: x.at[layer].set(0), part[leaf])
        return np.asarray(run(silent, None))

    want = silenced(("attn", "proj"), ("fc2",), layer=1)
    np.testing.assert_allclose(got[2], want[2], rtol=1e-5, atol=1e-5)
    want = silenced(("attn", "proj"), layer=3)
    np.testing.assert_allclose(got[4], want[4], rtol=1e-5, atol=1e-5)
    assert np.abs(got[2] - plain[2]).max() > 1e-2


# Mixing and erasing.


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.77, 1.0])
def test_cutmix_cuts_the_box_of_its_formula(kept, monkeypatch):
    monkeypatch.setattr(jax.random, "beta", lambda *_: jnp.float32(kept))
    shape = (12, 20)
    for seed in range(20):
        key = jax.random.key(seed)
        box_key = jax.random.split(key, 4)[3]
        y, x = np.asarray(jax.random.randint(box_key, (2,), 0, jnp.asarray(shape)))
        height, width = (int(side * np.sqrt(1 - kept)) for side in shape)
        want = np.ones(shape)
        top, bottom = np.clip([y - height // 2, y + (height + 1) // 2], 0, shape[0])
        left, right = np.clip([x - width // 2, x + (width + 1) // 2], 0, shape[1])
        want[top:bottom, left:right] = 0
        np.testing.assert_array_equal(mix.kept_fraction(key, shape, 0.0, 1.0), want)


def test_one_of_mixup_and_cutmix_is_drawn_with_its_own_beta():
    draw = jax.jit(
        jax.vmap(partial(mix.kept_fraction, shape=(16, 16), mixup_alpha=0.8, cutmix_alpha=1.0))
    )
    found = np.asarray(draw(jax.random.split(jax.random.key(0), 4000))).reshape(4000, -1)
    cut = ((found == 0) | (found == 1)).all(1)
    assert abs(cut.mean() - 0.5) < 0.03
    mixup = found[~cut]
    assert (mixup == mixup[:, :1]).all()
    np.testing.assert_allclose(mixup[:, 0].mean(), 0.5, atol=0.03)
    np.testing.assert_allclose(mixup[:, 0].var(), 1 / (4 * (2 * 0.8 + 1)), atol=0.008)
    # Clipped boxes are smaller: an image keeps more than half of itself.
    assert 0.6 < found[cut].mean() < 0.8
    for alphas, kinds in (((0.8, 0.0), {False}), ((0.0, 1.0), {True})):
        keys = jax.random.split(jax.random.key(1), 8)
        found = np.stack([mix.kept_fraction(key, (16, 16), *alphas) for key in keys])
        assert set(((found == 0) | (found == 1)).all((1, 2)).tolist()) == kinds


def test_mixed_targets_sum_to_one_and_match_the_pixels():
    """Every image is of one value, its own: the pixels tell whose they are."""
    labels = np.array([0, 2, 1, 1, 0])
    targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), 0.1)
    images = np.broadcast_to(np.arange(5.0)[:, None, None, None], (5, 12, 20, 3))
    for seed in range(30):
        share = mix.kept_fraction(jax.random.key(seed), (12, 20), 0.8, 1.0)
        got, mixed = mix.mix(jnp.asarray(images, jnp.float32), targets, share)
        np.testing.assert_allclose(mixed.sum(1), 1, rtol=1e-5)
        share = np.asarray(share, np.float64)
        for i in range(5):
            own, other = images[i], images[4 - i]
            want = share[..., None] * own + (1 - share[..., None]) * other
            np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)
            # The share of the partner's pixels is the weight of its label.
            weight = (np.asarray(got[i], np.float64).mean() - i) / (4 - 2 * i) if i != 2 else 0
            want = (1 - weight) * targets[i] + weight * targets[4 - i]
            np.testing.assert_allclose(mixed[i], want, atol=1e-5)


def test_erasing_has_its_probability_boxes_and_noise():
    images = jnp.full((4000, 20, 30, 2), 9.0)
    found = np.asarray(jax.jit(mix.erase, static_argnums=2)(jax.random.key(0), images, 0.25))
    erased = found != 9
    assert (erased[..., 0] == erased[..., 1]).all()
    boxes = erased[..., 0][erased.any((1, 2, 3))]
    assert abs(len(boxes) / 4000 - 0.25) < 0.03
    heights, widths = boxes.any(2).sum(1), boxes.any(1).sum(1)
    np.testing.assert_array_equal(heights * widths, boxes.sum((1, 2)))
    areas = heights * widths / 600
    assert heights.max() < 20  # a box is smaller than the image, or another is drawn
    assert areas.min() < 0.04
    assert 0.3 < areas.max() < 0.36
    # Without limits of the image 0.177; tall boxes, which do not fit, are large.
    assert 0.15 < areas.mean() < 0.18
    aspects = np.log(heights / widths)
    assert np.abs(aspects).max() < np.log(1 / 0.3) + 0.35  # whole pixels
    assert aspects.min() < np.log(0.3) + 0.05
    assert aspects.max() > 1
    assert abs(aspects.mean()) < 0.25
    # The corners are reached.
    assert boxes[:, 0, 0].any()
    assert boxes[:, -1, -1].any()
    noise = found[erased]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    always = mix.erase(jax.random.key(1), images[:100], 1.0)
    assert (np.asarray(always) != 9).any((1, 2, 3)).all()


# The stage.


def test_learning_rate_and_weight_decay_of_every_tensor():
    """As in MAE's fine-tuning: classifier and final norm at the full rate, block i of D (from 0) at
    its 0.75^(D - i), embedding and class token at its 0.75^(D + 1)."""
    config = tiny("finetune.base_lr=0.002", "finetune.layer_decay=0.75")
    built = STAGES["finetune"].from_config(config, 1000, 10)
    params = jax.eval_shape(built.init, jax.random.key(0), {}).params
    lrs, decays = optim.per_tensor(params, built.groups)
    assert optim.scaled_lr(0.002, 256, 1) == 0.002  # one view
    for part in (lrs["classifier"], lrs["encoder"]["norm"]):
        np.testing.assert_allclose(jax.tree.leaves(part), 0.002, rtol=1e-6)
    rates = 0.002 * np.array([0.31640625, 0.421875, 0.5625, 0.75])
    for leaf in jax.tree.leaves(lrs["encoder"]["blocks"]):
        np.testing.assert_allclose(leaf.ravel(), rates, rtol=1e-6)
    for leaf in jax.tree.leaves([lrs["encoder"][k] for k in ("patch_embed", "cls_token")]):
        np.testing.assert_allclose(leaf, 0.002 * 0.2373046875, rtol=1e-6)
    assert decays["classifier"] == {"kernel": 0.05, "bias": 0.0}
    assert set(lrs["encoder"]) == {"patch_embed", "cls_token", "blocks", "norm"}


def test_loss_without_regularisation_equals_numpy():
    stage, batch = stage_of(label_smoothing=0.1), batch_of(0)
    now = jax.jit(stage.init)(jax.random.key(0), {})
    kernel = np.asarray(now.params["classifier"]["kernel"])
    assert kernel.shape == (16, CLASSES)
    assert 0.005 < kernel.std() < 0.015
    assert not now.params["classifier"]["bias"].any()
    views = augment.views(batch, *stage.recipes)
    assert views.shape == (BATCH, 1, *SHAPE)
    loss, _ = jax.jit(stage.loss)(now.params, now, (views,), batch, jax.random.key(0))
    tokens = ENCODER.apply({"params": now.params["encoder"]}, views[:, 0])
    logits = np.asarray(tokens[:, 0]) @ kernel
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    want = -(0.9 * log_p[np.arange(BATCH), batch["label"]] + 0.1 * log_p.mean(1)).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_everything_starts_from_what_is_handed_over_and_moves_but_a_learned_position(rng):
    whole = jax.jit(ENCODER.init)(jax.random.key(3), jnp.zeros((1, *SHAPE)))["params"]
    whole["pos_embed"] = jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)
    start = {
        part: STAGES["mae"].handover({"params": {"encoder": whole}})[part]
        for part in STAGES["finetune"].takes
    }
    stage = stage_of(drop_path=0.1)
    before = jax.jit(stage.init)(jax.random.key(0), start)
    assert_trees_equal(before.frozen, {"encoder": {"pos_embed": whole["pos_embed"]}})
    assert_trees_equal({**before.params["encoder"], **before.frozen["encoder"]}, whole)
    after, metrics = jax.jit(partial(step, stage))(before, batch_of(0))
    assert metrics["finite"]
    for x, y in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        assert not np.array_equal(x, y)
    assert_trees_equal(before.frozen, after.frozen)
    parts = {part: getattr(after, part) for part in STAGES["finetune"].saved}
    found = STAGES["finetune"].encoder_params(parts)
    assert_trees_equal(found, {**after.params["encoder"], **after.frozen["encoder"]})


@pytest.mark.slow
def test_the_regularised_loss_is_the_same_on_any_devices_and_microbatches():
    def gradients_of(shape, microbatches):
        stage = dataclasses.replace(stage_of(**FULL), microbatches=microbatches)
        mesh = mesh_of(*shape)
        with jax.set_mesh(mesh):
            now = state.create_state(stage, jax.random.key(0), {}, mesh)
            (loss, _), grads = jax.jit(partial(gradients, stage))(now, batch_of(0))
        return float(loss), jax.device_get(grads)

    loss, whole = gradients_of((1, 1), 1)
    got, grads = gradients_of((2, 2), 2)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [PLAIN, FULL], ids=["plain", "regularised"])
def test_training_learns_to_tell_images_apart(settings):
    stage = stage_of(**settings | dict(drop_path=min(settings["drop_path"], 0.1)))
    now = jax.jit(stage.init)(jax.random.key(0), {})
    update, rank = jax.jit(partial(step, stage)), jax.jit(stage.ranked)

    def accuracy(now):
        batches = [batch_of(1000 + seed) for seed in range(4)]
        moments = stage.recipes[0].mean, stage.recipes[0].std
        seen = [augment.normalise_pixels(batch["image"][:, 0], *moments) for batch in batches]
        found = [rank(now.params, now.frozen, images) for images in seen]
        labels = np.concatenate([batch["label"] for batch in batches])
        return tuple(accuracies(np.concatenate(found), labels).values())

    before = accuracy(now)[0]
    for seed in range(60):
        now, _ = update(now, batch_of(seed))
    assert before < 0.6
    assert accuracy(now) == (pytest.approx(1, abs=0.05), 1.0)  # of three classes


def test_flops_formula_equals_the_compilers_count():
    # One layer a scan: the compiler counts a loop's body once.
    encoder = vit.ViT(256, 1, 4, 4)
    stage = stage_of(encoder=encoder, image_shape=(28, 28, 3), classes=500)
    now = jax.eval_shape(stage.init, jax.random.key(0), {})
    views = jax.ShapeDtypeStruct((BATCH, 1, 28, 28, 3), "float32")
    labels = {"label": jax.ShapeDtypeStruct((BATCH,), "int32")}
    grad = jax.jit(jax.grad(stage.loss, has_aux=True))
    lowered = grad.lower(now.params, now, (views,), labels, jax.eval_shape(jax.random.key, 0))
    counted = lowered.compile().cost_analysis()["flops"]
    assert stage.flops_per_step(BATCH) == pytest.approx(counted, rel=0.05)


def test_accuracies_by_hand():
    ranked = np.array([[4, 1, 2, 3, 0], [1, 0, 4, 5, 6], [2, 9, 8, 7, 5], [0, 1, 2, 3, 4]])
    assert accuracies(ranked, np.array([4, 6, 0, 2])) == {"top1": 0.25, "top5": 0.75}


# Records and images.


def test_records_do_not_depend_on_workers(images):
    source = folder.Folder(str(images / "train"))
    make = loader.FinetuneRecord(
        source, Decoding(3), (Crops((8, 8), (0.3, 1.0), 1),), (5, 3), False, MEAN
    )
    order = loader.Order(len(source), 8, 4, make.seed, range(8))
    threads = list(loader.train_batches(order, make, workers=0))
    processes = list(loader.train_batches(order, make, workers=2))
    assert len(threads) == len(processes) == 4
    for one, other in zip(threads, processes, strict=True):
        assert_trees_equal(one, other)
    assert threads[0]["image"].shape == (8, 1, 8, 8, 3)
    assert set(threads[0]) == set(loader.TrainRecord(*make_fields(make))((0, 0)))
    # Without RandAugment the same crops, untouched.
    plain = loader.FinetuneRecord(*make_fields(make))
    cut = [plain((0, record))["image"] for record in range(21)]
    single = loader.TrainRecord(*make_fields(make))
    for record in range(21):
        np.testing.assert_array_equal(cut[record], single((0, record))["image"])
    augmented = [make((0, record))["image"] for record in range(21)]
    same = sum(np.array_equal(a, b) for a, b in zip(cut, augmented, strict=True))
    assert 0 < same < 15


def make_fields(make):
    return [getattr(make, field.name) for field in dataclasses.fields(loader.TrainRecord)]


@pytest.mark.parametrize("part", [False, True], ids=["all", "subset"])
def test_images_in_memory_are_cut_on_the_host_in_the_same_way(part):
    source = arrays.fashion_mnist("train[80%:]")
    if part:
        source = subsets.select(source, "10%", 0)
    make = loader.FinetuneRecord(
        source, Decoding(1), (Crops((14, 14), (0.3, 1.0), 1),), (5, 3), False, (0.3,)
    )
    order = loader.Order(len(source), 16, 2, make.seed, range(4, 8))
    for step_, batch in enumerate(loader.train_batches(order, make, workers=8)):
        epoch, records = order.of_step(step_)
        for row, record in enumerate(records):
            want = make((epoch, int(record)))
            assert want["image"].shape == (1, 14, 14, 1)
            for key, value in want.items():
                np.testing.assert_array_equal(batch[key][row], value)
            assert want["label"] == source[int(record)][1]


def test_images_are_chosen_by_share_or_list(images, tmp_path):
    source = folder.Folder(str(images / "train"))
    assert subsets.select(source, "all", 0) is source
    few, more = (subsets.select(source, share, 7) for share in ("10%", "50%"))
    assert set(few.records) < set(more.records)
    assert sorted(few[i][1] for i in range(len(few))) == [0, 1]
    (tmp_path / "names.txt").write_text("ant/03.png\nbee/deep/er/99\n")
    listed = subsets.select(source, str(tmp_path / "names.txt"), 0)
    assert [listed[i][1] for i in range(2)] == [0, 1]
    assert listed.num_classes == 2
    with pytest.raises(UserError, match=r"config\.finetune\.images='no\.txt': list 'no\.txt': can"):
        subsets.select(source, "no.txt", 0)


# Configs, and the whole run.


def tiny(*overrides):
    config = configs.load(f"{FILE}:test", ["init_from=random", *overrides])
    with config.unlocked():
        config.model = configs.load(str(CONFIGS / "mae_vitb16.py:test")).model
    return config


def test_pages_have_the_published_settings():
    """Absolute learning rates: 1e-3 at batch 256, 3e-5 at batch 512."""
    ten, one, whole = (configs.load(f"{FILE}{a}").finetune for a in (":10percent", ":1percent", ""))
    assert (ten.images, one.images, whole.images) == ("10%", "1%", "all")
    assert (ten.batch_size, one.batch_size, whole.batch_size) == (256, 512, 1024)
    assert optim.scaled_lr(ten.base_lr, 256, 1) == pytest.approx(1e-3)
    assert optim.scaled_lr(one.base_lr, 512, 1) == pytest.approx(3e-5)
    assert (ten.weight_decay, one.weight_decay) == (0.05, 0.4)
    for section in (ten, one, whole):
        assert (section.epochs, section.warmup_epochs, section.layer_decay) == (50, 5, 0.75)
        assert section.label_smoothing == 0.1
    regular = ("randaugment", "erasing", "mixup_alpha", "cutmix_alpha", "drop_path")
    assert [ten[key] for key in regular] == [True, 0.25, 0.8, 1.0, 0.2]
    assert [one[key] for key in regular] == [False, 0, 0, 0, 0]
    differing = {k for k in whole if whole[k] != ten[k]}
    assert differing == {"images", "batch_size"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("images=0%", "finetune.images='0%': must be 'all', a share from above '0%' to '100%'"),
        ("images=ten%", "finetune.images='ten%': must be"),
        ("images=", "finetune.images='': must be"),
        ("warmup_epochs=3", "finetune.warmup_epochs=3: must be from 0 to the 2 epochs"),
        ("layer_decay=0", "finetune.layer_decay=0.0: must be above 0"),
        ("drop_path=1", "finetune.drop_path=1.0: must be from 0 to below 1"),
        ("label_smoothing=-0.1", "finetune.label_smoothing=-0.1: must be from 0 to below 1"),
        ("mixup_alpha=-1", "finetune.mixup_alpha=-1.0: must be 0 or more"),
        ("cutmix_alpha=1e999", "finetune.cutmix_alpha=inf: must be 0 or more"),
        ("erasing=1.5", "finetune.erasing=1.5: must be from 0 to 1"),
        ("crop_scale=(0.0,1.0)", "finetune.crop_scale"),
        ("base_lr=0", "finetune.base_lr=0.0: must be above 0"),
    ],
)
def test_setting_that_is_not_allowed_is_one_clear_line(override, message):
    config = tiny(f"finetune.{override}")
    with pytest.raises(UserError, match=message):
        pipeline.check(config, devices=8)


def test_what_cannot_start_is_one_clear_line(tmp_path):
    with pytest.raises(
        UserError, match=r"must be the folder of a run, a file of weights, or hf://ORG/NAME$"
    ):
        pipeline.prepare(configs.load(f"{FILE}:test", ["init_from=random"]), Path("none"))
    with pytest.raises(UserError, match=r"no section 'model', which it takes from a run"):
        pipeline.stages_to_show(configs.load(FILE))
    with pytest.raises(UserError, match=r"batch_size=256: must be at most the 80 training images"):
        pipeline.open_images(tiny("finetune.images=1%"))
    for split in ("train", "val"):
        save(tmp_path / "bare" / split / "a.png")
    config = tiny("data.source=folder", f"data.path={tmp_path}/bare")
    with pytest.raises(UserError, match=r"train and val have no labels, which finetune needs"):
        pipeline.open_images(config)


def test_plan_counts_the_chosen_images_and_one_view():
    config = configs.load(f"{FILE}:10percent", ["data.path=absent"])
    with config.unlocked():
        config.model = configs.load(str(CONFIGS / "mae_vitb16.py")).model
    images, _ = pipeline.images_to_plan(config)
    (text,) = pipeline._described(config, images)
    assert "25,000 (50 epochs of 128,117 images, warm-up 2,500)" in text
    assert "256 images x 1 view\n" in text
    block, width = 12 * 768**2 + 13 * 768, 768
    trained = 12 * block + (768 + 1) * width + width + 2 * width + (width + 1) * 1000
    assert f"{trained:,}" in text
    batch = abstract_batch(STAGES["finetune"], config, images["train"], mesh_of(1, 8))
    assert batch["image"].shape == (256, 1, 224, 224, 3)


def test_a_chain_ends_with_the_accuracy_of_the_classifier(tmp_path, monkeypatch, capsys):
    file = tmp_path / "configs" / "chain.py"
    file.parent.mkdir()
    file.write_text(
        "from configs import common\n"
        "def get_config(argument=''):\n"
        "    config = common.base('chain', 'Ti', 7)\n"
        "    common.small_images(config)\n"
        "    common.add_mae(config, 64)\n"
        "    common.add_finetune(config, 64)\n"
        "    return common.finish(config, argument)\n"
    )
    monkeypatch.syspath_prepend(str(CONFIGS.parent))
    settings = [
        "data.train_split=train[80%:]", "mae.epochs=1", "mae.warmup_epochs=0",
        "finetune.epochs=3", "finetune.images=80%", "finetune.base_lr=0.02",
        "finetune.layer_decay=1.0", "finetune.randaugment=False", "finetune.mixup_alpha=0.0",
        "finetune.cutmix_alpha=0.0", "finetune.erasing=0.0", "finetune.crop_scale=(0.6,1.0)",
        "finetune.batch_size=64",
    ]  # fmt: skip
    config = configs.load(f"{file}:test", settings)
    run = tmp_path / "run"
    run_on(monkeypatch, (2, 1), config, run)
    *_, settings, line, empty, report = told = capsys.readouterr().out.splitlines()
    assert settings == "finetune: epochs 3, batch_size 64, base_lr 0.02"
    assert [empty, report] == ["", str(run / "report.html")]
    assert "Fine-tuned: encoder and classifier on 1,280 labelled images" in (
        (run / "report.html").read_text()
    )
    found = json.loads((run / "results.json").read_text())["finetune"]["finetune"]
    share = f"top-1 {100 * found['top1']:.1f} %, top-5 {100 * found['top5']:.1f} %"
    assert line == f"finetune: {share} of 2,000 held-out images"
    assert (found["images"], found["training_images"]) == (2000, 1280)
    assert found["settings"]["epochs"] == 3
    assert 0.3 < found["top1"] < found["top5"] <= 1
    # What was saved, run by hand on the held-out images, has that accuracy.
    folder_ = checkpoints.stage_folder(run, "finetune")
    parts = checkpoints.read_parts(folder_, ("params", "frozen"), mesh_of(1, 1))
    held_out = arrays.fashion_mnist("val")
    pixels = (held_out.images / 255 - config.data.mean) / config.data.std
    tokens = jax.jit(vit.from_config(config.model).apply)(
        {"params": parts["params"]["encoder"]}, jnp.asarray(pixels, jnp.float32)
    )
    logits = tokens[:, 0] @ parts["params"]["classifier"]["kernel"]
    logits += parts["params"]["classifier"]["bias"]
    hits = np.asarray(logits).argmax(1) == held_out.labels
    assert abs(hits.mean() - found["top1"]) < 0.002
    # And so has what people load, by the names of the classes.
    encoder = load_encoder(run)
    assert (encoder.mean, encoder.image_size) == (config.data.mean, (28, 28))
    assert encoder.classes == held_out.classes
    classified = encoder.classify(held_out.images)
    assert classified.probabilities.dtype == np.float32
    np.testing.assert_allclose(classified.probabilities.sum(1), 1, rtol=1e-5)
    named = np.array(held_out.classes)[held_out.labels]
    assert np.mean(np.array(classified.names) == named) == pytest.approx(found["top1"], abs=1e-9)
    model = convert.read_run(run)
    exporting.export(model, tmp_path / "hf", "hf")
    labels = json.loads((tmp_path / "hf" / "config.json").read_text())["id2label"]
    assert list(labels.values()) == held_out.classes
    (run / "classes.json").rename(tmp_path / "classes.json")  # which earlier versions lack
    assert load_encoder(run).classes == [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="no classifier on the feature 'mean'"):
        load_encoder(run, pool="mean").classify(held_out.images[:1])
    # Called again, it trains no more, and says the same.
    run_on(monkeypatch, (2, 1), config, run, report=False)
    assert capsys.readouterr().out.splitlines() == told
    # Other images are classified anew.
    monkeypatch.setitem(arrays.FASHION_MNIST, "val", slice(1000))
    run_on(monkeypatch, (2, 1), config, run, report=False)
    again = json.loads((run / "results.json").read_text())["finetune"]["finetune"]
    assert (again["images"], again["top1"]) == (1000, pytest.approx(hits[:1000].mean(), abs=0.003))


# Labels in a file.


def labelled_pictures(folder):
    """Writes 40 pictures, dark and bright in turn. Returns a function that labels the first ones,
    and one that loads the config of their classifier."""
    for i in range(40):
        save(folder / "set" / "train" / f"{i:02}.png", (28, 28), 250 * (i % 2))

    def label(even, odd, count=30):
        lines = (f"{i:02}.png,{odd if i % 2 else even}\n" for i in range(count))
        (folder / "labels.csv").write_text("image,label\n" + "".join(lines))

    def load(*overrides):
        settings = [f"data.labels={folder}/labels.csv", f"data.path={folder}/set", *overrides]
        file = str(CONFIGS / "finetune_my_images.py")
        config = configs.load(file, ["init_from=random", "data.short_side=28", *settings])
        with config.unlocked():
            config.model = configs.load(str(CONFIGS / "mae_vitb16.py:test")).model
        config.model.channels = 3
        return config

    label("dark", "bright")
    return label, load


def test_a_batch_follows_from_the_images_with_a_label(tmp_path, caplog):
    label, load = labelled_pictures(tmp_path)
    config = load()
    pipeline.check(config, devices=1)
    images = pipeline.open_images(config)
    own = Finetune.own_images(config, images)
    assert {split: len(source) for split, source in own.items()} == {"train": 26, "val": 4}
    assert not set(own["train"].records) & set(own["val"].records)
    said = [record.getMessage() for record in caplog.records]
    assert "labels 30 of 40 train images, as 2 classes: bright, dark." in said[0]
    assert said[1:] == [
        "finetune leaves out the images without a label",
        "no held-out image has a label: finetune holds out 4 of the training images, a tenth of "
        "each class, and trains on 26",
    ]
    unit = jax.device_count()
    assert config.finetune.batch_size == max(26 // 8 // unit, 1) * unit
    # Stages without labels use all images, and are no reason for an error.
    assert STAGES["mae"].own_images(config, images)["train"] is images["train"]
    for count, size in ((10**6, 64), (256, 32)):
        other = load()
        pipeline.set_by_images(other, {"train": sources.Blank(count, 3)})
        assert other.finetune.batch_size == size
    label("one", "one")
    with pytest.raises(
        UserError, match=r"train have no labels \(.*labels.csv has one class, 'one'"
    ):
        pipeline.open_images(config)
    # What `eval` needs labels for is left out, and nothing else.
    config.stages = ("eval",)
    label("dark", "bright")
    with config.unlocked():
        config.eval = configs.load(str(CONFIGS / "eval.py:test")).eval
    config.eval.protocols = ("knn",)
    assert list(pipeline.open_images(config)) == ["train"]


def test_named_images_become_a_classifier(tmp_path, monkeypatch, capsys):
    settings = ["finetune.epochs=4", "finetune.base_lr=0.1", "finetune.layer_decay=1.0"]
    plain = ["randaugment=False", *(f"{key}=0" for key in ("mixup_alpha", "cutmix_alpha"))]
    settings += [f"finetune.{setting}" for setting in (*plain, "erasing=0", "drop_path=0")]
    settings += ["checkpoint.every=1", "finetune.warmup_epochs=1"]
    label, load = labelled_pictures(tmp_path)
    run, calls, saved = tmp_path / "run", [], Checkpoints.save

    def save_one(*arguments):
        if len(calls) == 1:  # the first one is complete
            raise RunFailedError("stopped")
        saved(*arguments)
        calls.append(arguments)

    def start(*more):
        run_on(monkeypatch, (1, 1), load(*settings, *more), run, report=False)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_one)
        with pytest.raises(RunFailedError):
            start()
    assert json.loads((run / "classes.json").read_text()) == {"classes": ["bright", "dark"]}
    label("bright", "dark")
    with pytest.raises(
        UserError, match=r"other images \(26 images as before, but with other labels"
    ):
        start()
    label("dark", "bright")
    capsys.readouterr()
    start()
    line = capsys.readouterr().out.splitlines()[3]
    found = json.loads((run / "results.json").read_text())["finetune"]["finetune"]
    assert (found["images"], found["training_images"], found["drawn"]) == (4, 26, True)
    assert found["labels"] == str(tmp_path / "labels.csv")
    assert line.endswith(
        f"of 4 held-out images, a tenth of those with a label, against the labels of {tmp_path}"
        "/labels.csv"
    )
    assert found["top1"] == 1
    encoder = load_encoder(run)
    pixels = runner.record(load(), pipeline.open_images(load())["train"])
    classified = encoder.classify(np.stack([pixels(i)["image"] for i in (38, 39)]))
    assert classified.names == ["dark", "bright"]
    assert classified.probabilities.argmax(1).tolist() == [1, 0]
    # It knows other classes than these.
    label("dark", "light")
    with pytest.raises(UserError, match="knows the classes bright, dark; the images now have dark"):
        start()
    # The file may be moved.
    label("dark", "bright")
    (tmp_path / "labels.csv").rename(tmp_path / "moved.csv")
    before = (run / "results.json").read_text()
    start(f"data.labels={tmp_path}/moved.csv")
    assert (run / "results.json").read_text() == before
