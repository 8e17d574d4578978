"""Runs an evaluation: features once, then every protocol on them."""

import importlib.util
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from maect_jax import config as configs
from maect_jax import files, sharding
from maect_jax.config import Rules, one_of, positive, some_of
from maect_jax.data import augment, loader, sources
from maect_jax.data.bad_images import BadImages
from maect_jax.data.labels import is_file
from maect_jax.errors import UserError, first_of
from maect_jax.evals import AUTOMATIC, ON_REQUEST, PROTOCOLS, base, features, maps
from maect_jax.evals.classifier import linear_classifier
from maect_jax.models import vit
from maect_jax.run import lineage
from maect_jax.run.folder import Run
from maect_jax.stages import SAVED, STAGES

_LOGGER = logging.getLogger(__name__)
PIXELS = "pixels"
BLOCKS = "/blocks/"  # in the name of a row, before the number of a block
AGAIN = "remove it and run the same command to measure again"
RULES: Rules = {
    "batch_size": positive,
    "memory_mb": positive,
    "protocols": some_of(ON_REQUEST),
    "pool": one_of(("", *vit.POOLS, "cls+mean")),
    "dtype": one_of(("", *vit.DTYPES)),
    "map": one_of(maps.NAMES),
    "export": one_of(("", *features.EXPORTS)),
} | {f"{p.section}.{key}": rule for p in PROTOCOLS.values() for key, rule in p.rules.items()}
# Of `config.data`: where images are, how they are read, and what serves training alone.
_NOT_IN_EXAMPLES = (
    "source",
    "path",
    "name",
    "train_split",
    "val_split",
    "workers",
    "max_bad_fraction",
    "scaled_jpeg",
)
normalise = jax.jit(augment.normalise_pixels, static_argnums=(1, 2))

folder_of = base.folder_of
# The arrays that a row has in a run's folder (`base.Protocol.read_arrays`).
read_retrieval = PROTOCOLS["retrieval"].read_arrays
read_clusters = PROTOCOLS["cluster"].read_arrays
read_near = PROTOCOLS["near"].read_arrays


def check(config: ConfigDict, devices: int) -> None:
    """Checks the `eval` section of a config for a number of devices. Raises `UserError`."""
    configs.check(config, "eval", RULES | {"blocks": vit.blocks_rule(config.model)})
    vit.check_pool(config.model, "config.eval.pool", config.eval.pool)
    if config.eval.blocks and not any(p.of_blocks for p in _requested(config)):
        able = " or ".join(name for name, p in PROTOCOLS.items() if p.of_blocks)
        raise UserError(
            f"config.eval.protocols={config.eval.protocols}: must have {able}, which measure "
            f"config.eval.blocks={config.eval.blocks}"
        )
    sharding.check_batch("config.eval.batch_size", config.eval.batch_size, devices)
    if config.eval.map == "umap" and not importlib.util.find_spec("umap"):
        raise UserError("config.eval.map='umap': needs the extra: pip install -e '.[umap]'")


def _requested(config: ConfigDict) -> list[base.Protocol]:
    return [protocol for name in config.eval.protocols for protocol in ON_REQUEST[name]]


def check_training_images(config: ConfigDict, images: sources.Source) -> None:
    """Raises `UserError` if there are too few for a protocol's settings."""
    for protocol in _requested(config):
        protocol.check_training_images(config, images)


def check_images(config: ConfigDict, images: Mapping[str, sources.Source]) -> None:
    """Raises `UserError` if a protocol's settings do not fit the images, by split."""
    for protocol in _requested(config):
        protocol.check_images(config, images)


def record(config: ConfigDict, images: sources.Source) -> loader.EvalRecord:
    """What makes the examples of an evaluation."""
    size, short_side = config.model.image_size, config.data.short_side
    return loader.EvalRecord(images, sources.decoding(config), size, short_side)


@dataclass(frozen=True)
class Extraction:
    """How the features of some images are computed."""

    run: Run  # config and device mesh, which must be the current one
    images: sources.Source
    bad_images: BadImages  # counts those that cannot be read
    batch_size: int  # images, of all devices together

    def batches(self, encode: features.Encode, first: int = 0, title: str = "") -> features.Batches:
        """Encodes all images, in order, from batch number `first` on; all processes call it.

        A `title` gives a progress bar. Yields, on every process, features fp32 `[B, D]`, labels
        int32 `[B]`, and `valid` bool `[B]`, false for padding and images that cannot be read.
        """
        config, mesh, size = self.run.config, self.run.mesh, self.batch_size
        data, make, pending = config.data, record(config, self.images), None
        rows = sharding.local_rows(size, mesh)
        batches = loader.eval_batches(make, size, data.workers, rows=rows, first=first)
        disable = not title or jax.process_index() != 0 or not sys.stderr.isatty()
        total = -(-len(self.images) // size)
        bar = dict(desc=title, initial=first, total=total, disable=disable, leave=False)
        for local in tqdm(batches, **bar):
            batch = sharding.put_batch(self.bad_images.collect(local), mesh)
            images = normalise(batch["image"], data.mean, data.std)
            encoded = encode(images), batch["label"], batch["valid"]
            if pending is not None:  # one batch late, so that the device never waits
                yield sharding.to_host(pending)
            pending = encoded
        if pending is not None:
            yield sharding.to_host(pending)
        self.bad_images.check()


def _encoder(config: ConfigDict, saved: lineage.Saved | None, mesh):
    """How the features of a row are extracted, with those behind blocks before them; its `encode`
    and `classifier`; and what the features are made of, plain JSON."""
    data, section, model = config.data, config.eval, config.model
    if saved is None:
        encode = features.pixels(data.mean, data.std)
        return encode, {"encode": encode}, {"kind": "raw pixels"}
    parts = saved.read(mesh)
    params = SAVED[saved.stage].encoder_params(parts)
    pool, dtype = section.pool or model.pool, section.dtype or model.dtype
    module = vit.from_config(model).clone(dtype=dtype, final_norm=section.final_norm)
    kind = f"{pool}, {'after' if section.final_norm else 'before'} the final norm"
    made_of = {"kind": kind, "dtype": dtype, "weights": features.fingerprint(params)}
    made_of["model"] = model.to_dict()
    classifier = None
    if pool == model.pool and section.final_norm:  # the features it was trained on
        classifier = linear_classifier(saved, parts)
    if classifier:
        made_of["classifier"] = features.fingerprint(dict(enumerate(classifier)))
    encoder = {"encode": features.encoder(module, params, pool), "classifier": classifier}
    return features.encoder(module, params, pool, section.blocks), encoder, made_of


def encoder_of(
    config: ConfigDict, row: str, saved: lineage.Saved | None, mesh
) -> tuple[features.Encode, dict]:
    """How the features of a row of the results are computed, which may be those behind a block, and
    what those of any images are made of, plain JSON (`features.saved_made_of`)."""
    block = row.partition(BLOCKS)[2]
    config = config.copy_and_resolve_references()
    config.eval.blocks = (int(block),) if block else ()
    extract, _, made_of = _encoder(config, saved, mesh)
    made_of = features.as_json(made_of | _described(config))
    if not block:
        return extract, made_of

    def encode(images):
        x = extract(images)
        return x[:, : x.shape[1] // 2]  # the others are those of the whole encoder

    return encode, _of_block(config, int(block), made_of)


def _described(config: ConfigDict) -> dict:
    """What the examples of any images are made of (`record`), plain JSON."""
    data = {key: x for key, x in config.data.to_dict().items() if key not in _NOT_IN_EXAMPLES}
    if not config.data.cache:  # runs of earlier versions have no such key
        del data["cache"]
    if is_file(config.data.labels):  # what it says is in `labels`
        del data["labels"]
    return {"data": data, "size": list(config.model.image_size)}


def described(config: ConfigDict, images: sources.Source) -> dict:
    """What the examples of an evaluation are made of, plain JSON."""
    of_images = {
        "images": images.identity._asdict(),
        "labels": sources.labels_digest(images),
    }
    return _described(config) | of_images


def is_outdated(run: Path, row: str, images: Mapping[str, sources.Source]) -> bool:
    """Whether the features of a row are of other images than these, by split. A warning says so,
    and also where only the times of the files differ."""
    for split, source in images.items():
        saved = features.saved_made_of(folder_of(run, row) / split)
        if not (difference := source.identity.difference(saved.get("images"))):
            continue
        if jax.process_index() == 0:
            measured = "stays, as it was measured on these"
            if difference.content:
                measured = "is left out, as it was measured on other"
            _LOGGER.warning(
                "%s: row %s %s %s images (%s)", run, row, measured, split, difference.text
            )
        if difference.content:
            return True
    return False


def _remove_outdated(rows: Sequence[base.Row]) -> None:
    """Removes the arrays of protocols that are of other features than those of the rows now, and
    says what has changed; the features themselves are written anew."""
    told: dict[str, list[str]] = {}
    for row in rows:
        folder = folder_of(row.run.folder, row.name)
        for split, made_of in row.made_of.items():
            before, now = features.saved_made_of(folder / split), features.as_json(made_of)
            changed = [key for key in now if before and before.get(key) != now[key]]
            if not changed or jax.process_index() != 0:
                continue
            if difference := row.images[split].identity.difference(before.get("images")):
                changed[changed.index("images")] += f" ({difference.text})"
            told.setdefault(", ".join(changed), []).append(str(folder / split))
            for path in folder.glob("*.npz"):
                path.unlink()
    for keys, folders in told.items():
        _LOGGER.warning("%s: computed anew; changed: %s", first_of(folders), keys)


def _with_features(row: base.Row) -> base.Row:
    """A row with its features, which have been computed."""
    folder, found = folder_of(row.run.folder, row.name), {}
    for split, source in row.images.items():
        found[split] = features.load(folder / split)
        # Those that an earlier call could not read count as well.
        bad = row.bad_images[split]
        bad.collect({"bad": np.setdiff1d(np.arange(len(source)), found[split].records)})
        bad.check()
    return replace(row, features=found)


def _row(run: Run, name: str, saved: lineage.Saved | None, images, bad_images) -> base.Row:
    """A row of the results with its features. Those behind blocks come from the same pass."""
    extract, encoder, made_of = _encoder(run.config, saved, run.mesh)
    row = base.Row(run, name, images=images, bad_images=bad_images, **encoder)
    for split, source in images.items():
        row.made_of[split] = made_of | described(run.config, source)
    inner = [_block_row(row, block) for block in run.config.eval.blocks if saved]
    _remove_outdated([row, *inner])
    for split, source in images.items():
        size = run.config.eval.batch_size
        extraction = Extraction(run, source, bad_images[split], batch_size=size)
        features.store(
            {folder_of(run.folder, x.name) / split: x.made_of[split] for x in (*inner, row)},
            images=len(source),
            batch_size=size,
            batches=partial(extraction.batches, extract, title=f"{name} {split}"),
        )
    return _with_features(row)


def _block_row(row: base.Row, block: int) -> base.Row:
    """The features behind a block of a row's encoder, as a row of its own."""
    made_of = {split: _of_block(row.config, block, made) for split, made in row.made_of.items()}
    return replace(row, name=f"{row.name}{BLOCKS}{block}", made_of=made_of, features={})


def _of_block(config: ConfigDict, block: int, made_of: Mapping) -> dict:
    """What the features behind a block are made of, by what those of the whole encoder are."""
    pool = (config.eval.pool or config.model.pool).replace("fc_norm", "mean")
    kind = f"{pool}, after block {block}, without the final norm"
    return {key: x for key, x in made_of.items() if key != "classifier"} | {"kind": kind}


def _drop_outdated_blocks(row: base.Row, entry: dict) -> None:
    """Removes what was measured behind blocks on other features than those of the row now, or with
    other settings: all that stays can be compared."""
    for block, found in list(entry.get("blocks", {}).items()):
        inner = _block_row(row, int(block))
        for name, made_with in list(found["made_with"].items()):
            if made_with != _made_with(inner, PROTOCOLS[name]):
                del found[name], found["made_with"][name]
        if not found["made_with"]:
            del entry["blocks"][block]
    if not entry.get("blocks"):
        entry.pop("blocks", None)


def run(
    run: Run,
    images: Mapping[str, sources.Source],
    bad_images: Mapping[str, BadImages],
    encoders: Mapping[str, lineage.Saved],
) -> dict:
    """Evaluates encoders; writes `results.json` and `features/` into the run's folder.

    What is there already, made of the same features with the same settings, is not computed again.

    Args:
      run: its config has an `eval` section, and a `model` that describes the encoders.
      images: by split, "train" and "val"; images without labels may be "train" only.
      bad_images: by split, counts those that cannot be read.
      encoders: by the name of their row in the results.

    Returns:
      The content of `results.json`: `{row: {protocol: metrics}}`, in which a row may have
      `{"blocks": {block: {protocol: metrics}}}` as well.
    """
    section, is_writer = run.config.eval, jax.process_index() == 0
    measured: dict[str, lineage.Saved | None] = {PIXELS: None} if section.pixels else {}
    measured |= encoders
    requested, main = _requested(run.config), next(iter(ordered(encoders)), "")
    path, results = run.folder / "results.json", read_results(run.folder)
    for name in [name for name in results if name not in measured]:
        if is_outdated(run.folder, name, images):
            del results[name]
    steps = len(measured) * (1 + len(requested)) + len(encoders) * len(section.blocks)
    with tqdm(total=steps, desc="eval", unit="step", disable=not is_writer) as bar:
        for name, saved in measured.items():
            bar.set_postfix_str(f"{name} features")
            start = time.monotonic()
            row = _row(run, name, saved, images=images, bad_images=bad_images)
            entry = results[name] = _entry(results.get(name, {}), row.made_of)
            entry["seconds"].setdefault("features", round(time.monotonic() - start, 1))
            _drop_outdated_blocks(row, entry)
            bar.update()
            automatic = [p for p in AUTOMATIC if row.classifier or not p.needs_classifier]
            for protocol in (*automatic, *requested):
                bar.set_postfix_str(f"{name} {protocol.name}")
                if name == main or not protocol.of_main_row:
                    _evaluate(row, protocol, entry)
                if is_writer:
                    files.write_json(path, results)
                bar.update(protocol in requested)
            of_blocks = [p for p in requested if p.of_blocks and not p.skip_reason(row)]
            for block in section.blocks if saved and of_blocks else ():
                inner = replace(_with_features(_block_row(row, block)), whole=entry)
                blocks = entry.setdefault("blocks", {})
                found = blocks[str(block)] = _entry(blocks.get(str(block), {}), inner.made_of)
                for protocol in of_blocks:
                    bar.set_postfix_str(f"{inner.name} {protocol.name}")
                    _evaluate(inner, protocol, found)
                    if is_writer:
                        files.write_json(path, results)
                bar.update()
            if is_writer and section.export:
                _export(row, entry)
                files.write_json(path, results)
    for protocol in requested if is_writer else ():
        protocol.summarise(run, [main] if protocol.of_main_row else list(measured), images)
    return results


def _entry(entry: dict, made_of: dict) -> dict:
    """The entry of a row, without what protocols measured on other features."""
    digest, kind = features.digest(made_of), made_of["train"]
    if entry.get("made_of") == digest and {"seconds", "made_with"} <= entry.keys():
        return entry
    fresh = {"features": kind["kind"], "dtype": kind.get("dtype"), "made_of": digest}
    fresh |= {"seconds": {}, "made_with": {}}
    return {key: entry[key] for key in entry if key not in PROTOCOLS | fresh} | fresh


def _made_with(row: base.Row, protocol: base.Protocol) -> str:
    """A digest of all that a protocol's results depend on."""
    return features.digest({"features": row.made_of} | protocol.settings(row.config))


def _evaluate(row: base.Row, protocol: base.Protocol, entry: dict) -> None:
    """Notes a protocol's metrics and what they were made with, and writes its arrays, unless they
    are there already."""
    name, path = protocol.name, folder_of(row.run.folder, row.name) / f"{protocol.name}.npz"
    made_with = _made_with(row, protocol)
    written = not protocol.arrays or path.exists() or "skipped" in entry.get(name, {})
    if entry["made_with"].get(name) == made_with and sharding.all_hosts(written):
        return
    start = time.monotonic()
    reason = protocol.skip_reason(row)
    if reason and jax.process_index() == 0:
        _LOGGER.warning("%s: %s is skipped: %s", row.name, name, reason)
    result = base.Result({"skipped": reason}) if reason else protocol.run(row)
    if result.arrays and jax.process_index() == 0:
        files.write_arrays(path, **result.arrays)  # before the results, which say that it is there
    if result.metrics:
        entry[name] = result.metrics
    entry["made_with"][name] = made_with
    entry["seconds"][name] = round(time.monotonic() - start, 1)


def _export(row: base.Row, entry: dict) -> None:
    kind, folder = row.config.eval.export, row.run.folder / "export"
    paths = {split: folder / f"{row.name}_{split}.{kind}" for split in row.features}
    # Names begin with the folder of the images.
    first = {split: source.name(0) for split, source in row.images.items()}
    made_with = features.digest({"features": row.made_of, "kind": kind, "first": first})
    if entry["made_with"].get("export") == made_with and all(p.exists() for p in paths.values()):
        return
    for split, path in paths.items():
        part, source = row.features[split], row.images[split]
        features.export(path, part, [source.name(int(i)) for i in part.records])
    entry["made_with"]["export"] = made_with


def ordered(results: Mapping[str, object]) -> list[str]:
    """The rows of results, by what they say of a run: stages that train without labels, from the
    last one on, then the others, raw pixels last."""
    stages = [name for name, stage in STAGES.items() if not stage.needs_labels][::-1]
    rows = [row for row in dict.fromkeys([*stages, *results]) if row in results]
    return sorted(rows, key=lambda row: row == PIXELS)


def read_results(workdir: Path) -> dict[str, dict]:
    """Reads a run's `results.json`; empty if there is none. Raises `UserError` on damage."""
    path = workdir / "results.json"
    results = files.read_json(path)
    if not all(map(_is_entry, results.values())):
        raise UserError(f"{path}: does not hold rows of results; {AGAIN}")
    return results


def _is_entry(value: object) -> bool:
    """Whether a value may be what results say of a row, or of one of its blocks."""
    if not isinstance(value, dict):
        return False
    cluster, blocks = (value.get(key, {}) for key in ("cluster", "blocks"))
    is_row = isinstance(cluster, dict) and isinstance(blocks, dict)
    return is_row and all(map(_is_entry, blocks.values()))
