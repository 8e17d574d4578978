"""Features once, then every protocol that is asked for."""

import csv
import io
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from maect_jax import files, sharding
from maect_jax.data import bad_images, loader, sources
from maect_jax.errors import UserError
from maect_jax.evals import export, features, protocols
from maect_jax.evals.classifier import fold_batch_norm
from maect_jax.models import vit
from maect_jax.run import lineage
from maect_jax.stages import SAVED

PIXELS = "pixels"
AGAIN = "remove it, and the run's command measures again"
_CLASSIFIER = ("params", "batch_stats")  # where a saved stage keeps one
_RETRIEVAL, _CLUSTERS = "retrieval", "cluster"


def record(config: ConfigDict, source: sources.Source) -> loader.EvalRecord:
    """What makes the examples of an evaluation."""
    model = config.model
    return loader.EvalRecord(source, model.channels, model.image_size, config.data.short_side)


def extracted(
    config: ConfigDict,
    encode: features.Encode,
    source: sources.Source,
    broken: bad_images.BadImages,
    batch_size: int,
    mesh,
    title: str = "",
    first: int = 0,
):
    """What `features.extract` yields of a source from batch number `first` on; a progress bar with
    the title, if there is one."""
    example = record(config, source)
    rows = sharding.local_rows(batch_size, mesh)
    batches = loader.eval_batches(example, batch_size, config.data.workers, rows, first)
    bar = tqdm(
        batches,
        desc=title,
        initial=first,
        total=-(-len(source) // batch_size),
        disable=not title or jax.process_index() != 0 or not sys.stderr.isatty(),
        leave=False,
    )
    data = config.data
    yield from features.extract(encode, map(broken.collect, bar), data.mean, data.std, mesh)
    broken.check()


def _encoder(config: ConfigDict, saved: lineage.Saved | None, mesh):
    """How a row of the results encodes, by default pixels; what with, in plain JSON; and the
    classifier of its features, if there is one."""
    data, section, model = config.data, config.eval, config.model
    if saved is None:
        return features.pixels(data.mean, data.std), {"kind": "raw pixels"}, None
    parts = saved.read(mesh)
    params = SAVED[saved.stage].encoder_params(parts)
    pool, dtype = section.pool or model.pool, section.dtype or model.dtype
    module = vit.from_config(model).clone(dtype=dtype, final_norm=section.final_norm)
    norm = "after" if section.final_norm else "before"
    made_of = {
        "kind": f"{pool}, {norm} the final norm",
        "dtype": dtype,
        "weights": features.fingerprint(params),
        "model": model.to_dict(),
    }
    own = {k: parts[k]["classifier"] for k in _CLASSIFIER if "classifier" in parts.get(k, ())}
    classifier = None
    if own and pool == model.pool and section.final_norm:  # the features that it was trained on
        eps = saved.config[saved.stage].get("bn_eps", 0.0)
        classifier = fold_batch_norm(sharding.to_host(own), eps)
        made_of["classifier"] = features.fingerprint(dict(enumerate(classifier)))
    return features.encoder(module, params, pool), made_of, classifier


def folder_of(workdir: Path, name: str) -> Path:
    """Where the features of one row of the results are, a folder a split."""
    return workdir / "features" / name


def _row(config: ConfigDict, name, saved, splits, broken, workdir: Path, mesh):
    """A row with its features, and what they are made of."""
    encode, made_of, classifier = _encoder(config, saved, mesh)
    data = config.data.to_dict()
    shown = {key: data[key] for key in ("source", "path", "name", "mean", "std", "short_side")}
    found, settings = {}, {}
    for split, source in splits.items():
        settings[split] = made_of | {
            "data": shown | {"split": data[f"{split}_split"]},
            "size": list(config.model.image_size),
            "images": len(source),
            "labels": sources.labels_digest(source),
        }

        size, place = config.eval.batch_size, folder_of(workdir, name) / split

        def batches(first, source=source, split=split, size=size):
            title = f"{name} {split}"
            return extracted(config, encode, source, broken[split], size, mesh, title, first)

        found[split] = features.stored(place, settings[split], len(source), size, batches)
        # Also those that were found bad when an earlier call extracted them.
        absent = np.setdiff1d(np.arange(len(source)), found[split].index)
        broken[split].collect({"bad": absent})
        broken[split].check()
    return protocols.Row(config, encode, found, splits, broken, mesh, classifier), settings


def run(
    config: ConfigDict,
    splits: dict[str, sources.Source],
    broken: dict[str, bad_images.BadImages],
    rows: Mapping[str, lineage.Saved],
    workdir: Path,
    mesh,
) -> dict:
    """Evaluates the encoders of `rows`; writes `results.json` and `features/` into `workdir`.

    What is there already, made of the same features by the same settings, is not computed again.

    Args:
      config: a config with an `eval` section whose `model` describes the encoders.
      splits: the images, "train" and "val"; without labels "train" alone may do.
      broken: by split, counts those that cannot be read.
      rows: what is evaluated, by its name in the results.
      workdir: where the results go.
      mesh: the device mesh, which must be the current one.

    Returns:
      The content of `results.json`: `{name: {protocol: results}}`.
    """
    section, shown = config.eval, jax.process_index() == 0
    rows = ({PIXELS: None} if section.pixels else {}) | rows
    results = read_results(workdir)
    steps = len(rows) * (1 + len(section.protocols))
    with tqdm(total=steps, desc="eval", unit="step", disable=not shown) as bar:
        for name, saved in rows.items():
            bar.set_postfix_str(f"{name} features")
            start = time.monotonic()
            row, settings = _row(config, name, saved, splits, broken, workdir, mesh)
            entry = results[name] = _entry(results.get(name, {}), settings)
            entry["seconds"].setdefault("features", round(time.monotonic() - start, 1))
            bar.update()
            own = ("classifier",) if row.classifier else ()
            for task in (_RETRIEVAL, *own, *section.protocols):
                bar.set_postfix_str(f"{name} {task}")
                _evaluate(row, task, settings, entry, folder_of(workdir, name))
                if shown:
                    files.write_json(workdir / "results.json", results)
                bar.update(task in section.protocols)
            if shown and section.export:
                _export(row, entry, settings, workdir / "export", name)
                files.write_json(workdir / "results.json", results)
    if shown and "cluster" in section.protocols:
        source = splits[protocols.cluster_split(config, splits)]
        files.write_text(workdir / "clusters.csv", _table(workdir, list(rows), source))
    return results


def _entry(entry: dict, settings: dict) -> dict:
    """A row of the results, without what was measured on other features."""
    made_of = features.digest(settings)
    if entry.get("made_of") == made_of and {"seconds", "made_with"} <= entry.keys():
        return entry
    told = {key: settings["train"].get(key) for key in ("kind", "dtype")}
    kept = {key: entry[key] for key in ("finetune",) if key in entry}
    fresh = {"features": told["kind"], "dtype": told["dtype"], "made_of": made_of}
    return kept | fresh | {"seconds": {}, "made_with": {}}


def _evaluate(row: protocols.Row, task: str, settings: dict, entry: dict, folder: Path) -> None:
    """Notes the results of a protocol and what they were made with, unless they are there; or
    writes the nearest neighbours, and with k-means the clusters, into the features' folder."""
    made_with = features.digest({"features": settings} | protocols.settings(row.config, task))
    arrays = folder / f"{task}.npz" if task in (_RETRIEVAL, _CLUSTERS) else None
    there = arrays is None or arrays.exists() or "skipped" in entry.get(task, {})
    if entry["made_with"].get(task) == made_with and sharding.all_hosts(there):
        return
    start = time.monotonic()
    reason = protocols.skipped(task, row.features)
    found = {"skipped": reason} if reason else protocols.PROTOCOLS[task](row)
    if arrays:
        found, written = found
        # Before the results, which say that it is there.
        if jax.process_index() == 0:
            files.write_arrays(arrays, **written)
    if found:
        entry[task] = found
    entry["made_with"][task] = made_with
    entry["seconds"][task] = round(time.monotonic() - start, 1)


def _export(row: protocols.Row, entry: dict, settings: dict, folder: Path, name: str) -> None:
    kind = row.config.eval.export
    paths = {split: folder / f"{name}_{split}.{kind}" for split in row.features}
    made_with = features.digest({"features": settings, "kind": kind})
    if entry["made_with"].get("export") == made_with and all(p.exists() for p in paths.values()):
        return
    for split, path in paths.items():
        found, source = row.features[split], row.splits[split]
        export.write(path, found, [source.name(int(i)) for i in found.index])
    entry["made_with"]["export"] = made_with


def read_results(workdir: Path) -> dict[str, dict]:
    """The content of a run's `results.json`, by row; nothing where it was not evaluated.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / "results.json"
    results = files.read_json(path)
    if not all(isinstance(row, dict) for row in results.values()):
        raise UserError(f"{path}: holds something else than rows of results; {AGAIN}")
    return results


def read_retrieval(workdir: Path, name: str) -> dict[str, np.ndarray]:
    """Of a row of the results `index` `[Q]`, the numbers of some images (held-out, where there are
    such), and `neighbours` `[Q, k]`, those of the nearest training images; nothing where there is
    no such row."""
    path = folder_of(workdir, name) / f"{_RETRIEVAL}.npz"
    return files.read_saved_arrays(path, "index", "neighbours") if path.exists() else {}


def read_clusters(workdir: Path, name: str) -> dict[str, np.ndarray]:
    """Of a row of the results `index`, `labels`, `clusters` and `distance` `[N]` of the images that
    were clustered; nothing where they were not."""
    path = folder_of(workdir, name) / f"{_CLUSTERS}.npz"
    if not path.exists():
        return {}
    found = files.read_saved_arrays(path, "index", "labels", "clusters", "distance")
    if len({array.shape for array in found.values()}) > 1:
        raise UserError(f"{path}: is damaged (its arrays are of several lengths); remove it")
    return found


def _table(workdir: Path, names: list[str], source: sources.Source) -> str:
    """Each image with its label and its cluster in every row of the results, as CSV."""
    found = {name: arrays for name in names if (arrays := read_clusters(workdir, name))}
    labels, clusters = {}, {}
    for name, arrays in found.items():
        index, own, known = (arrays[key].tolist() for key in ("index", "clusters", "labels"))
        clusters[name] = dict(zip(index, own, strict=True))
        labels |= zip(index, known, strict=True)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", "label", *clusters])
    for record, label in sorted(labels.items()):
        called = sources.class_name(source.classes, label) if label >= 0 else ""
        own = (numbers.get(record, "") for numbers in clusters.values())
        table.writerow([source.name(record), called, *own])
    return text.getvalue()
