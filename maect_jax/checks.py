"""Checks of single values and of the sections that stand by themselves."""

import importlib.util
import math
import os

from ml_collections import ConfigDict

from maect_jax import config as pages
from maect_jax.data import sources, subsets
from maect_jax.errors import UserError, shown
from maect_jax.evals import cluster, export, maps, protocols
from maect_jax.models import vit
from maect_jax.stages import build

DTYPES = ("float32", "bfloat16")
_INT32 = 2**31  # steps, record numbers and sizes of arrays stay below it


class Checker:
    """Reads keys of one config and complains in one form."""

    def __init__(self, config: ConfigDict):
        self.values = pages.flat(config)

    def need(self, key: str, allowed: str, holds) -> None:
        value = self.values.get(key)  # a section that another run has written may lack it
        try:
            allows = holds(value)
        except TypeError:  # nor need its values be of these types
            allows = False
        if not allows:
            raise UserError(f"config.{key}={shown(repr(value))}: must be {allowed}")

    def one_of(self, key: str, options) -> None:
        self.need(key, "one of " + ", ".join(map(repr, options)), lambda v: v in options)

    def positive(self, *keys: str) -> None:
        for key in keys:
            self.need(key, "above 0, and below 2^31", lambda v: 0 < v < _INT32)

    def not_negative(self, *keys: str) -> None:
        for key in keys:
            self.need(key, "0 or more, and below 2^31", lambda v: 0 <= v < _INT32)

    def at_most(self, most: int, *keys: str) -> None:
        for key in keys:
            self.need(key, f"above 0, and at most {most:,}", lambda v: 0 < v <= most)

    def share(self, *keys: str) -> None:
        for key in keys:
            self.need(key, "from 0 to below 1", lambda v: 0 <= v < 1)


def photometric(check: Checker, colours: str) -> None:
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


def warmup(check: Checker, name: str) -> None:
    epochs = check.values[f"{name}.epochs"]
    check.need(
        f"{name}.warmup_epochs", f"from 0 to the {epochs} epochs", lambda v: 0 <= v <= epochs
    )


def finetune(check: Checker) -> None:
    check.need(
        "finetune.images", "'all', a share from above '0%' to '100%', or the path of a list of "
        "names", lambda v: _is_share(v) if v.endswith("%") else v,
    )  # fmt: skip
    warmup(check, "finetune")
    check.at_most(1, "finetune.layer_decay")
    check.share("finetune.drop_path", "finetune.label_smoothing")
    check.not_negative("finetune.mixup_alpha", "finetune.cutmix_alpha")
    check.need("finetune.erasing", "from 0 to 1", lambda v: 0 <= v <= 1)


def _is_share(text: str) -> bool:
    try:
        return 0 < subsets.percent(text) <= 100
    except ValueError:
        return False


def evaluation(check: Checker) -> None:
    known = protocols.NAMES
    check.need("eval.protocols", f"some of {known}", lambda v: set(v) <= set(known))
    check.one_of("eval.pool", ("", *vit.POOLS, "cls+mean"))
    check.one_of("eval.dtype", ("", *DTYPES))
    check.one_of("eval.map", tuple(maps.NAMES))
    if check.values["eval.map"] == "umap" and not importlib.util.find_spec("umap"):
        raise UserError("config.eval.map='umap': install the extra, pip install -e '.[umap]'")
    check.one_of("eval.export", ("", *export.KINDS))
    check.positive("eval.memory_mb", "eval.knn.temperature", "eval.lowshot.splits")
    check.positive("eval.probe.epochs", "eval.probe.batch_size", "eval.cluster.runs")
    check.share("eval.probe.held_out")
    crop_scale(check, "eval.probe")
    for key in ("knn.k", "probe.base_lrs", "lowshot.weight_decays"):
        check.need(
            f"eval.{key}", "numbers above 0, at least one",
            lambda v: v and all(0 < x < math.inf for x in v),
        )  # fmt: skip
    check.need("eval.lowshot.images", "numbers above 0", lambda v: all(n > 0 for n in v))
    check.need("eval.lowshot.shares", "from above 0 to 1", lambda v: all(0 < s <= 1 for s in v))
    check.need(
        "eval.lowshot.lists", "paths of text files that are there",
        lambda v: all(isinstance(path, str) and os.path.isfile(path) for path in v),
    )  # fmt: skip
    check.one_of("eval.cluster.split", sources.SPLITS)
    check.not_negative(*(f"eval.cluster.{key}" for key in ("clusters", "pca", "minibatch")))
    parts = tuple(cluster.SUBSETS)
    check.need("eval.cluster.subsets", f"some of {parts}", lambda v: all(p in parts for p in v))


def crop_scale(check: Checker, section: str) -> None:
    check.need(
        f"{section}.crop_scale", "(low, high) with 0 < low <= high <= 1",
        lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1,
    )  # fmt: skip
