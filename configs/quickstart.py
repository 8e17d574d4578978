"""All stages and an evaluation on Fashion-MNIST, which is part of the package.

    maect run --config=quickstart
    maect run --config=quickstart:refine
    maect run --config=quickstart:long
    maect run --config=quickstart:photos --config.data.path=MY_IMAGES

A small ViT is trained by all stages (mae, head, ct) and evaluated on held-out images against raw
pixels. The run's folder, `runs/quickstart`, gets a report with pictures, `report.html`.
Hardware: two CPU cores and 1.4 GiB. Duration: 4 minutes; `long`, with six times the epochs, below
40.
Expected: tuning raises the accuracy of k-means clusters from 52 to 63 %, and k-NN from 78 to 80 %;
`docs/quickstart.md` has all figures, for six seeds, and what else was tried.
`refine` tunes the mae of `runs/quickstart` by MIM-Refiner in 3 minutes (`docs/refiner.md`).
`photos` is the same model at 56 pixels, in colour, for a few hundred photographs of your own
(`docs/guide_laptop.md`).
"""

from configs import common

_SMALL_HEAD = dict(
    queue_size=1024, projector_hidden=256, projector_out=64, predictor_hidden=512,
    crop_scale=(0.5, 1.0),
)  # fmt: skip


def get_config(argument=""):
    config = common.base("quickstart", "Ti", patch_size=7)
    common.small_images(config)
    config.model.update(width=96, depth=6, heads=3)
    config.log_every = 20
    config.remat = "none"  # faster on a CPU
    config.checkpoint.every = 1
    if argument == "refine":
        _add_refiner(config)
    else:
        _add_stages(config, epochs=(72, 16, 78) if argument == "long" else (12, 4, 13))

    evaluation = common.add_eval(config)
    if argument == "refine":
        evaluation.blocks = tuple(range(6))
    else:
        evaluation.pixels = True
    evaluation.map = "tsne"
    evaluation.knn.update(k=(1, 10, 20), standardise=True)

    if argument == "long":
        config.name += "_long"
        config.checkpoint.every = 5
    if argument == "photos":
        _photos(config)
    return common.finish(config, argument, variants=("refine", "long", "photos"))


def _add_stages(config, epochs):
    mae = common.add_mae(config, batch_size=32)
    mae.update(warmup_epochs=1, base_lr=4e-3, crop_scale=(0.6, 1.0))
    mae.decoder.update(width=64, depth=2, heads=4)

    head = common.add_head(config, batch_size=64)
    head.update(base_lr=2e-3, **_SMALL_HEAD)

    ct = common.add_ct(config, batch_size=64, frozen_blocks=3, base_lr=3e-3, head_base_lr=2e-3)
    ct.update(layer_decay=1.0, top_k=5, ema_decay=0.995, **_SMALL_HEAD)
    mae.epochs, head.epochs, ct.epochs = epochs
    # Crops of an image are equally bright, which alone would tell it apart from others.
    for stage in head, ct:
        stage.photometric.jitter = (0.8, 0.8)


def _add_refiner(config):
    config.name += "_refine"
    config.init_from = "runs/quickstart"
    head = common.add_refine_head(config, batch_size=64, temperature=0.15, blocks=(3, 4))
    head.update(epochs=2, base_lr=4e-3)
    refine = common.add_refine(config, batch_size=64, temperature=0.15, blocks=(3, 4))
    refine.update(
        epochs=5, base_lr=6e-3, head_base_lr=4e-3, layer_decay=1.0, top_k=5, ema_decay=0.995,
    )  # fmt: skip
    for stage in head, refine:
        stage.update(warmup_epochs=1, **_SMALL_HEAD)
        stage.local.update(views=4, crop_scale=(0.2, 0.5))
        # Small grey images have no colours to change, and little to blur.
        stage.photometric = common.no_photometric()
        stage.local.photometric.update(jitter=0.0, blur=0.0, grayscale=0.0)


def _photos(config):
    config.name += "_photos"
    config.model.update(image_size=(56, 56), channels=3)
    # Each photograph is decoded once. Of 128 pixels most crops have the model's 56 or more.
    config.data.update(
        source="folder", path="my_images", short_side=64, cache=128,
        mean=common.IMAGENET_MEAN, std=common.IMAGENET_STD,
    )  # fmt: skip
    # For a few hundred images: with ten times as many a tenth of the epochs will do, and a queue of
    # 1,024. A queue that is longer than an epoch contains images twice.
    config.mae.epochs, config.head.epochs, config.ct.epochs = 100, 20, 100
    config.head.queue_size = config.ct.queue_size = 256
    for stage in config.head, config.ct:
        stage.photometric = common.mild_photometric()
