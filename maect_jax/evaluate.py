"""Features once, then every protocol: k-NN, linear probe, k-means."""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from maect_jax import checkpoint, files, sharding
from maect_jax.data import damage, loader, sources
from maect_jax.evals import cluster, features, knn, probe
from maect_jax.stages import build


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


def _features(
    config: ConfigDict, source: sources.Source, broken: damage.Damage, run, mesh, title: str
) -> features.Features:
    example, batch_size = record(config, source), config.eval.batch_size
    rows = sharding.local_rows(batch_size, mesh)
    batches = loader.eval_batches(example, batch_size, config.data.workers, rows)
    bar = tqdm(
        batches,
        desc=title,
        total=-(-len(source) // batch_size),
        disable=jax.process_index() != 0 or not sys.stderr.isatty(),
        leave=False,
    )
    found = features.extract(run, map(broken.take, bar), mesh)
    broken.check()
    return found


def protocols(
    config: ConfigDict, train: features.Features, test: features.Features, kind: str
) -> tuple[dict, np.ndarray]:
    """Runs every protocol of the `eval` section on train and test features.

    `kind` says in the results what the features are. Returns the results, and the clusters of the
    test features (`cluster.cluster`).
    """
    section, data = config.eval, (train.x, train.labels, test.x, test.labels)
    neighbours = knn.knn(*data, section.knn.k, section.knn.temperature, section.knn.standardise)
    found, clusters = cluster.cluster(
        test.x, test.labels, **section.cluster.to_dict(), seed=config.seed
    )
    results = {
        "features": kind,
        "knn": [{**entry, "features": kind} for entry in neighbours],
        "probe": probe.linear_probe(*data, **section.probe.to_dict(), seed=config.seed),
        "cluster": {"images": "val", **found},
    }
    return results, clusters


def run(
    config: ConfigDict,
    splits: dict[str, sources.Source],
    broken: dict[str, damage.Damage],
    run_folder: Path,
    workdir: Path,
    mesh,
) -> dict:
    """Evaluates the encoders of `run_folder`; writes `results.json` and `features/` into `workdir`.

    `features/<name>.npz` holds an encoder's held-out features: `x` fp32 `[N, D]`, `labels`,
    `clusters` and `index`, the record numbers, int32 `[N]`. What `results.json` already
    holds is not computed again.

    Args:
      config: a config with an `eval` section whose `model` describes the encoders.
      splits: the images, "train" and "val".
      broken: by split, counts those that cannot be read.
      run_folder: the run whose checkpoints are evaluated.
      workdir: where the results go.
      mesh: the device mesh, which must be the current one.

    Returns:
      The content of `results.json`: `{name: {"knn": [...], "probe": {...}, "cluster": {...}}}`.
    """
    path = workdir / "results.json"
    results = files.read_json(path)
    folders = encoders(run_folder)
    names = (["pixels"] if config.eval.pixels else []) + list(folders)
    left = [name for name in names if name not in results]
    bar = tqdm(left, desc="eval", unit="row", disable=jax.process_index() != 0 or not left)
    for name in bar:
        bar.set_postfix_str(name)
        start = time.monotonic()
        if name == "pixels":
            encode, kind = features.flatten_pixels, "raw pixels"
        else:
            kind = f"{config.model.pool}, after the final norm"
            parts = checkpoint.read_parts(folders[name], build.SAVED_PARTS[name], mesh)
            encode = features.encode(
                build.encoder(config.model),
                build.evaluated_encoder(name, parts),
                config.model.pool,
                config.data.mean,
                config.data.std,
            )
        train, test = (
            _features(config, splits[s], broken[s], encode, mesh, f"{name} {s}")
            for s in sources.SPLITS
        )
        results[name], clusters = protocols(config, train, test, kind)
        results[name]["seconds"] = round(time.monotonic() - start, 1)
        if jax.process_index() == 0:
            if name != "pixels":
                arrays = dict(test._asdict(), clusters=clusters)
                files.write_arrays(features_file(workdir, name), **arrays)
            files.write_json(path, results)
    return results


def features_file(run: Path, name: str) -> Path:
    """Where the held-out features of one row of the results are."""
    return run / "features" / f"{name}.npz"
