"""The configs against the paper's tables, written once more."""

from functools import partial

import jax
import pytest
from clu.parameter_overview import count_parameters

from maect_jax import config as configs
from maect_jax import files, pipeline
from maect_jax.data import sources
from maect_jax.data.augment import Photometric
from maect_jax.data.base import Identity
from maect_jax.data.transforms import FIELDS
from maect_jax.errors import UserError
from maect_jax.models import nnclr, vit
from maect_jax.run import folder
from maect_jax.run.folder import Run
from maect_jax.stages import STAGES
from maect_jax.stages.base import warmup_updates
from maect_jax.stages.step import step
from tests.helpers import CONFIGS, ROOT
from tests.helpers.common import mesh_of

PIPELINES = ("cifar10", "quickstart")
OF_A_RUN = (
    "eval",
    "finetune",
    "finetune_my_images",
    "tune_my_images",
    "refine_my_images",
)  # which take their model from a run
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "common")

# The paper's hyper-parameters (arXiv 2304.10520) as its authors published them.
# size: width, depth, heads, patch, pool, images a batch, frozen blocks
SIZES = {
    "b16": (768, 12, 12, 16, "mean", 1024, 6),
    "l16": (1024, 24, 16, 16, "cls", 1024, 12),
    "h16": (1280, 32, 16, 16, "cls", 512, 16),
    "h14": (1280, 32, 16, 14, "cls", 512, 16),
}
# config: epochs, head base lr, temperature, target factor, top-k
TUNING = {
    "ct_vitb16": (20, 1e-4, 0.15, 0.99, 20),
    "ct_vitl16": (20, 1e-4, 0.20, 0.99, 20),
    "ct_vith16": (30, 1e-4, 0.30, 0.995, 20),
    "ct_vith14": (30, 1e-4, 0.30, 0.995, 20),
    "ct_aug_vitb16": (80, 5e-4, 0.15, 0.99, 10),
    "ct_aug_vitl16": (40, 5e-4, 0.15, 0.99, 10),
    "ct_aug_vith16": (40, 5e-4, 0.35, 0.995, 20),
    "ct_aug_vith14": (40, 5e-4, 0.35, 0.995, 20),
}
# The hyper-parameters of MIM-Refiner (arXiv 2402.10093) as its authors published them.
# size: blocks with heads, temperature, batch
REFINER = {"l16": (range(16, 23), 0.2, 1024), "h14": (range(20, 31), 0.3, 512)}
REFINED = {f"{kind}_vit{size}" for kind in ("refine_head", "refine") for size in REFINER}


def load(name, *overrides):
    return configs.load(str(CONFIGS / f"{name.replace(':', '.py:')}"
                          f"{'' if ':' in name else '.py'}"), overrides)  # fmt: skip


def test_every_row_of_the_tables_has_its_config():
    expected = {f"mae_vit{size}" for size in ("b16", "l16", "h16")}
    expected |= {f"{kind}_vit{size}" for size in SIZES for kind in ("head", "head_aug")}
    assert set(NAMES) == expected | set(TUNING) | REFINED | {*OF_A_RUN, *PIPELINES}


def test_long_is_the_quickstart_on_more_epochs():
    quick, long = load("quickstart"), load("quickstart:long")
    changed = {line.partition(":")[0] for line in configs.differences(quick, long)}
    assert changed == {"name", "checkpoint.every", "mae.epochs", "head.epochs", "ct.epochs"}
    assert all(long[stage].epochs > 3 * quick[stage].epochs for stage in ("mae", "head", "ct"))
    with pytest.raises(
        UserError, match="no argument or 'test' or 'refine' or 'long' or 'photos', not"
    ):
        load("quickstart:lung")


def test_few_images_are_fine_tuned_in_batches_that_fit_them():
    config, large = load("finetune_my_images"), load("finetune:10percent")
    assert config.finetune.batch_size is None
    # The same rate at 64 images as the large one's at 256.
    assert 64 * config.finetune.base_lr == 256 * large.finetune.base_lr
    changed = {line.partition(":")[0] for line in configs.differences(large, config)}
    assert changed - {"name", "init_from", "data.path", "data.scaled_jpeg"} == {
        f"finetune.{key}"
        for key in ("images", "batch_size", "base_lr", "crop_scale", "erasing", "mixup_alpha",
                    "cutmix_alpha", "drop_path")
    }  # fmt: skip
    assert load("finetune_my_images:test").finetune.batch_size == 256


def for_images(name, count, *overrides):
    """The config `name` with a ViT-B/16, for so many images. All devices share a batch whole."""
    config = load(name, "encoder_microbatches=1", *overrides)
    with config.unlocked():
        config.model = load("mae_vitb16").model
    pipeline.check(config, jax.device_count())
    images = {"train": sources.Blank(count, 3)}
    pipeline.set_by_images(config, images)
    pipeline.check_enough(config, images)
    return config


@pytest.mark.parametrize(
    ("count", "batch", "epochs", "queue", "peak"),
    [
        (480, 32, 144, 240, 1e-3),
        (1_000, 64, 120, 500, 1e-3),
        (10_000, 256, 67, 5_000, 1e-3),
        (100_000, 256, 38, 8_192, 1e-3),
        (1_000_000, 256, 21, 8_192, 20 / 82_026),
        (1_281_167, 256, 20, 8_192, 20 / 100_080),  # the paper's, for its images
    ],
)
@pytest.mark.parametrize("name", ["tune_my_images", "refine_my_images"])
def test_tuning_follows_from_the_number_of_images(name, count, batch, epochs, queue, peak):
    config = for_images(name, count)
    for stage in pipeline.training_stages(config):
        section = config[stage.name]
        found = section.batch_size, section.epochs, section.queue_size
        assert found == (batch, epochs, queue)
        groups = stage.from_config(config, count).groups.values()
        assert [group.lr for group in groups] == pytest.approx([peak] * len(groups), rel=2e-3)


def test_what_is_given_is_kept():
    given = ("head.batch_size=128", "ct.epochs=7", "head.queue_size=96", "ct.base_lr=0.5")
    config = for_images("tune_my_images", 1_000, *given)
    head, tuning = config.head, config.ct
    assert (head.batch_size, tuning.epochs, tuning.base_lr) == (128, 7, 0.5)
    assert head.queue_size == tuning.queue_size == 96
    assert (head.epochs, head.base_lr) == (120, 0.001)  # half, as the batch is twice the rule's
    assert (tuning.batch_size, tuning.head_base_lr) == (64, 0.002)
    with pytest.raises(UserError, match=r"config.ct.top_k=20: must be .* the queue size, 10"):
        for_images("tune_my_images", 1_000, "head.queue_size=10")
    with pytest.raises(UserError, match=r"config.head.batch_size=32: .* at most the 20 training"):
        for_images("tune_my_images", 20)


def test_a_run_keeps_what_followed_from_its_images(tmp_path):
    def claim(count):
        config = for_images("tune_my_images", count)
        config.init_from = "random"
        run = Run(config, tmp_path, mesh_of(1, 1))
        with folder.opened(run, None, {"train": Identity(count, str(count))}):
            return configs.read(tmp_path / "config.json")

    assert claim(1_000).head.batch_size == claim(1_000).head.batch_size == 64
    with pytest.raises(UserError, match=r"ct.batch_size: 64 -> 32.*1000 images before, 480"):
        claim(480)


def test_a_run_that_resumes_keeps_its_values(tmp_path, monkeypatch):
    """On other devices, and where a version before had other ones."""

    def prepared(devices):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        config = load("tune_my_images", "init_from=random")
        with config.unlocked():
            config.model = load("mae_vitb16").model
        pipeline.prepare(config, tmp_path)
        pipeline.set_by_images(config, {"train": sources.Blank(1_000, 3)})
        return config

    before = prepared(1)
    assert (before.ct.batch_size, prepared(32).ct.batch_size) == (64, 128)
    before.ct.epochs = 20
    files.write_json(tmp_path / "config.json", before.to_dict())
    assert configs.differences(before, prepared(32)) == []


def test_what_is_planned_for_other_devices_is_for_them():
    config = load("tune_my_images")
    with config.unlocked():
        config.model = load("mae_vitb16").model
    pipeline.images_to_plan(config, devices=48)
    assert config.ct.batch_size == 48 * config.encoder_microbatches


def test_only_small_models_cut_from_images_that_are_kept():
    assert {name for name in NAMES if load(name).data.cache} == set()
    assert load("quickstart:photos").data.cache == 128
    for cache in (1, 63, 2**14 + 1):
        config = load("quickstart:photos", f"data.cache={cache}")
        with pytest.raises(UserError, match=f"data.cache={cache}: must be 0, or from 64,"):
            pipeline.check(config, devices=1)
    wide = load("quickstart:photos", "model.image_size=(56,112)")
    pipeline.check(wide, devices=1)
    wide.data.cache = 127
    with pytest.raises(UserError, match=r"data.cache=127: must be 0, or from 128,"):
        pipeline.check(wide, devices=1)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in (*OF_A_RUN, *PIPELINES, *REFINED)])
def test_config_has_the_papers_numbers(name):
    config = load(name)
    kind, _, size = name.rpartition("_vit")
    width, depth, heads, patch, pool, batch, frozen = SIZES[size]
    model = config.model
    assert vit.size_of(model) == vit.Size(width, depth, heads)
    assert (model.patch_size, model.pool) == (patch, pool)
    assert (model.image_size, model.channels, model.ln_eps) == ((224, 224), 3, 1e-6)
    assert model.dtype == "bfloat16"
    (stage,) = config.stages
    section = config[stage]
    assert config.name == name
    assert section.batch_size == batch
    before = {"mae": "", "head": f"mae_vit{size}", "head_aug": f"mae_vit{size}"}
    before |= {"ct": f"head_vit{size}", "ct_aug": f"head_aug_vit{size}"}
    if kind.startswith("head") and size == "h14":
        assert config.init_from == ""  # the public checkpoint, which the user names
    else:
        assert config.init_from == (before[kind] and f"runs/{before[kind]}")
    if stage == "mae":
        assert (section.epochs, section.warmup_epochs) == (800, 20)
        assert (section.base_lr, section.weight_decay) == (1.5e-4, 0.05)
        assert (section.mask_ratio, section.crop_scale) == (0.75, (0.2, 1.0))
        assert section.decoder.to_dict() == {"width": 512, "depth": 8, "heads": 16}
        return
    assert (section.queue_size, section.warmup_fraction) == (65536, 0.2)
    assert (section.projector_hidden, section.projector_out) == (2048, 256)
    assert (section.predictor_hidden, section.crop_scale) == (4096, (0.08, 1.0))
    if stage == "head":
        assert (section.epochs, section.temperature, section.top_k) == (20, 0.15, 1)
        assert (section.base_lr, section.weight_decay) == (1e-4, 1e-5)
    else:
        tuned = (section.epochs, section.head_base_lr, section.temperature)
        assert (*tuned, section.target_factor, section.top_k) == TUNING[name]
        assert (section.base_lr, section.weight_decay, section.layer_decay) == (1e-4, 0.05, 0.65)
        assert (section.frozen_blocks, section.ema_decay) == (frozen, 0.9999)
        assert section.head_weight_decay == 1e-5
    colours = section.photometric
    probabilities = {key: colours[key] for key in ("jitter", "blur", "grayscale", "solarize")}
    if kind.endswith("aug"):
        assert probabilities == {
            "jitter": (0.8, 0.8), "blur": (1.0, 0.1),
            "grayscale": (0.2, 0.2), "solarize": (0.0, 0.2),
        }  # fmt: skip
        strengths = (colours.brightness, colours.contrast, colours.saturation, colours.hue)
        assert strengths == (0.4, 0.4, 0.2, 0.1)
        assert (colours.blur_sigma, colours.solarize_threshold) == ((0.1, 2.0), 128)
    else:
        assert set(probabilities.values()) == {(0.0, 0.0)}


@pytest.mark.parametrize("name", sorted(REFINED))
def test_config_has_the_numbers_of_the_refiner(name):
    config, (stage, _, size) = load(name), name.rpartition("_vit")
    blocks, temperature, batch = REFINER[size]
    section, built = config[stage], STAGES[stage].from_config(config, sources.IMAGENET_TRAIN)
    assert config.stages == (stage,)
    assert built.blocks == tuple(blocks)
    assert (section.batch_size, section.temperature) == (batch, temperature)
    assert (section.queue_size, section.warmup_epochs, section.end_lr) == (65536, 4, 1e-6)
    assert built.projector.clone(parent=None) == nnclr.Projector(
        2048, 256, "bfloat16", vit.gelu, vit.xavier
    )
    assert built.predictor.clone(parent=None) == nnclr.Predictor(
        4096, 256, "bfloat16", vit.gelu, vit.xavier, last_norm=True
    )
    head_lr = built.groups["projector"]
    tuning = stage == "refine"
    assert (section.epochs, section.top_k) == ((30, 20) if tuning else (20, 1))
    assert head_lr.lr == pytest.approx((4e-4 if tuning else 2e-4) * batch / 256)
    assert (head_lr.weight_decay, head_lr.end_lr) == (1e-5, 1e-6)
    if tuning:
        encoder = built.groups["encoder"]
        assert (encoder.lr, encoder.weight_decay) == (head_lr.lr, 0.05)
        assert (encoder.layer_decay, section.frozen_blocks, section.ema_decay) == (0.65, 0, 0.9999)
        assert encoder.undecayed == ("bias", "scale", "cls_token")
    large, small = built.recipes
    assert (large.size, large.crop_scale) == ((224, 224), (0.25, 1.0))
    side = {"l16": 96, "h14": 98}[size]
    assert (small.size, small.crop_scale) == ((side, side), (0.05, 0.25))
    jitter = dict(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grayscale=0.2)
    assert large.photometric == (
        Photometric(blur=1.0, **jitter), Photometric(blur=0.1, solarize=0.2, **jitter)
    )  # fmt: skip
    assert small.photometric == (Photometric(blur=0.5, **jitter),) * 10


def test_eval_config_has_the_protocols_numbers():
    section = load("eval").eval
    assert section.probe.base_lrs == (0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01)
    assert (section.probe.epochs, section.probe.batch_size) == (50, 1024)
    assert (section.knn.k, section.knn.temperature) == ((1, 10, 20, 100, 200), 0.07)
    assert section.cluster.runs == 100


def test_clusters_are_a_number_or_auto_and_earlier_runs_have_no_groups(tmp_path):
    for text, value in (("auto", "auto"), ("20", 20), ("0", 0)):
        built = load("quickstart", f"eval.cluster.clusters={text}")
        assert built.eval.cluster.clusters == value
        pipeline.check(built, devices=1)
    built.eval.cluster.clusters = "auto"  # as a config file does
    built.eval.cluster.clusters = 20
    content = built.to_dict()
    for key in ("duplicates", "groups"):
        del content["eval"]["cluster"][key]
    files.write_json(tmp_path / "config.json", content)
    cluster = configs.read(tmp_path / "config.json").eval.cluster
    assert (cluster.clusters, cluster.groups) == (20, 0)
    assert cluster.duplicates == built.eval.cluster.duplicates


def batch_of(config, stage):
    """Shapes of a batch of cut views."""
    rows = (config[stage].batch_size,)
    shapes = {
        "index": (rows, "int32"),
        "label": (rows, "int32"),
        "seed": ((*rows, 2), "uint32"),
    }
    for field, (crops, _) in zip(FIELDS, STAGES[stage].view_sets(config), strict=False):
        shapes[field] = (*rows, crops.count, *crops.size, config.model.channels), "uint8"
    return {key: jax.ShapeDtypeStruct(*value) for key, value in shapes.items()}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OF_A_RUN])
@pytest.mark.parametrize("variant", ["", ":test"])
def test_config_builds_locks_and_its_full_state_has_a_shape(name, variant):
    config = load(name + variant)
    assert config.is_locked
    pipeline.check(config, devices=8)
    for stage in config.stages:
        if stage != "eval":
            built = STAGES[stage].from_config(config, sources.IMAGENET_TRAIN)
            state = jax.eval_shape(built.init, jax.random.key(0), {})
            assert state.queue is None or state.queue.ids.shape[1] == config[stage].batch_size
            after, metrics = jax.eval_shape(partial(step, built), state, batch_of(config, stage))
            assert after == state
            assert metrics["loss"].dtype == "float32"
    documented = (CONFIGS / f"{name}.py").read_text()
    assert f"maect run --config={name}" in documented


def test_test_variants_chain_in_folders_of_their_own():
    for name in NAMES:
        full, tiny = load(name), load(name + ":test")
        assert tiny.name == f"{full.name}_test"
        if full.init_from:
            assert tiny.init_from == f"{full.init_from}_test"
        assert tiny.stages == full.stages
        assert full.is_locked
        assert tiny.is_locked
    for name in ("head_vith14:test", "refine_head_vith14:test"):
        assert load(name).init_from == "random"


@pytest.mark.parametrize("percent", [0, 20, 29, 57, 70, 100])
@pytest.mark.parametrize("steps", [1, 7, 90, 100, 75060])
def test_warm_up_is_the_floor_of_its_share(percent, steps):
    assert warmup_updates(percent / 100, steps) == percent * steps // 100


def test_showpiece_has_the_known_number_of_parameters():
    config = load("ct_vith16")
    stage = STAGES["ct"].from_config(config, sources.IMAGENET_TRAIN)
    state = jax.eval_shape(stage.init, jax.random.key(0), {})
    block = 12 * 1280**2 + 13 * 1280
    assert count_parameters(state.frozen) == 16 * block + (768 + 1) * 1280 + 1280
    head = 1280 * 2048 + 2048**2 + 2048 * 256 + 2 * (2048 + 2048 + 256) + 2 * 256 * 4096 + 2 * 4096
    assert count_parameters(state.params) == 16 * block + 2 * 1280 + head
    assert stage.steps == 30 * (1_281_167 // 512) == 75060
    assert stage.warmup == 15012
    assert stage.groups["encoder"].lr == pytest.approx(1e-4 * 512 * 2 / 256)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ct.epoch=3", r"no key 'ct.epoch'; did you mean 'ct.epochs'"),
        ("ct.epochs=many", r"ct.epochs=many: expected int, such as 20"),
        ("ct.epochs=2.5", r"ct.epochs=2.5: expected int"),
        ("ct.base_lr=None", r"expected float"),
        ("ct=3", r"config.ct is a section; its keys are ct.base_lr, ct.batch_size"),
        ("ct.epochs", r"write --config.ct.epochs=VALUE"),
        ("ct.crop_scale=('a','b')", r"expected tuple, such as \(0.08, 1.0\)"),
        ("model.image_size=224", r"expected tuple, such as \(224, 224\)"),
        ("ct.crop_scale=a,b", r"expected tuple, such as \(0.08, 1.0\)"),
    ],
)
def test_override_that_is_wrong_is_one_clear_line(override, message):
    with pytest.raises(UserError, match=message) as error:
        load("ct_vitb16", override)
    assert "\n" not in str(error.value)


def test_a_config_with_a_misspelt_key_is_one_clear_line(tmp_path):
    text = (CONFIGS / "ct_vith16.py").read_text().replace("temperature=", "temprature=")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "wrong.py").write_text(text)
    with pytest.raises(UserError, match=r"wrong\.py: not a config.*temprature") as error:
        configs.load(str(tmp_path / "configs" / "wrong.py"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=4294967296", "seed=4294967296: must be from 0"),
        ("stages=('ct','mae')", r"stages=\('ct', 'mae'\): must be some of"),
        ("stages=('mae','ct')", "ct needs head before it"),
        ("mae.mask_ratio=1.0", "mask_ratio=1.0: must be from 0 to below 1"),
        ("model.cls_tokens=-1", "cls_tokens=-1: must be from 0 to 1024"),
        ("model.cls_tokens=0", "config.model.pool='cls': the encoder has no class token"),
        ("model.cls_tokens=0 model.pool=mean eval.pool=cls+mean", r"'cls\+mean': the encoder has"),
        ("model.cls_tokens=0 model.pool=mean mae.mask_ratio=0.99", "0.99: leaves none of the 16"),
        (
            "model.depth=4 model.post_norm=True ct.frozen_blocks=4",
            "frozen_blocks=4: must be from 0 to 3",
        ),
        ("model.rope_theta=0", "rope_theta=0.0: must be above 0, .*or None"),
        ("model.rope_theta=100 model.width=40 model.heads=4", "multiple of 4, not 40 / 4 = 10"),
        ("model.post_norm=True model.pool=fc_norm", "'fc_norm': a post-norm encoder has no final"),
        ("model.post_norm=True eval.pool=fc_norm", "eval.pool"),
        ("ct.head_weight_decay=-1", "head_weight_decay=-1.0: must be 0 or more"),
        ("ct.base_lr=1e999", "base_lr=inf: must be above 0"),
        ("ct.photometric.blur_sigma=(0,0)", "blur_sigma=.*must be .low, high"),
        ("data.std=(0.0,)", "data.std=.*above 0"),
        ("data.range=(255,0)", r"data.range=\(255, 0\): must be \(\), or \(BLACK, WHITE\)"),
        ("data.range=(1,)", "data.range=.*BLACK"),
        ("data.range=('a','b')", "data.range=.*BLACK"),
        ("data.max_pixels=0", "data.max_pixels=0: must be above 0"),
        ("data.short_side=27", "data.short_side=27: must be at least the shorter side .*28"),
        ("data.cache=64", "data.cache=64: must be 0, as images in memory"),
        ("ct.crop_scale=(1.0,0.2)", "crop_scale"),
        ("model.heads=5", "model.width=96: must be a multiple of 4 and of the 5 heads"),
        ("ct.projector_out=32", "ct.projector_out=32: must be 64"),
        ("eval.knn.k=(0,)", "eval.knn.k"),
        ("eval.cluster.clusters=Auto", "clusters='Auto': must be 0 .as many as classes., 'auto', "),
        ("eval.cluster.clusters=-1", "clusters=-1: must be 0 .as many"),
        ("eval.cluster.clusters=2.5", "clusters='2.5': must be 0 .as many"),
        ("eval.cluster.clusters=2147483648", "clusters=2147483648: must be 0 .as many"),
        ("eval.cluster.clusters=7 eval.cluster.groups=8", "groups=8: must be 0, or at most"),
        ("eval.cluster.groups=-1", "groups=-1: must be 0, or at most"),
        ("eval.blocks=(0,6)", r"eval.blocks=\(0, 6\): must be different .* from 0 to 5"),
        ("eval.blocks=(-1,)", "eval.blocks"),
        ("eval.blocks=(1,1)", "eval.blocks"),
        ("eval.blocks=(1.0,)", "eval.blocks"),
        ("eval.blocks=(1,) eval.protocols=probe", r"eval.protocols=.*: must have knn or cluster"),
    ],
)
def test_value_that_is_not_allowed_is_one_clear_line(override, message):
    config = load("quickstart", *override.split())

    def check():
        pipeline.check_stages(config)
        pipeline.check(config, devices=8)

    with pytest.raises(UserError, match=message):
        check()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "refine.blocks=(6,)",
            r"refine.blocks=\(6,\): must be different numbers of blocks, from 0 to 5",
        ),
        ("refine.blocks=(3,3)", r"refine.blocks=\(3, 3\): must be different"),
        ("refine.blocks=(3,)", r"refine.blocks=\(3,\): must be \(3, 4\), as in config.refine_head"),
        ("refine.projector_out=32", "refine.projector_out=32: must be 64"),
        ("refine.local.size=(13,14)", r"size=\(13, 14\): must be .* multiple of the patch size 7"),
        ("refine.local.size=(14.0,14)", r"size=\(14.0, 14\): must be .* multiple"),
        ("refine.local.size=(14,35)", r"size=\(14, 35\): must be .* at most \(28, 28\)"),
        ("refine.local.views=-1", "local.views=-1: must be from 0 to 64"),
        ("refine.local.crop_scale=(0.5,0.2)", "local.crop_scale=.*low <= high"),
        ("refine.local.photometric.jitter=2", "local.photometric.jitter=2.0: must be from 0 to 1"),
        ("refine.end_lr=0.0011", "end_lr=0.0011: must be at most .* 0.001 "),
        ("refine.local.views=3 encoder_microbatches=16", "=16: must divide the 24 crops"),
        (
            "model.channels=2 data.mean=(0,0) data.std=(1,1) refine.local.photometric.jitter=0.5",
            "refine.local.photometric.jitter=0.5: is for gray and RGB",
        ),
        ("refine.batch_size=1", "refine.batch_size=1: must be above 1"),
        ("refine.batch_size=60", "refine.batch_size=60: must be"),
    ],
)
def test_value_of_the_refiner_that_is_not_allowed_is_one_clear_line(override, message):
    config = load("quickstart:refine", *override.split())
    with pytest.raises(UserError, match=message):
        pipeline.check(config, devices=8)


def test_overrides_are_typed():
    config = load(
        "ct_vitb16", "ct.base_lr=1", "model.width=96", "data.path=a b", "ct.crop_scale=(0.3, 1.0)"
    )
    assert (config.ct.base_lr, config.model.width) == (1.0, 96)
    assert isinstance(config.ct.base_lr, float)
    assert (config.data.path, config.ct.crop_scale) == ("a b", (0.3, 1.0))
    evaluation = load("eval", "eval.cluster.subsets=", "eval.protocols=knn,cluster").eval
    assert (evaluation.cluster.subsets, evaluation.protocols) == ((), ("knn", "cluster"))
    refine = load("refine_my_images", "refine.blocks=7", "eval.blocks=4")
    assert (refine.refine.blocks, refine.eval.blocks) == ((7,), (4,))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("configs/ct_vitb61.py", "no such file; did you mean .*ct_vitb16.py"),
        ("configs/ct_vitb16.py:large", "no argument or 'test', not 'large'"),
        ("README.md", r"not a config: its name must end in \.py"),
        ("tests/conftest.py", "not a config"),
    ],
)
def test_file_that_is_no_config_is_one_clear_line(name, message):
    with pytest.raises(UserError, match=message):
        configs.load(str(ROOT / name))


def test_config_survives_its_file(tmp_path):
    config = load("quickstart")
    files.write_json(tmp_path / "config.json", config.to_dict())
    again = configs.read(tmp_path / "config.json")
    assert configs.differences(config, again) == []
    again.ct.epochs = 99
    assert configs.differences(config, again) == [f"ct.epochs: {config.ct.epochs!r} -> 99"]


@pytest.mark.parametrize("name", ["mae", "ct", "refine"])
def test_flops_formula_equals_the_compilers_count(name):
    own = (
        "mae.decoder.depth=1", "ct.frozen_blocks=1", "mae.decoder.width=128", "mae.batch_size=64",
        "ct.batch_size=64", "ct.queue_size=64", "head.queue_size=64", "mae.mask_ratio=0.5",
    )  # fmt: skip
    if name.startswith("refine"):
        stages = ("refine_head", "refine")
        own = [f"{stage}.{one}" for stage in stages for one in ("queue_size=64", "blocks=(0,1)")]
        own += ["refine.frozen_blocks=1"]
    # One layer a scan: the compiler counts a loop's body once.
    config = load(
        "quickstart:refine" if name.startswith("refine") else "quickstart", *own,
        "model.depth=2", "model.width=256", "model.heads=4", "model.cls_tokens=4",
        "model.registers=3", "model.rope_theta=100",
    )  # fmt: skip
    if name == "mae":
        with config.unlocked():
            config.model.depth = 1
    stage = STAGES[name].from_config(config, 8000)
    state = jax.eval_shape(stage.init, jax.random.key(0), {})
    views = tuple(
        jax.ShapeDtypeStruct((64, len(recipe.photometric), *recipe.size, 1), "float32")
        for recipe in stage.recipes
    )
    rows = {key: jax.ShapeDtypeStruct((64,), "int32") for key in ("index", "label")}
    grad = jax.jit(jax.grad(stage.loss, has_aux=True))
    lowered = grad.lower(state.params, state, views, rows, jax.eval_shape(jax.random.key, 0))
    counted = lowered.compile().cost_analysis()["flops"]
    assert stage.flops_per_step(64) == pytest.approx(counted, rel=0.05)


def test_colours_are_changed_only_of_images_that_have_them():
    """Of other channels, as arrays may have them, what needs gray or RGB is refused by its key."""
    other = ("model.channels=4", "data.mean=(0.5,0.5,0.5,0.5)", "data.std=(0.2,0.2,0.2,0.2)")
    plain = partial(load, "ct_vitb16", *other)
    pipeline.check(plain("ct.photometric.blur=(0.5,0.5)"), devices=1)
    for key in ("ct.photometric.jitter", "ct.photometric.grayscale"):
        with pytest.raises(UserError, match=rf"config\.{key}=.*: .*switch it off for .*channels=4"):
            pipeline.check(plain(f"{key}=(0.0,0.5)"), devices=1)
    tuned = load("finetune:test", *other[1:])
    with tuned.unlocked():
        tuned.model = load("quickstart", *other).model
    with pytest.raises(UserError, match=r"config\.finetune\.randaugment=True: .*switch it off"):
        pipeline.check(tuned, devices=1)
