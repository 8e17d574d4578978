"""Checks a config before anything is made. Each complaint names the key, its value, what goes."""

import math

from ml_collections import ConfigDict

from maect_jax import config as pages
from maect_jax.data import arrays, sources, subsets
from maect_jax.errors import UserError
from maect_jax.models import vit
from maect_jax.stages import build

_STAGES = (*build.TRAINING, "eval")
_HEAD_KEYS = ("projector_hidden", "projector_out", "predictor_hidden", "queue_size")
# Two stages must agree on the encoder; the image size may differ.
_ENCODER_KEYS = ("patch_size", "channels", "ln_eps")


class _Checker:
    """Reads keys of one config and complains in one form."""

    def __init__(self, config: ConfigDict):
        self.values = pages.flat(config)

    def need(self, key: str, allowed: str, holds) -> None:
        value = self.values[key]
        if not holds(value):
            raise UserError(f"config.{key}={value!r}: must be {allowed}")

    def one_of(self, key: str, options) -> None:
        self.need(key, "one of " + ", ".join(map(repr, options)), lambda v: v in options)

    def positive(self, *keys: str) -> None:
        for key in keys:
            self.need(key, "above 0", lambda v: 0 < v < math.inf)

    def not_negative(self, *keys: str) -> None:
        for key in keys:
            self.need(key, "0 or more", lambda v: 0 <= v < math.inf)

    def share(self, *keys: str) -> None:
        for key in keys:
            self.need(key, "from 0 to below 1", lambda v: 0 <= v < 1)


def stages(config: ConfigDict) -> None:
    """Checks the list of stages, which the other checks follow.

    Raises:
      UserError: it is empty, out of order, or names a stage that the page has no section for.
    """
    _Checker(config).need(
        "stages", f"some of {_STAGES}, in that order and at least one",
        lambda v: v and [s for s in _STAGES if s in v] == list(v),
    )  # fmt: skip
    for name in config.stages:
        if name not in config:
            raise UserError(f"config.stages={config.stages!r}: this page has no section {name!r}")
    if config.stages[:1] == ("mae",) and "ct" in config.stages and "head" not in config.stages:
        raise UserError(f"config.stages={config.stages!r}: ct needs head before it")


def has_model(config: ConfigDict) -> None:
    """Checks that a page describes its model, for what runs without another run.

    Raises:
      UserError: it takes the model from a run.
    """
    if "model" not in config:
        raise UserError(
            f"config.init_from={config.init_from!r}: this page has no section 'model', which it "
            "takes from a run when it runs; name a page that has one"
        )


def settings(config: ConfigDict, devices: int) -> None:
    """Checks every value that stands for itself.

    Args:
      config: a whole config.
      devices: how many share a batch.

    Raises:
      UserError: a value is not allowed.
    """
    check = _Checker(config)
    check.need("seed", "from 0 to 2^32 - 1", lambda v: 0 <= v < 2**32)
    check.positive("log_every", "checkpoint_every")
    check.one_of("log_level", ("info", "debug"))
    check.one_of("remat", tuple(vit.REMAT))
    check.positive("encoder_microbatches")
    _model(check)
    _data(check)
    for name in config.stages:
        check.positive(f"{name}.batch_size")
        batch_size = config[name].batch_size
        if batch_size % devices:
            near = max(batch_size // devices, 1) * devices
            raise UserError(
                f"config.{name}.batch_size={batch_size}: the {devices} devices must divide it, "
                f"as they do {near}"
            )
        if name == "eval":
            _eval(check)
        else:
            _microbatches(config.encoder_microbatches, name, batch_size, devices)
            _training(check, name)
            if name == "mae":
                _mae(check, config)
            elif name == "finetune":
                _finetune(check)
            else:
                _contrast(check, config, name)


def _microbatches(parts: int, name: str, batch_size: int, devices: int) -> None:
    views = build.views(name)
    crops = batch_size * views // devices
    if crops % parts:
        raise UserError(
            f"config.encoder_microbatches={parts}: must divide the {crops} crops of a device "
            f"(config.{name}.batch_size={batch_size}, views: {views}, devices: {devices})"
        )


def _model(check: _Checker) -> None:
    check.one_of("model.variant", tuple(vit.VARIANTS))
    for key in vit.Size._fields:
        check.need(f"model.{key}", "above 0, or None", lambda v: v is None or v > 0)
    check.positive("model.patch_size", "model.channels", "model.ln_eps")
    check.one_of("model.pool", ("cls", "mean"))
    check.one_of("model.dtype", ("float32", "bfloat16"))
    patch = check.values["model.patch_size"]
    check.need(
        "model.image_size", f"(height, width), each a multiple of the patch size {patch}",
        lambda v: len(v) == 2 and all(isinstance(s, int) and s > 0 and s % patch == 0 for s in v),
    )  # fmt: skip
    width, heads = _size(check).width, _size(check).heads
    if width % 4 or width % heads:
        raise UserError(
            f"config.model.width={width}: must be a multiple of 4 and of the {heads} heads"
        )


def _size(check: _Checker) -> vit.Size:
    own = {k: check.values[f"model.{k}"] for k in vit.Size._fields}
    named = vit.VARIANTS[check.values["model.variant"]]
    return named._replace(**{k: v for k, v in own.items() if v is not None})


def _data(check: _Checker) -> None:
    check.one_of("data.source", sources.KINDS)
    if check.values["data.source"] == "fashion_mnist":
        check.need(
            "data.path", "empty for the packaged images; set config.data.source=folder as well",
            lambda v: not v,
        )  # fmt: skip
        for split in ("data.train_split", "data.val_split"):
            check.one_of(split, tuple(arrays.FASHION_MNIST))
    check.positive("data.short_side")
    check.not_negative("data.workers")
    check.need("data.max_bad_fraction", "from 0 to 1", lambda v: 0 <= v <= 1)
    channels, image = check.values["model.channels"], check.values["model.image_size"]
    for key in ("data.mean", "data.std"):
        check.need(key, f"as many numbers as channels, {channels}", lambda v: len(v) == channels)
    check.need("data.std", "above 0", lambda v: min(v) > 0)
    check.need(
        "data.short_side", f"at least the larger side of the image, {max(image)}",
        lambda v: v >= max(image),
    )  # fmt: skip


def _training(check: _Checker, name: str) -> None:
    check.positive(f"{name}.epochs", f"{name}.base_lr")
    check.not_negative(f"{name}.weight_decay")
    check.need(
        f"{name}.crop_scale", "(low, high) with 0 < low <= high <= 1",
        lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1,
    )  # fmt: skip
    if name != "finetune":
        _photometric(check, f"{name}.photometric")


def _photometric(check: _Checker, colours: str) -> None:
    check.not_negative(f"{colours}.solarize_threshold")
    for key, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
        check.need(f"{colours}.{key}", f"from 0 to {most}", lambda v, most=most: 0 <= v <= most)
    check.need(
        f"{colours}.blur_sigma", "(low, high) with 0 < low <= high <= 2",
        lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 2,
    )  # fmt: skip
    for key in ("jitter", "blur", "grayscale", "solarize"):
        check.need(
            f"{colours}.{key}", f"{build.VIEWS} probabilities, one a view",
            lambda v: len(v) == build.VIEWS and all(0 <= p <= 1 for p in v),
        )  # fmt: skip


def _warmup(check: _Checker, name: str) -> None:
    epochs = check.values[f"{name}.epochs"]
    check.need(
        f"{name}.warmup_epochs", f"from 0 to the {epochs} epochs", lambda v: 0 <= v <= epochs
    )


def _mae(check: _Checker, config: ConfigDict) -> None:
    check.share("mae.mask_ratio")
    _warmup(check, "mae")
    width, heads = config.mae.decoder.width, config.mae.decoder.heads
    check.positive("mae.decoder.width", "mae.decoder.depth", "mae.decoder.heads")
    check.need("mae.decoder.width", f"a multiple of 4 and of the {heads} heads",
               lambda v: v % 4 == 0 and width % heads == 0)  # fmt: skip
    if config.init_from:
        raise UserError(f"config.init_from={config.init_from!r}: stage mae starts from nothing")


def _contrast(check: _Checker, config: ConfigDict, name: str) -> None:
    check.positive(*(f"{name}.{key}" for key in (*_HEAD_KEYS, "temperature", "top_k")))
    check.share(f"{name}.warmup_fraction")
    size = config[name].queue_size
    check.need(f"{name}.top_k", f"at most the queue size, {size}", lambda v: v <= size)
    if name == "ct":
        depth = _size(check).depth
        check.need("ct.frozen_blocks", f"from 0 to the depth, {depth}", lambda v: 0 <= v <= depth)
        check.need("ct.target_factor", "from 0 to 1", lambda v: 0 <= v <= 1)
        check.need("ct.ema_decay", "from 0 to 1", lambda v: 0 <= v <= 1)
        check.positive("ct.layer_decay", "ct.head_base_lr")
        check.not_negative("ct.head_weight_decay")
        if "head" in config.stages:
            _same_head(config.head, config.ct, "config.head")


def _finetune(check: _Checker) -> None:
    check.need(
        "finetune.images", "'all', a share from above '0%' to '100%', or the path of a list of "
        "names", lambda v: _is_share(v) if v.endswith("%") else v,
    )  # fmt: skip
    _warmup(check, "finetune")
    check.positive("finetune.layer_decay")
    check.share("finetune.drop_path", "finetune.label_smoothing")
    check.not_negative("finetune.mixup_alpha", "finetune.cutmix_alpha")
    check.need("finetune.erasing", "from 0 to 1", lambda v: 0 <= v <= 1)


def _is_share(text: str) -> bool:
    try:
        return 0 < subsets.percent(text) <= 100
    except ValueError:
        return False


def _eval(check: _Checker) -> None:
    check.positive("eval.knn.temperature", "eval.probe.epochs", "eval.probe.batch_size")
    check.positive("eval.cluster.runs")
    check.need("eval.knn.k", "numbers above 0, at least one", lambda v: v and min(v) > 0)
    check.need("eval.probe.base_lrs", "above 0, at least one", lambda v: v and min(v) > 0)


def _same_head(before: ConfigDict, now: ConfigDict, where: str) -> None:
    for key in _HEAD_KEYS:
        if before[key] != now[key]:
            raise UserError(f"config.ct.{key}={now[key]!r}: {where} has {before[key]!r}")


def succession(before: ConfigDict, saved: str, config: ConfigDict, first: str) -> None:
    """Checks that the first stage can take over a saved stage of another run.

    Args:
      before: the config of that run.
      saved: the stage that is taken over.
      config: the config that is about to run.
      first: its first stage.

    Raises:
      UserError: the encoders or the heads differ, or there is no head for stage ct.
    """
    where = f"config.init_from={config.init_from!r}"
    sizes = [build.encoder_size(c.model) for c in (before, config)]
    for key in vit.Size._fields:
        old, new = (getattr(size, key) for size in sizes)
        if old != new:
            raise UserError(f"{where}: its encoder has {key} {old}, config.model has {new}")
    for key in _ENCODER_KEYS:
        old, new = before.model[key], config.model[key]
        if old != new:
            raise UserError(f"{where}: its config.model.{key} is {old!r}, not {new!r}")
    for key in ("mean", "std"):
        old, new = before.data[key], config.data[key]
        if old != new:
            raise UserError(f"{where}: its config.data.{key} is {old!r}, not {new!r}")
    if first == "ct":
        if saved in ("mae", "finetune"):
            raise UserError(f"{where}: stage ct starts from a run with a head, this one has none")
        _same_head(before[saved], config.ct, f"{where}: that run")
