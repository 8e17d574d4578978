"""All defaults. The configs in this folder contain only what they change.

A config has the keys that all stages share and one section for each stage that it runs. Learning
rates are base rates, multiplied by batch * views / 256; an image has two views, in fine-tuning one.
Those of MIM-Refiner are multiplied by batch / 256.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Number = int | FieldReference  # a placeholder, None, is chosen later


def base(name: str, variant: str = "", patch_size: int = 0, pool: str = "cls") -> ConfigDict:
    """What all stages share; `stages` is empty at first, `add_*` appends to it.

    Without a variant there is no `model` section: it comes from the run in `init_from`.
    """
    config = ConfigDict()
    config.name = name  # the run's folder is runs/<name>, or --workdir
    config.stages = ()
    config.seed = 0
    config.init_from = ""  # a run, file or hf:// id to start from; "random": seeded random weights
    config.log_level = "info"  # debug: parameters, saves, and messages of the libraries
    config.log_every = 50  # steps between two lines of metrics.jsonl
    config.loggers = ()  # that get these lines, too: some of tensorboard, wandb, mlflow
    config.profile = ()  # (first, last) step of each stage that jax.profiler traces for XProf
    config.debug_nans = False  # find the operation that makes the first NaN; slow
    # A step whose loss or gradient is not finite changes nothing. stop: it ends the run; skip: at
    # most nan_limit such steps of a stage are skipped.
    config.nan_policy = "stop"
    config.nan_limit = 10
    # every: epochs (the last step is always saved); keep: number of latest checkpoints that stay;
    # best: knn_accuracy or neighbour_accuracy (see monitor), whose best checkpoint stays, too.
    config.checkpoint = ConfigDict({"every": 5, "keep": 2, "best": ""})
    # k-NN on held-out images during training, if there are any and all images have labels; the
    # labels are not used otherwise. images: maximum of training and of held-out images.
    config.monitor = ConfigDict({"every": 10, "images": 10_000})  # epochs; 0: never

    config.mesh = ConfigDict({"data": -1, "fsdp": 1})  # -1: all remaining devices
    # Memory against speed; neither changes the result (docs/scaling.md).
    config.encoder_microbatches = 1  # parts of a batch that the encoder sees one after the other
    config.remat = "dots"  # what a block recomputes in the backward pass: none, dots or blocks

    if variant:
        config.model = _model(variant, patch_size, pool)
    data = config.data = ConfigDict()
    data.source = "folder"  # fashion_mnist, folder, shards or tfds
    # folder: contains train/ and val/; shards: contains them, or is a pattern of those to train on,
    # "train-{000..255}.tar"; tfds: its data_dir; for all: or an .npz file of images.
    data.path = "data/imagenet"
    data.name = "imagenet2012"  # tfds: name of the data set
    data.train_split = "train"
    data.val_split = "val"  # imagenet2012 calls it validation
    # auto: the class folders, or those of a file; one class is none. none: images without labels,
    # where folders mean something else. FILE.csv: the labels of the images that it lists.
    data.labels = "auto"
    data.label_key = "label"  # shards: in .json, or the column of parquet files
    data.mean = IMAGENET_MEAN
    data.std = IMAGENET_STD
    # Evaluation: the centre is cut from images that are resized so that they just cover a box of
    # its aspect, with this shorter side.
    data.short_side = placeholder(int)  # None: as the run to start from; else 256 for 224 pixels
    # Values that become 0 and 255 in images of more than 8 bits a channel; (): all that 16 bits
    # hold; 32 bits and floating point are then an error.
    data.range = ()
    data.max_pixels = 178_956_970  # larger images are not read
    # Decode each image once, and keep it with at most so many pixels on its shorter side, in the
    # run's folder: for small models. Crops are cut from it. 0: decode it each time.
    data.cache = 0
    # Processes that read and cut images; 0: threads; -1: as the cores and the work warrant.
    data.workers = -1
    # Training only: decode large JPEGs at a smaller scale if the crops still have enough pixels.
    data.scaled_jpeg = False
    data.max_bad_fraction = 0.01  # of the images may be unreadable; others replace them
    return config.lock()  # a misspelt key is an error


def _model(variant: str, patch_size: int, pool: str) -> ConfigDict:
    model = ConfigDict()
    model.variant = variant  # Ti, S, B, L or H: width, depth and heads
    model.width = placeholder(int)  # replaces the variant's
    model.depth = placeholder(int)
    model.heads = placeholder(int)
    model.patch_size = patch_size
    model.image_size = (224, 224)  # height, width
    model.channels = 3
    model.cls_tokens = 1  # learned tokens whose mean is a feature (Pixio has 8, I-JEPA none)
    model.registers = 0  # learned tokens that are no part of a feature
    # Base of rotary positions, which turn queries and keys (DINOv3: 100.0); None: positions are
    # added to the patches.
    model.rope_theta = placeholder(float)
    model.post_norm = False  # norms behind the sums of a block, none at the end (data2vec 2)
    # Feature: the class token (cls), the mean of the patch tokens (mean), or the final norm of the
    # mean of the unnormalised patch tokens (fc_norm).
    model.pool = pool
    model.ln_eps = 1e-6
    model.dtype = "bfloat16"  # of activations; parameters and losses are float32
    model.attention = "auto"  # xla; cudnn (flash attention on NVIDIA GPUs); auto: the faster one
    return model


def _add(config: ConfigDict, stage: str, settings: dict) -> ConfigDict:
    config.stages += (stage,)
    with config.unlocked():
        config[stage] = ConfigDict(settings)
    config.lock()
    return config[stage]


def _photometric(jitter=(0.0, 0.0), blur=(0.0, 0.0), grayscale=(0.0, 0.0), solarize=(0.0, 0.0)):
    """Probabilities for (view 0, view 1), and strengths."""
    return {
        "jitter": jitter,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "blur": blur,
        "blur_sigma": (0.1, 2.0),
        "grayscale": grayscale,
        "solarize": solarize,
        "solarize_threshold": 128,
    }


def no_photometric() -> ConfigDict:
    """Colours as they are."""
    return ConfigDict(_photometric())


def mild_photometric() -> ConfigDict:
    """Brightness, contrast and colours change, and a fifth of the views is grey. Two crops of an
    image are alike in these, which alone would tell it from others."""
    return ConfigDict(_photometric(jitter=(0.8, 0.8), grayscale=(0.2, 0.2)))


def strong_photometric() -> ConfigDict:
    """The colour augmentations of MAE-CT_aug, different for each view."""
    settings = _photometric(
        jitter=(0.8, 0.8), blur=(1.0, 0.1), grayscale=(0.2, 0.2), solarize=(0.0, 0.2)
    )
    return ConfigDict(settings)


def add_mae(config: ConfigDict, batch_size: int) -> ConfigDict:
    """Stage 1: masked pre-training."""
    return _add(
        config,
        "mae",
        {
            "epochs": 800,
            "warmup_epochs": 20,
            "batch_size": batch_size,
            "base_lr": 1.5e-4,
            "weight_decay": 0.05,
            "mask_ratio": 0.75,
            "crop_scale": (0.2, 1.0),
            "photometric": _photometric(),
            "decoder": {"width": 512, "depth": 8, "heads": 16},
        },
    )


def _contrast(temperature: float, crop_scale: tuple[float, float], photometric: ConfigDict) -> dict:
    """What a stage with contrastive heads has."""
    return {
        "temperature": temperature,
        "queue_size": 65536,
        "projector_hidden": 2048,
        "projector_out": 256,
        "predictor_hidden": 4096,
        "crop_scale": crop_scale,
        "photometric": photometric,
    }


def _nnclr(temperature: float) -> dict:
    return {"warmup_fraction": 0.2, **_contrast(temperature, (0.08, 1.0), _photometric())}


def add_head(config: ConfigDict, batch_size: Number) -> ConfigDict:
    """Stage 2: the contrastive head on the frozen encoder."""
    return _add(config, "head", {
        "epochs": 20,
        "batch_size": batch_size,
        "base_lr": 1e-4,
        "weight_decay": 1e-5,
        "top_k": 1,
        **_nnclr(0.15),
    })  # fmt: skip


def _tuning(base_lr: float, frozen_blocks: int) -> dict:
    """What a stage has that also tunes the encoder."""
    return {
        "base_lr": base_lr,  # of the encoder
        "weight_decay": 0.05,
        "layer_decay": 0.65,
        "frozen_blocks": frozen_blocks,
        "head_base_lr": base_lr,
        "head_weight_decay": 1e-5,
        "top_k": 20,
        "ema_decay": 0.9999,
    }


def add_ct(config: ConfigDict, batch_size: Number, frozen_blocks: Number, **changes) -> ConfigDict:
    """Stage 3: contrastive tuning of the upper blocks."""
    settings = {
        "epochs": 20,
        "batch_size": batch_size,
        "target_factor": 0.99,
        **_tuning(1e-4, frozen_blocks),
        **_nnclr(0.15),
    }
    section = _add(config, "ct", settings)
    section.update(changes)
    return section


def _refiner(temperature: float, blocks: tuple[int, ...] | None) -> dict:
    return {
        # A head is behind each of these, counted from 0, and on the final feature; None: those from
        # two thirds of the depth on, but the last.
        "blocks": placeholder(tuple) if blocks is None else blocks,
        "warmup_epochs": 4,
        "end_lr": 1e-6,  # where the schedule ends; not scaled
        **_contrast(temperature, (0.25, 1.0), strong_photometric()),
        # Small crops, which the large ones are compared with; 0 views: none.
        "local": {
            "views": 10,
            # (height, width); None: 96 for 224 pixels, and whole patches.
            "size": placeholder(tuple),
            "crop_scale": (0.05, 0.25),
            "photometric": _photometric(jitter=0.8, blur=0.5, grayscale=0.2, solarize=0.0),
        },
    }


def follow_images(*stages: ConfigDict) -> None:
    """Leaves open what follows from the number of images (docs/recipe.md), beside the batch. The
    stages have one queue, which is handed on."""
    queue = placeholder(int)
    for stage in stages:
        with stage.unlocked():
            stage.update(epochs=placeholder(int), base_lr=placeholder(float))
            stage.queue_size = queue
            if "head_base_lr" in stage:
                stage.head_base_lr = placeholder(float)


def add_refine_head(
    config: ConfigDict,
    batch_size: Number,
    temperature: float = 0.2,
    blocks: tuple[int, ...] | None = None,
) -> ConfigDict:
    """MIM-Refiner's first stage: contrastive heads on the frozen encoder."""
    return _add(config, "refine_head", {
        "epochs": 20,
        "batch_size": batch_size,
        "base_lr": 2e-4,  # times batch / 256
        "weight_decay": 1e-5,
        "top_k": 1,
        **_refiner(temperature, blocks),
    })  # fmt: skip


def add_refine(
    config: ConfigDict,
    batch_size: Number,
    temperature: float = 0.2,
    blocks: tuple[int, ...] | None = None,
) -> ConfigDict:
    """MIM-Refiner's second stage: the encoder and the heads."""
    return _add(config, "refine", {
        "epochs": 30,
        "batch_size": batch_size,
        **_tuning(4e-4, 0),  # rates times batch / 256
        **_refiner(temperature, blocks),
    })  # fmt: skip


def add_finetune(config: ConfigDict, batch_size: Number) -> ConfigDict:
    """Full fine-tuning with labels.

    The settings are those that the authors' group published for later work, for 10 % of the images
    at batch 256. The optimiser's betas are (0.9, 0.95), as in all stages here.
    """
    return _add(config, "finetune", {
        "images": "all",  # or a percentage of each class, such as "10%", or a file with a list
        "epochs": 50,
        "warmup_epochs": 5,
        "batch_size": batch_size,
        "base_lr": 1e-3,  # times batch / 256, as an image has one view
        "weight_decay": 0.05,
        "layer_decay": 0.75,
        "crop_scale": (0.08, 1.0),
        "randaugment": True,
        "erasing": 0.25,  # probability that a box of the image becomes noise
        "mixup_alpha": 0.8,  # 0: no mixup
        "cutmix_alpha": 1.0,  # 0: no cutmix
        "label_smoothing": 0.1,
        "drop_path": 0.2,  # of the last block; rises linearly from 0
    })  # fmt: skip


def add_eval(config: ConfigDict) -> ConfigDict:
    """Evaluation on frozen features. `probe` trains on features of centre crops, extracted once;
    `probe_augmented`, the paper's protocol, encodes augmented images in each epoch."""
    return _add(
        config,
        "eval",
        {
            # some of knn, probe, probe_augmented, lowshot, cluster
            "protocols": ("knn", "probe", "cluster"),
            "pixels": False,  # also evaluate raw pixels, as a baseline
            "batch_size": 256,
            "pool": "",  # cls, mean, fc_norm or cls+mean; empty: the model's
            "final_norm": True,  # features after the final norm, or before it
            "dtype": "",  # of the encoder's activations; empty: the model's
            # Blocks, from 0, behind which knn and cluster also measure the features: (4, 8, 11).
            "blocks": (),
            "memory_mb": 1024,  # for k-NN and k-means on each device, for duplicates on the host
            "knn": {"k": (1, 10, 20, 100, 200), "temperature": 0.07, "standardise": False},
            "probe": {
                "epochs": 50,
                "batch_size": 1024,
                "base_lrs": tuple(round(0.01 * i, 2) for i in range(10, 0, -1)),
                "crop_scale": (0.08, 1.0),  # of augmented images
                # Fraction of the training images to choose the best probe on; 0: the test images.
                "held_out": 0.0,
            },
            "lowshot": {
                "images": (1, 2, 5),  # per class
                "splits": 3,  # for each of these
                "shares": (0.01, 0.1),  # fractions of all training images
                "lists": (),  # text files with names of images, in place of all these
                "weight_decays": (0.00025,),  # times the number of images; the first is reported
            },
            "cluster": {
                "split": "val",  # or train
                # 0: as many as classes, without labels as "auto", which chooses a number.
                "clusters": FieldReference(0, field_type=object),
                "groups": 0,  # in clusters.csv, of clusters that are alike; 0: none
                "runs": 100,
                "normalise": True,
                "pca": 0,  # components; 0: features as they are
                "minibatch": 0,  # images of a mini-batch; 0: all at once
                "duplicates": 0.99,  # pairs from this cosine on are listed; 0: none
                "subsets": (),  # also of these classes alone: imagenet_dogs15, imagenet10
            },
            "map": "pca",  # in the report: pca, tsne or umap
            "export": "",  # features with file names: npz or parquet
        },
    )


def small_images(config: ConfigDict) -> None:
    """The packaged Fashion-MNIST images, in float32, which is fast on CPUs; without
    rematerialisation, as small images need little memory."""
    config.remat = "none"
    if "model" in config:
        config.model.update(image_size=(28, 28), channels=1, dtype="float32")
    config.data.update(
        source="fashion_mnist", path="", train_split="train", val_split="val",
        mean=(0.286,), std=(0.353,), short_side=28, workers=0,
    )  # fmt: skip


def finish(config: ConfigDict, argument: str, variants: tuple[str, ...] = ()) -> ConfigDict:
    """The config itself for no argument; for "test" its tiny variant, with the same stages.

    `variants` are further arguments, which the config file has handled.

    Raises:
      ValueError: the argument is none of these.
    """
    known = ("test", *variants)
    if argument and argument not in known:
        allowed = " or ".join(map(repr, known))
        raise ValueError(f"this config takes no argument or {allowed}, not {argument!r}")
    return _tiny(config) if argument == "test" else config


def _tiny(config: ConfigDict) -> ConfigDict:
    config.name += "_test"
    if config.init_from:
        config.init_from += "_test"
    elif config.stages[0] != "mae":
        config.init_from = "random"  # in the full config the user sets it
    config.log_every = 10
    config.checkpoint.every = 1
    if config.data.short_side is None or config.data.short_side > _SMALL:
        small_images(config)
        if "model" in config:
            config.model.patch_size = 7
    if "model" in config:
        config.model.update(width=32, depth=4, heads=2)
    for stage in config.stages:
        config[stage].batch_size = 256
        config[stage].update(_TINY[stage])
        if "local" in config[stage]:
            config[stage].local.views = 2
    return config


_SMALL = 32  # pixels; the tiny variants of configs for larger images use the packaged ones
_TINY_HEAD = dict(
    epochs=1, queue_size=512, projector_hidden=64, projector_out=32, predictor_hidden=64
)
_TINY_REFINER = dict(blocks=(1, 2), warmup_epochs=0, **_TINY_HEAD)
_TINY = {
    "mae": dict(epochs=2, warmup_epochs=1, decoder=dict(width=32, depth=1, heads=2)),
    "head": _TINY_HEAD,
    "ct": dict(frozen_blocks=2, **_TINY_HEAD),
    "refine_head": _TINY_REFINER,
    "refine": _TINY_REFINER,
    "finetune": dict(epochs=2, warmup_epochs=1),
    "eval": dict(
        knn=dict(k=(1, 10)),
        probe=dict(epochs=3, batch_size=256),
        lowshot=dict(splits=2),
        cluster=dict(runs=3),
    ),
}
