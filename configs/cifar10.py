"""All stages on CIFAR-10, at 32 pixels.

    maect run --config=cifar10
    maect run --config=cifar10:refine
    maect run --config=cifar10:cpu

A ViT with patches of 4 pixels is trained by mae, head and ct and evaluated against raw pixels.
`refine` trains refine_head and refine from the mae of the first run, `runs/cifar10`. `cpu` is a
smaller ViT for fewer epochs.
Images: TensorFlow Datasets' cifar10, prepared as array_record; or a file of arrays,
`--config.data.path=FILE.npz --config.data.val_split=val` (`maect_jax/data/arrays.py` explains its
keys).
Hardware: a GPU or a TPU host; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 100 + 10 + 40 epochs of 50,000 images, about 10 minutes on an H100; `cpu`, with 10 + 1 + 8
epochs, 2.4 hours of one core that multiplies bf16 in hardware (`--config.model.dtype=bfloat16`).
Expected: `ct` gains 10 points of k-NN, 7 of the probe and 13 of k-means over its `mae`, and of
`cpu` 11, 5 and 6 (`docs/results.md`); the paper has no figures for it.
"""

from configs import common


def get_config(argument=""):
    config = common.base("cifar10", "Ti", patch_size=4)
    config.model.update(image_size=(32, 32))
    config.data.update(
        source="tfds", name="cifar10", path="", val_split="test", short_side=32, workers=0,
        mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262),
    )  # fmt: skip

    config.remat = "none"  # small images need little memory
    config.checkpoint.every = config.monitor.every = 25
    if argument == "refine":
        _add_refiner(config)
    else:
        _add_stages(config)
    common.add_eval(config).pixels = argument != "refine"
    if argument == "cpu":
        _for_cpu(config)
    return common.finish(config, argument, variants=("refine", "cpu"))


def _add_stages(config):
    mae = common.add_mae(config, batch_size=256)
    mae.update(epochs=100, warmup_epochs=10, crop_scale=(0.4, 1.0), base_lr=1e-3)
    mae.decoder.update(width=128, depth=4, heads=4)
    small_head = dict(queue_size=16_384, crop_scale=(0.2, 1.0))
    head = common.add_head(config, batch_size=256)
    head.update(epochs=10, base_lr=5e-4, **small_head)
    ct = common.add_ct(config, batch_size=256, frozen_blocks=4)
    ct.update(
        epochs=40, base_lr=5e-4, layer_decay=0.9, head_base_lr=5e-4, top_k=10, ema_decay=0.999,
        **small_head,
    )  # fmt: skip
    for stage in head, ct:
        stage.photometric = common.mild_photometric()


def _add_refiner(config):
    config.name += "_refine"
    config.init_from = "runs/cifar10"
    head = common.add_refine_head(config, batch_size=256)
    head.update(epochs=10, base_lr=1e-3)
    refine = common.add_refine(config, batch_size=256)
    refine.update(
        epochs=40, base_lr=1e-3, head_base_lr=1e-3, layer_decay=0.9, top_k=10, ema_decay=0.999,
    )  # fmt: skip
    for stage in head, refine:
        stage.update(queue_size=16_384, crop_scale=(0.2, 1.0))
        stage.local.update(views=4, crop_scale=(0.1, 0.4))
        stage.photometric.update(blur=(0.0, 0.0), solarize=(0.0, 0.0))  # too strong for 32 pixels
        stage.local.photometric.blur = 0.0


def _for_cpu(config):
    config.name += "_cpu"
    config.model.update(width=128, depth=8, heads=4, dtype="float32")
    config.checkpoint.every = 1  # a run of hours is interrupted sooner or later
    config.monitor.every = 4
    config.mae.update(epochs=10, warmup_epochs=1, batch_size=128, base_lr=1.5e-3)
    config.mae.decoder.update(width=96, depth=2)
    for stage in config.head, config.ct:
        stage.update(
            batch_size=128, projector_hidden=1024, projector_out=128, predictor_hidden=2048
        )  # fmt: skip
    config.head.update(epochs=1, base_lr=1e-3)
    config.ct.update(epochs=8, base_lr=1.5e-3, head_base_lr=1e-3, layer_decay=1.0)
