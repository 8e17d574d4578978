"""Features once, then every protocol that is asked for."""

import csv
import io
import sys
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from maect_jax import checkpoint, files, sharding
from maect_jax.data import damage, loader, sources
from maect_jax.evals import export, features, protocols
from maect_jax.stages import build

PIXELS = "pixels"


def encoders(run: Path) -> dict[str, Path]:
    """The stages of a run whose encoder can be evaluated, and the folders of their checkpoints.

    A head's encoder is the MAE's; it counts only where the run has no MAE of its own.
    """
    found = checkpoint.trained_stages(run, build.TRAINING)
    own = [name for name in found if name != "head" or "mae" not in found]
    return {name: checkpoint.stage_folder(run, name) for name in own}


def record(config: ConfigDict, source: sources.Source) -> loader.EvalRecord:
    """What makes the examples of an evaluation."""
    model = config.model
    return loader.EvalRecord(source, model.channels, model.image_size, config.data.short_side)


def extracted(
    config: ConfigDict,
    encode: features.Encode,
    source: sources.Source,
    broken: damage.Damage,
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
    yield from features.extract(encode, map(broken.take, bar), data.mean, data.std, mesh)
    broken.check()


def _encoder(config: ConfigDict, name: str, folder: Path | None, mesh):
    """How a row of the results encodes, and what it encodes with, in plain JSON."""
    data, section, model = config.data, config.eval, config.model
    if name == PIXELS:
        return features.pixels(data.mean, data.std), {"kind": "raw pixels"}
    parts = checkpoint.read_parts(folder, build.SAVED_PARTS[name], mesh)
    params = build.evaluated_encoder(name, parts)
    pool, dtype = section.pool or model.pool, section.dtype or model.dtype
    module = build.encoder(model).clone(dtype=dtype, final_norm=section.final_norm)
    norm = "after" if section.final_norm else "before"
    made_of = {
        "kind": f"{pool}, {norm} the final norm",
        "dtype": dtype,
        "weights": features.fingerprint(params),
        "model": model.to_dict(),
    }
    return features.encoder(module, params, pool), made_of


def folder_of(workdir: Path, name: str) -> Path:
    """Where the features of one row of the results are, a folder a split."""
    return workdir / "features" / name


def _row(config: ConfigDict, name, folder, splits, broken, workdir: Path, mesh):
    """A row with its features, and what they are made of."""
    encode, made_of = _encoder(config, name, folder, mesh)
    data = config.data.to_dict()
    shown = {key: data[key] for key in ("source", "path", "name", "mean", "std", "short_side")}
    found, settings = {}, {}
    for split, source in splits.items():
        settings[split] = made_of | {
            "data": shown | {"split": data[f"{split}_split"]},
            "size": list(config.model.image_size),
            "images": len(source),
            "classes": len(source.classes),
        }

        size, place = config.eval.batch_size, folder_of(workdir, name) / split

        def batches(first, source=source, split=split, size=size):
            title = f"{name} {split}"
            return extracted(config, encode, source, broken[split], size, mesh, title, first)

        found[split] = features.stored(place, settings[split], len(source), size, batches)
    return protocols.Row(config, encode, found, splits, broken, mesh), settings


def run(
    config: ConfigDict,
    splits: dict[str, sources.Source],
    broken: dict[str, damage.Damage],
    run_folder: Path,
    workdir: Path,
    mesh,
) -> dict:
    """Evaluates the encoders of `run_folder`; writes `results.json` and `features/` into `workdir`.

    What is there already, made of the same features by the same settings, is not computed again.

    Args:
      config: a config with an `eval` section whose `model` describes the encoders.
      splits: the images, "train" and "val"; without labels "train" alone may do.
      broken: by split, counts those that cannot be read.
      run_folder: the run whose checkpoints are evaluated.
      workdir: where the results go.
      mesh: the device mesh, which must be the current one.

    Returns:
      The content of `results.json`: `{name: {protocol: results}}`.
    """
    section, shown = config.eval, jax.process_index() == 0
    folders = ({PIXELS: None} if section.pixels else {}) | encoders(run_folder)
    results = files.read_json(workdir / "results.json")
    steps = len(folders) * (1 + len(section.protocols))
    bar = tqdm(total=steps, desc="eval", unit="step", disable=not shown)
    for name, folder in folders.items():
        bar.set_postfix_str(f"{name} features")
        start = time.monotonic()
        row, settings = _row(config, name, folder, splits, broken, workdir, mesh)
        entry = results.setdefault(name, {})
        kind = settings["train"]["kind"]
        if entry.get("features") != kind or "seconds" not in entry:
            entry |= {"features": kind, "seconds": {}, "made_with": {}}
        entry["seconds"].setdefault("features", round(time.monotonic() - start, 1))
        bar.update()
        _retrieve(row, settings, workdir / "features" / name, entry)
        for protocol in section.protocols:
            bar.set_postfix_str(f"{name} {protocol}")
            _evaluate(row, protocol, settings, entry)
            if shown:
                files.write_json(workdir / "results.json", results)
                if row.clusters:
                    files.write_arrays(_clusters_file(workdir, name), **row.clusters)
                    row.clusters = {}
            bar.update()
        if shown and section.export:
            for split, found in row.features.items():
                names = [splits[split].name(int(i)) for i in found.index]
                path = workdir / "export" / f"{name}_{split}.{section.export}"
                export.write(path, found, names)
    bar.close()
    if shown and "cluster" in section.protocols:
        source = splits[protocols.cluster_split(config, splits)]
        files.write_text(workdir / "clusters.csv", _table(workdir, list(folders), source))
    return results


def _evaluate(row: protocols.Row, protocol: str, settings: dict, entry: dict) -> None:
    """Notes the results of a protocol and what they were made with, unless they are there."""
    function, keys = protocols.PROTOCOLS[protocol]
    own = row.config.eval[keys].to_dict()
    made_with = features.digest({"features": settings, "seed": row.config.seed, keys: own})
    if entry["made_with"].get(protocol) == made_with:
        return
    start = time.monotonic()
    reason = protocols.skipped(protocol, row.features)
    entry[protocol] = {"skipped": reason} if reason else function(row)
    entry["made_with"][protocol] = made_with
    entry["seconds"][protocol] = round(time.monotonic() - start, 1)


def _retrieve(row: protocols.Row, settings: dict, folder: Path, entry: dict) -> None:
    """Writes down the nearest training images of some images, for the page."""
    made_with = features.digest(settings)
    if entry["made_with"].get("retrieval") == made_with:
        return
    found = protocols.retrieved(row)
    if jax.process_index() == 0:
        files.write_arrays(folder / "retrieval.npz", **found)
    entry["made_with"]["retrieval"] = made_with


def read_retrieval(workdir: Path, name: str) -> dict[str, np.ndarray]:
    """Of a row of the results `index` `[Q]`, the numbers of some images (held-out, where there are
    such), and `neighbours` `[Q, k]`, those of the nearest training images; nothing where there is
    no such row."""
    path = folder_of(workdir, name) / "retrieval.npz"
    return files.read_arrays(path) if path.exists() else {}


def _clusters_file(workdir: Path, name: str) -> Path:
    return folder_of(workdir, name) / "clusters.npz"


def read_clusters(workdir: Path, name: str) -> dict[str, np.ndarray]:
    """Of a row of the results `index`, `labels`, `clusters` and `distance` `[N]` of the images that
    were clustered; nothing where they were not."""
    path = _clusters_file(workdir, name)
    return files.read_arrays(path) if path.exists() else {}


def _table(workdir: Path, names: list[str], source: sources.Source) -> str:
    """Each image with its label and its cluster in every row of the results, as CSV."""
    found = {name: read_clusters(workdir, name) for name in names}
    labels, clusters = {}, {}
    for name, arrays in found.items():
        index, own, known = (arrays[key].tolist() for key in ("index", "clusters", "labels"))
        clusters[name] = dict(zip(index, own, strict=True))
        labels |= zip(index, known, strict=True)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", "label", *names])
    for record, label in sorted(labels.items()):
        called = sources.class_name(source.classes, label) if label >= 0 else ""
        own = (numbers.get(record, "") for numbers in clusters.values())
        table.writerow([source.name(record), called, *own])
    return text.getvalue()
