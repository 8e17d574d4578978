"""The accuracy of a fine-tuned classifier on the held-out images."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from maect_jax import files
from maect_jax.data import bad_images, sources
from maect_jax.evals import features, runner
from maect_jax.run import checkpoints
from maect_jax.stages import STAGES

_NAME = "finetune"


def classify(
    config: ConfigDict,
    images: dict[str, sources.Source],
    broken: bad_images.BadImages,
    run: Path,
    mesh,
) -> dict:
    """Classifies every held-out image once and writes the result into the run's `results.json`.

    What is there already, of the same weights, is not computed again.

    Args:
      config: the run's config, with a `finetune` section.
      images: "train", by which the labels are numbered, and "val".
      broken: counts the held-out images that cannot be read, which are left out.
      run: the run's folder, with a checkpoint of stage finetune.
      mesh: the device mesh, which must be the current one.

    Returns:
      `top1` and `top5` (shares), `images` and `training_images` (numbers), `settings`.
    """
    path = run / "results.json"
    results = runner.read_results(run)
    folder = checkpoints.stage_folder(run, _NAME)
    parts = checkpoints.read_parts(folder, STAGES[_NAME].saved, mesh)
    weights = features.fingerprint(parts["params"])
    if results.get(_NAME, {}).get(_NAME, {}).get("weights") != weights:
        trained = STAGES[_NAME].training_images(config, images["train"])
        stage = STAGES[_NAME].for_images(config, trained)
        rank = partial(jax.jit(stage.ranked), parts["params"], parts["frozen"])
        size = config[_NAME].batch_size
        batches = runner.extracted(config, rank, images["val"], broken, size, mesh)
        ranked, labels = features.collected(batches)
        top1, top5 = accuracies(ranked, labels)
        found = {
            "top1": top1,
            "top5": top5,
            "images": len(labels),
            "training_images": len(trained),
            "settings": config[_NAME].to_dict(),
            "weights": weights,
        }
        results[_NAME] = results.get(_NAME, {}) | {_NAME: found}
        if jax.process_index() == 0:
            files.write_json(path, results)
    return results[_NAME][_NAME]


def accuracies(ranked: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Top-1 and top-5 accuracy of ranked classes `[N, K]`, the most likely first, K at most 5."""
    hits = ranked == labels[:, None]
    return float(hits[:, 0].mean()), float(hits.any(1).mean())


def text(found: dict) -> str:
    """What `classify` returns, in one line."""
    top1, top5 = (f"{100 * found[key]:.1f} %" for key in ("top1", "top5"))
    return f"finetune: top-1 {top1}, top-5 {top5} of {found['images']:,} held-out images"
