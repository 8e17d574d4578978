"""The sentences and small tables of the page."""

import statistics

from ml_collections import ConfigDict

from maect_jax import table
from maect_jax.report import plots, style
from maect_jax.stages import build

_DID = {
    "mae": "masked pre-training",
    "head": "a contrastive head on the frozen encoder",
    "ct": "contrastive tuning of the upper {} blocks",
}
_ROWS = {
    "pixels": "raw pixels",
    "mae": "the encoder after stage 1",
    "head": "the encoder under the head",
    "ct": "the average of the tuned encoder",
}


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def sentence(config: ConfigDict, images: dict[str, int], history: list[dict], results: dict) -> str:
    """What was run, in one sentence or two. `images` are their numbers by split."""
    model, size = config.model, build.encoder_size(config.model)
    vit = f"A ViT of width {size.width}, depth {size.depth} and patch size {model.patch_size}"
    data = config.data.name if config.data.source == "tfds" else config.data.path
    data = data or config.data.source
    evaluated = f"evaluated on {images['val']:,} held-out images" if results else ""
    stages = _stages(history)
    if not stages:
        start = f", from {config.init_from}," if config.init_from else ""
        return f"{vit}{start} {f'was {evaluated} of {data}' if results else 'before its training'}."
    done = []
    for row in stages:
        section = config[row["name"]]
        upper = size.depth - section.get("frozen_blocks", 0)
        done.append(f"{_DID[row['name']].format(upper)} ({_counted(section.epochs, 'epoch')})")
    whose = f"{images['train']:,} training images of {data}, without labels"
    took = f"{_duration(sum(row['seconds'] for row in stages))} of training"
    left = [s for s in config.stages if s in _DID and s not in [row["name"] for row in stages]]
    so_far = " so far" if left else ""
    after = f"; {evaluated}" if evaluated else ""
    return f"{vit}: {_listed(done)} on {whose}, in {took}{so_far}{after} (seed {config.seed})."


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _stages(history: list[dict]) -> list[dict]:
    """Steps, median rate and seconds of each stage, in order."""
    rows = []
    for stage in dict.fromkeys(entry["stage"] for entry in history):
        own = [entry for entry in history if entry["stage"] == stage]
        # The first line stands for one step and its compilation.
        rate = statistics.median(entry["images_per_second"] for entry in own[1:] or own)
        last = own[-1]
        rows.append(dict(name=stage, steps=last["step"], rate=rate, seconds=last["seconds"]))
    return rows


def timings(history: list[dict], results: dict) -> list[dict[str, str]]:
    """A row for each stage and one for the evaluation: name, steps, images/s, seconds; as text."""
    rows = [
        dict(
            name=row["name"],
            steps=f"{row['steps']:,}",
            rate=f"{row['rate']:,.0f}",
            seconds=f"{row['seconds']:,.0f}",
        )
        for row in _stages(history)
    ]
    if results:
        took = sum(result["seconds"] for result in results.values())
        rows.append(dict(name="eval", steps="", rate="", seconds=f"{took:,.0f}"))
    return rows


def machine(environment: dict) -> str:
    """What the run ran on."""
    if not environment:
        return ""
    return (
        "{devices} x {device_kind} ({cpu_cores} CPU cores), hosts: {hosts}; Python {python}, "
        "JAX {jax}, maect_jax {maect_jax}."
    ).format(**environment)


def protocols(results: dict) -> str:
    """How the figures of the table were measured."""
    if not results:
        return ""
    first = next(iter(results.values()))
    nearest, found, probe = table.neighbours(first), first["cluster"], first["probe"]
    rows = ", ".join(f"{name}: {_ROWS[name]}" for name in results if name in _ROWS)
    return (
        f"On held-out images; {rows}. k-NN: {nearest['k']} neighbours among the training images by "
        f"cosine{', features standardised' if nearest['standardised'] else ''}. Linear probe: on "
        f"{probe['crops']}; of {len(probe['probes_last_epoch'])} learning rates the best at the "
        "last epoch, chosen on these images. k-means: "
        f"{found['clusters']} clusters, the run of the lowest loss among {found['runs']}; mean of "
        "runs is the accuracy over all of them."
    )


def captions(images: dict[str, int], results: dict) -> dict[str, str]:
    """What stands below each picture. `images` are their numbers by split."""
    kind = "Held-out" if "val" in images else "Training"
    mapped = min(images.get("val", 0), plots.MAP_IMAGES)
    tsne = f"t-SNE of the features of {mapped:,} held-out images, in the colours of their labels"
    clusters = next((r["cluster"]["clusters"] for r in results.values()), 0)
    which = f"{style.CLASSES} of the {clusters}" if clusters > style.CLASSES else "The"
    tuned = "the tuned encoder's features" if "ct" in results else "the encoder's features"
    return {
        "loss": "The loss of each stage, and its running mean. mae reconstructs, head and ct "
        "contrast: their losses cannot be compared.",
        "nn_accuracy": "Neighbour accuracy: the share of images whose neighbour in the queue has "
        "their label. Labels serve this curve only.",
        "reconstructions": f"{kind} images; grey patches were removed. The decoder predicts "
        "patches less their mean, over their deviation; both are the original's here.",
        "neighbours": f"{kind} images and their nearest rows of the queue, nearest first, after "
        "so many steps of a stage. Framed: a neighbour that has the image's own label.",
        "map_mae": f"Before tuning: {tsne}.",
        "map_ct": f"After tuning: {tsne}, which training has not seen.",
        "clusters": f"{which} k-means clusters of {tuned}, from the centre (left) to the rim "
        "(right), each with the label that it is matched with, and that label's share.",
        "confusion": "The same clusters (rows) and the labels (columns), in images; the diagonal "
        "is what the accuracy counts.",
    }
