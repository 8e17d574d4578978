"""The accuracy of a fine-tuned classifier on the held-out images."""

from collections.abc import Mapping
from functools import partial

import jax

from maect_jax import files
from maect_jax.data.bad_images import BadImages
from maect_jax.data.labels import HeldOut, is_file
from maect_jax.data.sources import Source
from maect_jax.evals import features, runner
from maect_jax.evals.classifier import accuracies
from maect_jax.run import checkpoints
from maect_jax.run.folder import Run
from maect_jax.stages.finetune import Finetune


def classify(run: Run, images: Mapping[str, Source], bad_images: BadImages) -> dict:
    """Classifies all held-out images and writes the accuracies into the run's `results.json`.

    What is there already, of the same weights and images, is not computed again. The images, by
    split, are those that the stage sees; of those held out the ones that cannot be read are left
    out.

    Returns:
      `top1` and `top5` (0 to 1), `images` and `training_images` (numbers), `drawn`, whether the
      held-out images are a tenth of those with a label, `labels`, where these are from,
      `settings`, and `made_of`, a digest of the weights and the held-out images.
    """
    config, results, name = run.config, runner.read_results(run.folder), Finetune.name
    section = config[name]
    folder = checkpoints.stage_folder(run.folder, name)
    parts = checkpoints.read_parts(folder, Finetune.saved, run.mesh)
    weights = {"weights": features.fingerprint(parts["params"])}
    made_of = features.digest(weights | runner.described(config, images["val"]))
    row, size = results.setdefault(name, {}), section.batch_size
    if row.get(name, {}).get("made_of") != made_of:
        stage = Finetune.for_images(config, images["train"])
        rank = partial(jax.jit(stage.ranked), parts["params"], parts["frozen"])
        extraction = runner.Extraction(run, images["val"], bad_images, batch_size=size)
        ranked = features.collected(extraction.batches(rank))
        row[name] = accuracies(ranked.x, ranked.labels) | {
            "images": len(ranked.labels),
            "training_images": len(images["train"]),
            "drawn": isinstance(images["val"], HeldOut),
            "labels": config.data.labels,
            "settings": section.to_dict(),
            "made_of": made_of,
        }
        if jax.process_index() == 0:
            files.write_json(run.folder / "results.json", results)
    return row[name]


def text(metrics: dict) -> str:
    """Formats what `classify` returns as one line."""
    top1, top5 = (f"{100 * metrics[key]:.1f} %" for key in ("top1", "top5"))
    line = f"finetune: top-1 {top1}, top-5 {top5} of {metrics['images']:,} held-out images"
    if metrics.get("drawn"):
        line += ", a tenth of those with a label"
    if is_file(metrics.get("labels", "")):
        line += f", against the labels of {metrics['labels']}"
    return line
