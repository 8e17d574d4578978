"""Checks a config, opens its images, claims the run's folder, and runs the stages in order."""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import jax
from etils import epy
from ml_collections import ConfigDict

from maect_jax import config as configs
from maect_jax import sharding, train
from maect_jax.config import Rule, Rules, between, not_negative, one_of, positive, some_of
from maect_jax.convert import hub, importing
from maect_jax.data import cache, labels, sources, values
from maect_jax.data.bad_images import BadImages
from maect_jax.data.base import AbsentError, Identity
from maect_jax.errors import RunFailedError, UserError
from maect_jax.evals import finetuned, monitor, runner, table
from maect_jax.models import vit
from maect_jax.run import checkpoints, folder, lineage, logger, snapshots, writers
from maect_jax.run.folder import Run
from maect_jax.stages import STAGES
from maect_jax.stages.base import Stage

with epy.lazy_imports():  # when they are first used: the report imports matplotlib
    from clu import parameter_overview

    from maect_jax.report import build

EVAL = "eval"  # in `config.stages`, beside the names of `STAGES`
# Training images, the shape that all have, and classes, of sets that need not be at hand.
_KNOWN = {
    "imagenet2012": (sources.IMAGENET_TRAIN, None, 1000),
    "cifar10": (50_000, (32, 32, 3), 10),
}
# Keys that may follow from the number of images (`Stage.by_images`).
_OF_IMAGES = ("epochs", "batch_size", "queue_size", "base_lr", "head_base_lr")
_MOST_STEPS = 2**31 - 1  # what an int32 counts
_IDENTITIES = 256  # characters that hold those of all splits
_LOGGER = logging.getLogger(__name__)


RULES: Rules = {
    "seed": between(0, 2**32 - 1),
    **dict.fromkeys(
        ("log_every", "checkpoint.every", "checkpoint.keep", "monitor.images"), positive
    ),
    "monitor.every": not_negative,
    "nan_limit": not_negative,
    "log_level": one_of(("info", "debug")),
    "loggers": some_of(writers.WRITERS),
    "nan_policy": one_of(logger.NAN_POLICIES),
    "profile": Rule(
        "(), or the first step and the last, from 1 on",
        lambda v, _: not v or (len(v) == 2 and all(type(s) is int for s in v) and 0 < v[0] <= v[1]),
    ),
    "checkpoint.best": one_of(("", *monitor.MEASURED)),
    "remat": one_of(vit.REMAT),
    "encoder_microbatches": positive,
}


def training_stages(config: ConfigDict) -> list[type[Stage]]:
    """The stages that a config trains, in order."""
    return [STAGES[name] for name in config.stages if name in STAGES]


def check_stages(config: ConfigDict) -> None:
    """Checks the list of stages, which the other checks follow. Raises `UserError` if it is empty,
    out of order, or names a stage that the config has no section for."""
    known = (*STAGES, EVAL)
    in_order = Rule(
        f"some of {known}, in that order and at least one",
        lambda v, _: v and [name for name in known if name in v] == list(v),
    )
    configs.check(config, "", {"stages": in_order})
    for name in config.stages:
        if name not in config:
            raise UserError(f"config.stages={config.stages!r}: this config has no section {name!r}")
    for before, stage in itertools.pairwise(training_stages(config)):
        if not set(stage.takes) <= set(before.hands_on):
            able = next(s.name for s in STAGES.values() if set(stage.takes) <= set(s.hands_on))
            raise UserError(f"config.stages={config.stages!r}: {stage.name} needs {able} before it")


def stages_to_show(config: ConfigDict) -> list[type[Stage]]:
    """The stages that a config trains, for what shows them without a run. Raises `UserError` if
    there are none, they are not allowed, or their model is that of a run."""
    check_stages(config)
    stages = training_stages(config)
    if not stages:
        raise UserError(f"config.stages={config.stages!r}: no training stage")
    if "model" not in config:
        raise UserError(
            f"config.init_from={config.init_from!r}: this config has no section 'model', which it "
            "takes from a run when it runs; name a config that has one"
        )
    return stages


def check(config: ConfigDict, devices: int) -> None:
    """Checks every value of a config that has a model, by the rules of its owner, for a number of
    devices that share a batch. Raises `UserError`."""
    configs.check(config, "", RULES)
    best, every, saved = config.checkpoint.best, config.monitor.every, config.checkpoint.every
    if best and (not every or every % saved):
        raise UserError(
            f"config.checkpoint.best={best!r}: is measured every config.monitor.every={every} "
            f"epochs, which must be a multiple of config.checkpoint.every={saved}, and not 0"
        )
    vit.check(config)
    sources.check(config)
    # What follows from the number of images is checked again when that is known.
    filled = config.copy_and_resolve_references()
    for stage in training_stages(config):
        _fill(filled, stage, sources.IMAGENET_TRAIN, devices=devices)
        stage.check(filled, devices)
    if EVAL in config.stages:
        runner.check(config, devices)


def open_images(
    config: ConfigDict, images: Mapping[str, sources.Source] | None = None
) -> dict[str, sources.Source]:
    """Opens the images, by split; some may be open already.

    Held-out images are opened where a stage needs them or the monitor can use them. Without labels,
    with those of a file, or to train alone, they need not be there. Sets what follows from the
    number of images (`set_by_images`).

    Raises:
      UserError: they are not there, are fewer than a batch, or have no labels where a stage cannot
        do without.
    """
    labels_needed = [stage for stage in training_stages(config) if stage.needs_labels]
    evaluated = labels_needed or EVAL in config.stages
    train_only = sources.SPLITS[:1]
    opened = partial(sources.splits, config.data, channels=config.model.channels)
    images = dict(images or opened(train_only))
    if (evaluated or config.monitor.every) and not labels.is_file(config.data.labels):
        try:
            images = opened(sources.SPLITS, opened=images)
        except AbsentError as error:
            _LOGGER.info("no held-out images: %s", error)
            if labels_needed and images["train"].labelled:
                raise
            if evaluated and images["train"].labelled:
                raise AbsentError(
                    f"{error}. They are not needed with config.data.labels=none, where folders are "
                    "no classes"
                ) from error
    for stage in labels_needed:
        _check_labelled(config, stage, images)
    set_by_images(config, images)
    check_enough(config, images)
    if EVAL in config.stages:
        runner.check_images(config, images)
    return images


def _check_labelled(config: ConfigDict, stage: type[Stage], images: Mapping) -> None:
    """Raises `UserError` where images that a stage sees have no labels. Says which are left out,
    and which are held out of those to train on."""
    own, train = stage.own_images(config, images), images["train"]
    if unlabelled := [split for split, source in own.items() if not source.labelled]:
        raise UserError(
            f"config.data.path={config.data.path!r}: the images of {' and '.join(unlabelled)} have "
            f"{own[unlabelled[0]].no_labels}, which {stage.name} needs; leave it out of "
            "config.stages"
        )
    if not train.labelled:
        _LOGGER.warning("%s leaves out the images without a label", stage.name)
    if isinstance(own["val"], labels.HeldOut):
        _LOGGER.warning(
            "no held-out image has a label: %s holds out %d of the training images, a tenth of "
            "each class, and trains on %d", stage.name, len(own["val"]), len(own["train"]),
        )  # fmt: skip


def _identities(config: ConfigDict, images: Mapping[str, sources.Source]) -> dict[str, Identity]:
    """What the images of each split and those of each training stage are."""
    found = dict(images)
    for stage in training_stages(config):
        found[stage.name] = stage.own_images(config, images)["train"]
    return {name: source.identity for name, source in found.items()}


def _share_identities(config: ConfigDict, images: Mapping[str, sources.Source]) -> None:
    """Gives all hosts the first one's times of the files: copies on their own disks have others.
    Raises `UserError` on all hosts where the images of one are not the first's."""
    with sharding.together():  # the files of a prepared set are looked at here
        own = {split: (x.identity.content, x.identity.times) for split, x in images.items()}
    # In one question, whatever splits a host has: all ask as often.
    first = json.loads(sharding.of_first_host(json.dumps(own).ljust(_IDENTITIES)))
    with sharding.together():
        for split in sorted(own.keys() | first.keys()):
            if split not in own or own[split][0] != first.get(split, [""])[0]:
                raise UserError(
                    f"config.data.path={config.data.path!r}: the {split} images of this host are "
                    "not those of the first host, by their names, sizes and content; all must see "
                    "the same"
                )
    for split, source in images.items():
        source.identity = source.identity._replace(times=first[split][1])


def _check_same_start(config: ConfigDict, origin: lineage.Saved | None) -> None:
    """Raises `UserError` on all hosts where one starts from other weights than the first: its file
    is another, or the hub had a newer commit when it asked."""
    if origin is None or jax.process_count() == 1:  # the weights are large
        return
    with sharding.together():
        own = hashlib.sha256(json.dumps(origin.lineage()).encode()).hexdigest()
    first = sharding.of_first_host(own)
    with sharding.together():
        if own != first:
            raise UserError(
                f"config.init_from={config.init_from!r}: the weights of this host ({origin}) are "
                "not those of the first host; all must have the same. Of the hub name the commit."
            )


def set_by_images(
    config: ConfigDict, images: Mapping[str, sources.Source], devices: int | None = None
) -> None:
    """Sets what is None and follows from the number of a stage's images (`Stage.by_images`), for so
    many devices that share a batch, by default all. Raises `UserError` if it does not fit what is
    given."""
    devices = devices or jax.device_count()
    for stage in training_stages(config):
        count = len(stage.own_images(config, images)["train"])
        if _fill(config, stage, count, devices=devices):
            stage.check(config, devices)


def _fill(config: ConfigDict, stage: type[Stage], count: int, *, devices: int) -> bool:
    """Sets what a stage's section leaves open for so many images. Returns whether it did."""
    section = config[stage.name]
    values = stage.by_images(section, count, unit=devices * config.encoder_microbatches)
    found = {key: x for key, x in values.items() if section.get(key, x) is None}
    section.update(found)
    return bool(found)


def check_enough(config: ConfigDict, images: Mapping[str, sources.Source]) -> None:
    """Raises `UserError` where a stage needs more training images, or has too many steps."""
    for stage in training_stages(config):
        section, where = config[stage.name], f"config.{stage.name}."
        size, epochs = section.batch_size, section.epochs
        count = len(stage.own_images(config, images)["train"])
        if size > count:
            raise UserError(
                f"{where}batch_size={size}: must be at most the {count} training images"
            )
        if (queue := section.get("queue_size", 0)) > count:
            _LOGGER.warning(
                "%squeue_size=%d: an epoch has %d images, so that the queue holds images more than "
                "once; a smaller one is better", where, queue, count,
            )  # fmt: skip
        most = _MOST_STEPS // stage.updates_per_epoch(config, count)
        if epochs > most:
            raise UserError(f"{where}epochs={epochs}: must be at most {most}, which are 2^31 steps")
    if EVAL in config.stages:
        runner.check_training_images(config, images["train"])


def images_to_plan(
    config: ConfigDict, devices: int | None = None
) -> tuple[dict[str, sources.Source], str]:
    """The training images, by split as `open_images` takes them, and where they are from; without
    any, blank ones, as many as a known set has (ImageNet-1k for a folder). Sets what follows from
    their number (`set_by_images`).

    Raises:
      UserError: they exist but do not fit, or the set is not known.
    """
    images, whose = _images_to_plan(config)
    set_by_images(config, images, devices)
    return images, whose


def _images_to_plan(config: ConfigDict) -> tuple[dict[str, sources.Source], str]:
    data, channels = config.data, config.model.channels
    known = _KNOWN.get(data.name if data.source == "tfds" else "imagenet2012")
    try:
        return sources.splits(data, ("train",), channels), data.path or data.source
    except UserError as error:
        prepared = data.source == "tfds" and not data.path.endswith(".npz")
        # For a bucket the source has said what is wrong.
        exists = data.source == "fashion_mnist" or "://" in data.path or os.path.exists(data.path)
        if data.source == "shards":
            exists |= not isinstance(error, AbsentError)
        if not known or (exists and not prepared) or labels.is_file(data.labels):
            raise
    why = "it is not prepared" if data.source == "tfds" else f"there is no {data.path!r}"
    name = data.name if data.source == "tfds" else "ImageNet-1k"
    return {"train": sources.Blank(known[0], channels, *known[1:])}, f"{name}'s, as {why}"


def _find_origin(config: ConfigDict, fetch: Callable[[str], hub.Fetched]) -> lineage.Saved | None:
    """Where the first stage starts, None for random weights; a config without a model gets that of
    the run. `fetch` gets what an id of the hub names. Raises `UserError` if there is nothing to
    start from."""
    first = config.stages[0]
    needs_run = first == EVAL or "model" not in config
    if not needs_run and (config.init_from == lineage.RANDOM or not STAGES[first].takes):
        return None
    origin = lineage.find(config.init_from, first, needs_run, fetch)
    if "model" not in config:
        with config.unlocked():
            config.model = origin.config.model
    takes_head = first in STAGES and set(STAGES[first].takes) > {"encoder"}
    if takes_head and config[first].queue_size is None:  # the head's queue is taken over
        config[first].queue_size = origin.config.get(origin.stage, {}).get("queue_size")
    return origin


def _set_short_side(config: ConfigDict, before: ConfigDict | None) -> None:
    """Sets `data.short_side`, where it is None, as the config has it that was run before; else as
    256 is for 224 pixels."""
    if config.data.short_side is None:
        side = before.get("data", {}).get("short_side") if before else None
        config.data.short_side = side or 8 * min(config.model.image_size) // 7


def prepare(config: ConfigDict, workdir: Path) -> lineage.Saved | None:
    """Checks a config against the machine and what it starts from, which it returns
    (`_find_origin`). Raises `UserError`."""
    check_stages(config)
    origin = _find_origin(config, _fetch(workdir))
    path = workdir / "config.json"
    before = configs.read(path) if path.exists() else None
    _set_short_side(config, before or (origin and origin.config))
    if before:  # which other devices or other rules would give other values
        for stage in training_stages(config):
            section, kept = config[stage.name], before.get(stage.name, {})
            left = [key for key in _OF_IMAGES if section.get(key, 0) is None]
            section.update({key: kept[key] for key in left if key in kept})
    check(config, jax.device_count())
    writers.check(config)
    if origin:
        lineage.check_fits(origin, config)
    return origin


def _fetch(workdir: Path) -> Callable[[str], hub.Fetched]:
    """How a run gets what an id of the hub names: one that resumes stays with what it started from,
    whatever is on the hub by now."""
    return partial(hub.fetch, noted=lineage.hub_ids(workdir))


def fetch(config: ConfigDict, workdir: Path) -> None:
    """Fetches what is on the hub, and indexes shards, for a host that has not joined the others.
    Joined hosts must not wait for that: after a minute JAX ends them. What fails here fails again
    in `run`."""
    with suppress(UserError):
        for path in importing.paths_of(config.init_from):
            if isinstance(path, str):
                _fetch(workdir)(path)
    for split in sources.SPLITS if config.data.source == "shards" else ():
        with suppress(UserError):
            sources.make(config.data, split, channels=3)


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs all stages; resumes where an earlier call was stopped.

    Args:
      config: a locked config from `config.load`.
      workdir: the run's folder, which may be new.

    Raises:
      UserError: bad input, before anything is written; or what `data.cache` keeps cannot be.
      PreemptedError: a signal has asked for the end.
      RunFailedError: it cannot go on; the text names the last good checkpoint.
    """
    with ExitStack() as stack:
        with sharding.together():
            origin = prepare(config, workdir)
            mesh = sharding.make_mesh(**config.mesh)
            images = open_images(config)
            values.check(images.values(), sources.decoding(config))
            if config.checkpoint.best and not monitor.is_possible(config, images):
                raise UserError(
                    f"config.checkpoint.best={config.checkpoint.best!r}: is measured on held-out "
                    "images, and all images must have labels"
                )
        _check_same_start(config, origin)
        _share_identities(config, images)
        with sharding.together():
            claimed = folder.opened(Run(config, workdir, mesh), origin, _identities(config, images))
            opened = stack.enter_context(claimed)
        with sharding.together():
            if not (workdir / "config.json").exists():
                raise UserError(
                    f"--workdir={workdir}: all hosts must see this folder, on storage that they "
                    "share"
                )
        with sharding.together():
            loggers = stack.enter_context(writers.opened(config, workdir))
            opened = dataclasses.replace(opened, writers=loggers)
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(jax.debug_nans(config.debug_nans))
        try:
            _run_stages(opened, origin, images)
        except (RunFailedError, OSError) as error:
            trained = [stage.name for stage in training_stages(config)]
            good = f". {checkpoints.last_good(workdir, trained)}" if trained else ""
            raise RunFailedError(f"{str(error).rstrip('.')}{good}") from error


def _kept(run: Run, images: Mapping[str, sources.Source]) -> Mapping[str, sources.Source]:
    """Images as `config.data.cache` keeps them, by split."""
    kept = {split: cache.reduced(run.config, source) for split, source in images.items()}
    for split, source in kept.items():
        if isinstance(source, cache.Reduced):
            source.keep(run.folder / "cache", split)
            if jax.process_index() == 0:
                print(f"{split}: {source.where}", flush=True)
    return kept


def _run_stages(run: Run, origin: lineage.Saved | None, images: Mapping) -> None:
    config, is_main = run.config, jax.process_index() == 0
    if is_main:
        data = config.data
        print(_title(config, images["train"], data.path or data.source, run.mesh))
        for stage in training_stages(config):
            print(f"{stage.name}: {_recipe(config[stage.name])}", flush=True)
    originals, images = images, _kept(run, images)
    held_out = images.get("val", images["train"])
    record = runner.record(config, held_out)
    examples = snapshots.Examples(record, held_out="val" in images, images=images)
    count_bad = partial(
        BadImages, decoding=sources.decoding(config), allowed=config.data.max_bad_fraction
    )
    bad_images = {split: count_bad(source) for split, source in images.items()}
    for name in config.stages:
        if name == EVAL:
            rows = origin.rows() if origin else {}
            results = runner.run(run, images, bad_images=bad_images, encoders=rows)
            run.writers.add_results(table.percentages(results))
            if is_main:
                print(f"\n{table.text(table.cells(results))}", flush=True)
            continue
        stage = STAGES[name]
        own = stage.own_images(config, images)
        counters = {
            split: bad_images[split] if source is images.get(split) else count_bad(source)
            for split, source in own.items()
        }
        measured = stage.learns_features and monitor.is_possible(config, images)
        with sharding.together():
            if stage.needs_labels and is_main:
                folder.note_classes(run, name, own["train"].classes)
        start: Callable[[], dict] = dict  # of nothing: random weights
        if origin:
            start = partial(lineage.start, origin, config.model, stage=stage, mesh=run.mesh)
        train.run(
            train.Training(
                run=run,
                stage=stage,
                images=own["train"],
                bad_images=counters["train"],
                start=start,
                examples=examples,
                monitor=monitor.Monitor(run, stage, images) if measured else None,
            )
        )
        origin = lineage.SavedStage(run.folder, name)
        if stage.needs_labels:
            result = finetuned.classify(run, images=own, bad_images=counters["val"])
            run.writers.add_results(table.percentages({name: {name: result}}))
            if is_main:
                print(finetuned.text(result), flush=True)
    if is_main:
        print()
        build.show(build.report(run.folder, originals))
        run.writers.add_pictures()


def dry_run(config: ConfigDict) -> None:
    """Prints what `run` would do. The images and the run to start from need not be there; nothing
    is downloaded."""
    check_stages(config)
    try:
        start = _find_origin(config, partial(hub.fetch, download=False)) or "random weights"
    except UserError as error:
        if "model" not in config:
            print(f"{config.name}: its model is not known: {error}")
            return
        start = f"nothing yet: {error}"
    _set_short_side(config, None if isinstance(start, str) else start.config)
    check(config, jax.device_count())
    writers.check(config)
    if not isinstance(start, str):
        lineage.check_fits(start, config)
    mesh = sharding.make_mesh(**config.mesh)
    images, whose = images_to_plan(config)
    if isinstance(images["train"], sources.Blank):
        check_enough(config, images)
    else:
        images = open_images(config, images)
        values.check(images.values(), sources.decoding(config))
    print(_title(config, images["train"], whose, mesh))
    if config.stages[0] == EVAL or STAGES[config.stages[0]].takes:
        print(f"from {start}")
    print("\n".join(_described(config, images)))
    if config.loggers:
        print(f"loggers: {', '.join(config.loggers)}")


def _title(config: ConfigDict, images: sources.Source, whose: str, mesh) -> str:
    """What runs, on which images and devices."""
    kind = mesh.devices.flat[0].device_kind
    return (
        f"{config.name}: {' -> '.join(config.stages)}; {len(images):,} training images ({whose})\n"
        f"on {mesh.size} {kind} ({sharding.mesh_text(mesh.shape)})"
    )


def _recipe(section: ConfigDict) -> str:
    """What of a stage's section may follow from the number of images."""
    return ", ".join(f"{key} {section[key]}" for key in _OF_IMAGES if key in section)


def _described(config: ConfigDict, images: Mapping[str, sources.Source]) -> Iterator[str]:
    """A paragraph for each stage: steps, images seen, parameters, memory, FLOPs."""
    for kind in training_stages(config):
        own, section = kind.own_images(config, images)["train"], config[kind.name]
        stage, batch = kind.for_images(config, own), section.batch_size
        crops, *smaller = (crops for crops, _ in kind.view_sets(config))
        count, views = crops.count, kind.views_of_image(config)
        local = "".join(" and {} of {} x {}".format(x.count, *x.size) for x in smaller)
        state = jax.eval_shape(stage.init, jax.random.key(0), {})
        memory = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
        steps, cost = stage.steps, stage.flops_per_step(batch)
        rows = {
            "steps": f"{steps:,} ({section.epochs} epochs of {len(own):,} images, "
            f"warm-up {stage.warmup:,})",
            "batch": f"{batch:,} images x {count} view{'s' * (count > 1)}{local}",
            "images seen": f"{steps * batch:,} ({steps * batch * views:,} views)",
            "settings": _recipe(section),
            "parameters trained": f"{parameter_overview.count_parameters(state.params):,}",
            "parameters frozen": f"{parameter_overview.count_parameters(state.frozen):,}",
            "memory of the state": f"{memory / 2**20:,.0f} MiB, before sharding",
            "FLOPs per step": f"{cost:.3g}",
            "FLOPs of the stage": f"{cost * steps:.3g}",
        }
        yield "\n".join([f"{kind.name}:", *(f"  {key:22}{text}" for key, text in rows.items())])
    if EVAL in config.stages:
        yield f"eval: {', '.join(config.eval.protocols)} on frozen features"
