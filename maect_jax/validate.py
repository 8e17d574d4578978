"""Checks a config before anything is made. Each complaint names the key, its value, what goes."""

import math

from ml_collections import ConfigDict

from maect_jax import checks
from maect_jax.checks import Checker
from maect_jax.data import arrays, sources
from maect_jax.errors import UserError
from maect_jax.evals import monitor
from maect_jax.models import vit
from maect_jax.run import bad_steps
from maect_jax.stages import build

_STAGES = (*build.TRAINING, "eval")
_HEAD_KEYS = ("projector_hidden", "projector_out", "predictor_hidden", "queue_size")
# Two stages must agree on the encoder; the image size may differ.
_ENCODER_KEYS = ("patch_size", "channels", "ln_eps")
# Far more than can be trained; what goes on is planned in a moment, without much memory.
_UNITS = 2**16  # width, depth or heads
_SIDE = 2**14  # pixels
_TABLE = 2**25  # numbers in the table of positions
_WORKERS = 1024


def stages(config: ConfigDict) -> None:
    """Checks the list of stages, which the other checks follow.

    Raises:
      UserError: it is empty, out of order, or names a stage that the page has no section for.
    """
    Checker(config).need(
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
    check = Checker(config)
    check.need("seed", "from 0 to 2^32 - 1", lambda v: 0 <= v < 2**32)
    check.positive("log_every", "checkpoint.every", "checkpoint.keep", "monitor.images")
    check.not_negative("monitor.every", "nan_limit")
    check.one_of("log_level", ("info", "debug"))
    check.one_of("nan_policy", bad_steps.POLICIES)
    check.need("profile", "(), or the first step and the last, from 1 on", _is_range)
    _best(check)
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
            checks.evaluation(check)
        else:
            _microbatches(config.encoder_microbatches, name, batch_size, devices)
            _training(check, name)
            if name == "mae":
                _mae(check, config)
            elif name == "finetune":
                checks.finetune(check)
            else:
                _contrast(check, config, name)


def _is_range(steps: tuple) -> bool:
    whole = all(type(step) is int for step in steps)
    return not steps or (len(steps) == 2 and whole and 0 < steps[0] <= steps[1])


def _best(check: Checker) -> None:
    check.one_of("checkpoint.best", ("", *monitor.MEASURED))
    every, saved = check.values["monitor.every"], check.values["checkpoint.every"]
    if check.values["checkpoint.best"] and (not every or every % saved):
        raise UserError(
            f"config.checkpoint.best={check.values['checkpoint.best']!r}: is measured every "
            f"config.monitor.every={every} epochs, which must be a multiple of "
            f"config.checkpoint.every={saved}, and not 0"
        )


def _microbatches(parts: int, name: str, batch_size: int, devices: int) -> None:
    views = build.views(name)
    crops = batch_size * views // devices
    if crops % parts:
        raise UserError(
            f"config.encoder_microbatches={parts}: must divide the {crops} crops of a device "
            f"(config.{name}.batch_size={batch_size}, views: {views}, devices: {devices})"
        )


def _model(check: Checker) -> None:
    check.one_of("model.variant", tuple(vit.VARIANTS))
    for key in vit.Size._fields:
        check.need(
            f"model.{key}", f"above 0 and at most {_UNITS:,}, or None",
            lambda v: v is None or 0 < v <= _UNITS,
        )  # fmt: skip
    check.positive("model.patch_size", "model.channels", "model.ln_eps")
    check.one_of("model.pool", vit.POOLS)
    check.one_of("model.dtype", checks.DTYPES)
    patch = check.values["model.patch_size"]
    check.need(
        "model.image_size",
        f"(height, width), each a multiple of the patch size {patch}, and at most {_SIDE:,}",
        lambda v: len(v) == 2 and all(0 < side <= _SIDE and side % patch == 0 for side in v),
    )  # fmt: skip
    width, heads = _size(check).width, _size(check).heads
    if width % 4 or width % heads:
        raise UserError(
            f"config.model.width={width}: must be a multiple of 4 and of the {heads} heads"
        )
    _positions(check, width)


def _positions(check: Checker, width: int) -> None:
    """The table of positions, a row of `width` numbers a patch, must be of a size to compute."""
    patch = check.values["model.patch_size"]
    check.need(
        "model.image_size", f"at most {_TABLE // width:,} patches of {patch} x {patch} pixels for "
        f"a width of {width}",
        lambda v: math.prod(side // patch for side in v) * width <= _TABLE,
    )  # fmt: skip


def _size(check: Checker) -> vit.Size:
    own = {k: check.values[f"model.{k}"] for k in vit.Size._fields}
    named = vit.VARIANTS[check.values["model.variant"]]
    return named._replace(**{k: v for k, v in own.items() if v is not None})


def _data(check: Checker) -> None:
    check.one_of("data.source", sources.KINDS)
    if check.values["data.source"] == "fashion_mnist":
        check.need(
            "data.path", "empty for the packaged images; set config.data.source=folder as well",
            lambda v: not v,
        )  # fmt: skip
        for split in ("data.train_split", "data.val_split"):
            check.one_of(split, tuple(arrays.FASHION_MNIST))
    check.at_most(_SIDE, "data.short_side")
    check.need("data.workers", f"from 0 to {_WORKERS}", lambda v: 0 <= v <= _WORKERS)
    check.need("data.max_bad_fraction", "from 0 to 1", lambda v: 0 <= v <= 1)
    channels, image = check.values["model.channels"], check.values["model.image_size"]
    for key in ("data.mean", "data.std"):
        check.need(key, f"as many numbers as channels, {channels}", lambda v: len(v) == channels)
    check.need("data.mean", "finite numbers", lambda v: all(map(math.isfinite, v)))
    check.need("data.std", "above 0", lambda v: all(0 < x < math.inf for x in v))
    check.need(
        "data.short_side", f"at least the larger side of the image, {max(image)}",
        lambda v: v >= max(image),
    )  # fmt: skip


def _training(check: Checker, name: str) -> None:
    check.positive(f"{name}.epochs", f"{name}.base_lr")
    check.not_negative(f"{name}.weight_decay")
    checks.crop_scale(check, name)
    if name != "finetune":
        checks.photometric(check, f"{name}.photometric")


def _mae(check: Checker, config: ConfigDict) -> None:
    check.share("mae.mask_ratio")
    checks.warmup(check, "mae")
    width, heads = config.mae.decoder.width, config.mae.decoder.heads
    check.at_most(_UNITS, "mae.decoder.width", "mae.decoder.depth", "mae.decoder.heads")
    check.need("mae.decoder.width", f"a multiple of 4 and of the {heads} heads",
               lambda v: v % 4 == 0 and width % heads == 0)  # fmt: skip
    _positions(check, width)
    if config.init_from:
        raise UserError(f"config.init_from={config.init_from!r}: stage mae starts from nothing")


def _contrast(check: Checker, config: ConfigDict, name: str) -> None:
    check.positive(*(f"{name}.{key}" for key in (*_HEAD_KEYS, "temperature", "top_k")))
    check.share(f"{name}.warmup_fraction")
    size = config[name].queue_size
    check.need(f"{name}.top_k", f"at most the queue size, {size}", lambda v: v <= size)
    if name == "ct":
        depth = _size(check).depth
        check.need(
            "ct.frozen_blocks", f"from 0 to the depth, {depth}, or None, half of it",
            lambda v: v is None or 0 <= v <= depth,
        )  # fmt: skip
        check.need("ct.target_factor", "from 0 to 1", lambda v: 0 <= v <= 1)
        check.need(
            "ct.ema_decay", "from 0 to 1, or None, which looks back over a tenth of the updates",
            lambda v: v is None or 0 <= v <= 1,
        )  # fmt: skip
        check.at_most(1, "ct.layer_decay")
        check.positive("ct.head_base_lr")
        check.not_negative("ct.head_weight_decay")
        if "head" in config.stages:
            _same_head(config.head, config.ct, "config.head")


def _same_head(before: ConfigDict, now: ConfigDict, where: str) -> None:
    for key in _HEAD_KEYS:
        if before[key] != now[key]:
            raise UserError(f"config.ct.{key}={now[key]!r}: {where} has {before[key]!r}")


def succession(before: ConfigDict, saved: str, config: ConfigDict, first: str) -> None:
    """Checks that the first stage can take over a saved stage of another run, or of files.

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
    pooled = [c.model.pool == "fc_norm" for c in (before, config)]
    if pooled == [True, False]:
        raise UserError(
            f"{where}: its final norm is that of the pooled feature; set config.model.pool=fc_norm"
        )
    for key in ("mean", "std"):
        new = config.data[key]
        old = before.data.get(key, new)  # files do not always tell
        if old != new:
            raise UserError(f"{where}: its config.data.{key} is {old!r}, not {new!r}")
    if first == "ct":
        if saved not in ("head", "ct"):
            raise UserError(f"{where}: stage ct starts from a run with a head, this one has none")
        _same_head(before[saved], config.ct, f"{where}: that run")
