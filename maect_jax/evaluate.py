"""Features once, then every protocol: k-NN, linear probe, k-means."""

import json
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from maect_jax import checkpoint
from maect_jax.data import loader, sources
from maect_jax.evals import cluster, features, knn, probe
from maect_jax.stages import build


def encoders(run: Path) -> dict[str, Path]:
    """The stages of a run whose encoder can be evaluated, and the folders of their checkpoints.

    A head's encoder is the MAE's; it counts only where the run has no MAE of its own.
    """
    found = checkpoint.trained_stages(run, build.TRAINING)
    own = [name for name in found if name != "head" or "mae" not in found]
    return {name: checkpoint.stage_folder(run, name) for name in own}


def _features(
    config: ConfigDict, source: sources.Source, run, mesh, title: str
) -> features.Features:
    example = loader.EvalRecord(source, config.model.image_size, config.data.short_side)
    batch_size = config.eval.batch_size
    batches = loader.eval_batches(
        example, batch_size, config.data.workers, jax.process_index(), jax.process_count()
    )
    bar = tqdm(
        batches,
        desc=f"eval {title}",
        total=-(-len(source) // batch_size),
        disable=jax.process_index() != 0 or not sys.stderr.isatty(),
        leave=False,
    )
    return features.extract(run, bar, mesh)


def protocols(
    config: ConfigDict, train: features.Features, test: features.Features, kind: str
) -> dict:
    """Runs every protocol of the `eval` section on train and test features.

    `kind` says in the results what the features are.
    """
    section, data = config.eval, (train.x, train.labels, test.x, test.labels)
    neighbours = knn.knn(*data, section.knn.k, section.knn.temperature, section.knn.standardise)
    clusters = cluster.cluster(test.x, test.labels, **section.cluster.to_dict(), seed=config.seed)
    return {
        "features": kind,
        "knn": [{**entry, "features": kind} for entry in neighbours],
        "probe": probe.linear_probe(*data, **section.probe.to_dict(), seed=config.seed),
        "cluster": {"images": "val", **clusters},
    }


def run(
    config: ConfigDict,
    splits: dict[str, sources.Source],
    run_folder: Path,
    workdir: Path,
    mesh,
) -> dict:
    """Evaluates the encoders of `run_folder`; writes `results.json` into `workdir`.

    What `results.json` already holds is not computed again.

    Args:
      config: a config with an `eval` section whose `model` describes the encoders.
      splits: the images, "train" and "val".
      run_folder: the run whose checkpoints are evaluated.
      workdir: where the results go.
      mesh: the device mesh, which must be the current one.

    Returns:
      The content of `results.json`: `{name: {"knn": [...], "probe": {...}, "cluster": {...}}}`.
    """
    path = workdir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    folders = encoders(run_folder)
    names = (["pixels"] if config.eval.pixels else []) + list(folders)
    for name in names:
        if name in results:
            continue
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
            _features(config, splits[s], encode, mesh, f"{name} {s}") for s in sources.SPLITS
        )
        results[name] = protocols(config, train, test, kind)
        if jax.process_index() == 0:
            draft = path.with_suffix(".tmp")
            draft.write_text(json.dumps(results, indent=2) + "\n")
            draft.replace(path)
    return results


def table(results: dict) -> str:
    """The results as a text table: best k-NN, linear probe, k-means, in percent."""
    header = ("", "k-NN", "linear probe", "k-means ACC", "mean of runs", "NMI", "ARI")
    rows = [header]
    for name, result in results.items():
        neighbours = next((r for r in result["knn"] if r["k"] == 10), result["knn"][0])
        found = result["cluster"]
        mean = f"{100 * found['mean']['acc']:.1f} +- {100 * found['deviation']['acc']:.1f}"
        shares = (
            neighbours["accuracy"],
            result["probe"]["best_last_epoch"],
            found["best"]["acc"],
            mean,
            found["best"]["nmi"],
            found["best"]["ari"],
        )
        rows.append((name, *(s if isinstance(s, str) else f"{100 * s:.1f}" for s in shares)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(
            zip(row, widths, strict=True))) for row in rows
    ]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
