"""The sentences and small tables of the page."""

import statistics

from ml_collections import ConfigDict

from maect_jax.stages import build

_DID = {
    "mae": "masked pre-training",
    "head": "a contrastive head on the frozen encoder",
    "ct": "contrastive tuning of the upper {} blocks",
}


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def sentence(config: ConfigDict, images: dict[str, int], history: list[dict]) -> str:
    """What was run, in one sentence. `images` are their numbers by split."""
    model, size = config.model, build.encoder_size(config.model)
    what = f"a ViT of width {size.width}, depth {size.depth} and patch size {model.patch_size}"
    source = config.data.name if config.data.source == "tfds" else config.data.path
    whose = f"{images['train']:,} training images of {source or config.data.source}"
    done = []
    for stage in config.stages:
        if stage in _DID:
            upper = size.depth - config[stage].get("frozen_blocks", 0)
            done.append(f"{_DID[stage].format(upper)} ({config[stage].epochs} epochs)")
    if not done:
        return f"{what.capitalize()} was evaluated on {images['val']:,} held-out images."
    took = sum(row["seconds"] for row in _stages(history))
    text = f"{what}: {_listed(done)} on {whose}, without labels, in {_duration(took)}"
    held_out = f"; evaluated on {images['val']:,} held-out images" if "val" in images else ""
    return f"{text[0].upper()}{text[1:]}{held_out} (seed {config.seed})."


def _duration(seconds: float) -> str:
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
    neighbours, found = first["knn"][0], first["cluster"]
    return (
        f"On held-out images. pixels: raw pixels; mae: the encoder after stage 1; ct: after "
        f"stage 3. k-NN: 10 neighbours among the training images by cosine"
        f"{', features standardised' if neighbours['standardised'] else ''}. Linear probe: "
        f"{first['probe']['crops']}; the best of {len(first['probe']['probes_last_epoch'])} "
        f"learning rates at the last epoch. k-means: {found['clusters']} clusters, the run of "
        f"the lowest loss among {found['runs']}; mean of runs is the accuracy over all of them."
    )


def captions(config: ConfigDict, results: dict) -> dict[str, str]:
    """What stands below each picture."""
    kind = "Held-out" if "eval" in config.stages else "Training"
    tuned = "the tuned encoder's features" if "ct" in results else "the encoder's features"
    tsne = "t-SNE of the held-out features"
    return {
        "loss": "The loss of each stage. mae reconstructs, head and ct contrast: their losses "
        "cannot be compared.",
        "nn_accuracy": "Neighbour accuracy: the share of images whose neighbour in the queue has "
        "their label. Labels serve this curve only.",
        "reconstructions": f"{kind} images; grey patches were removed. The decoder predicts "
        "patches less their mean, over their deviation; both are the original's here.",
        "neighbours": f"{kind} images and their nearest rows of the queue, nearest first, after "
        "so many steps of a stage. Framed: a neighbour that has the image's own label.",
        "map_mae": f"Before tuning: {tsne} of the masked autoencoder, in the colours of their "
        "labels.",
        "map_ct": f"After tuning: {tsne}, in the colours of their labels, which training has not "
        "seen.",
        "clusters": f"The k-means clusters of {tuned}, from the centre (left) to the rim (right), "
        "each with its commonest label.",
        "confusion": "The same clusters (rows) and the labels (columns), in images. Each cluster "
        "is matched with one label; the diagonal is what the accuracy counts.",
    }
