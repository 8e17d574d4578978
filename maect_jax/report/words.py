"""The sentences and small tables of the page."""

import statistics

from ml_collections import ConfigDict

from maect_jax.evals import maps, table
from maect_jax.models import vit
from maect_jax.report import plots, style
from maect_jax.stages import STAGES

_DID = {
    "mae": "masked pre-training",
    "head": "a contrastive head on the frozen encoder",
    "ct": "contrastive tuning of the upper {} blocks",
    "finetune": "fine-tuning with labels",
}
_ROWS = {
    "pixels": "raw pixels",
    "mae": "the encoder after stage 1",
    "head": "the encoder under the head",
    "ct": "the average of the tuned encoder",
    "finetune": "the fine-tuned encoder",
    "encoder": "the imported encoder",
    "probe": "the imported encoder of a probe",
}


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def sentence(config: ConfigDict, images: dict[str, int], history: list[dict], results: dict) -> str:
    """What was run, in one sentence or two. `images` are their numbers by split."""
    model, size = config.model, vit.size_of(config.model)
    what = f"A ViT of width {size.width}, depth {size.depth} and patch size {model.patch_size}"
    data = config.data.name if config.data.source == "tfds" else config.data.path
    data = data or config.data.source
    held_out = f"{images['val']:,} held-out images" if "val" in images else "the images themselves"
    evaluated = f"evaluated on {held_out}" if results else ""
    stages = _stages(history)
    if not stages:
        start = f", from {config.init_from}," if config.init_from else ""
        return (
            f"{what}{start} {f'was {evaluated} of {data}' if results else 'before its training'}."
        )
    done = []
    for row in stages:
        section = config[row["name"]]
        upper = STAGES[row["name"]].tuned_blocks(config)
        done.append(f"{_DID[row['name']].format(upper)} ({_counted(section.epochs, 'epoch')})")
    whose = f"{images['train']:,} training images of {data}"
    whose += "" if stages[-1]["name"] == "finetune" else ", without labels"
    took = f"{_duration(sum(row['seconds'] for row in stages))} of training"
    left = [s for s in config.stages if s in _DID and s not in [row["name"] for row in stages]]
    so_far = " so far" if left else ""
    after = f"; {evaluated}" if evaluated else ""
    return f"{what}: {_listed(done)} on {whose}, in {took}{so_far}{after} (seed {config.seed})."


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
    rated = [entry for entry in history if "images_per_second" in entry]
    for stage in dict.fromkeys(entry["stage"] for entry in rated):
        own = [entry for entry in rated if entry["stage"] == stage]
        # The first line stands for one step and its compilation.
        rate = statistics.median(entry["images_per_second"] for entry in own[1:] or own)
        # Lines without a rate count: the last checkpoint is saved after the last step.
        took = max(entry["seconds"] for entry in history if entry["stage"] == stage)
        rows.append(dict(name=stage, steps=own[-1]["step"], rate=rate, seconds=took))
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
        took = sum(sum(r["seconds"].values()) for r in results.values() if "seconds" in r)
        if took:
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


def _knn(result: dict) -> str:
    nearest = table.neighbours(result)
    how = ", features standardised" if nearest["standardised"] else ""
    return (
        f"k-NN: {nearest['k']} neighbours among the training images by cosine, temperature "
        f"{nearest['temperature']}{how}."
    )


def _probe(results: dict, protocol: str, title: str) -> str:
    found = {name: r[protocol] for name, r in results.items() if table.there(r, protocol)}
    first = next(iter(found.values()))
    whose = "the test images" if first["chosen_on"] == "test" else first["chosen_on"]
    top5 = [f"{name} {100 * r['best_last_epoch']['top5']:.1f}" for name, r in found.items()]
    return (
        f"{title}: crops are {first['crops']}; of {len(first['probes'])} learning rates the best "
        f"at the last of {_counted(first['epochs'], 'epoch')}, chosen on {whose}. Top-5: "
        f"{', '.join(top5)}."
    )


def _lowshot(entries: list[dict]) -> str:
    done = [entry for entry in entries if "accuracy" in entry]
    if not done:
        return "Low-shot: no class has images enough."
    splits = max(entry["splits"] for entry in done)
    drawn = done[0]["drawn"] if isinstance(done[0]["drawn"], str) else "from the lists"
    return (
        f"Low-shot, 1 image of each class and so on: logistic regression; the images are "
        f"{drawn}, mean over {_counted(splits, 'split')} where there are several."
    )


def _kmeans(found: dict) -> str:
    best, how = found["best"], "features L2-normalised" if found["l2_normalised"] else "as they are"
    how += f", {found['pca']} principal components" if found["pca"] else ""
    how += f", mini-batches of {found['minibatch']}" if found["minibatch"] else ""
    text = (
        f"k-means of the {found['split']} images: {found['clusters']} clusters ({how}), the run of "
        f"the lowest loss among {found['runs']}"
        + ("; mean of runs is the accuracy over all of them." if "acc" in best else ".")
        + ("" if "acc" in best else " Without labels there is no accuracy, NMI, AMI or ARI.")
    )
    for name, part in found.get("subsets", {}).items():
        if "skipped" in part:
            text += f" {name} was skipped: {part['skipped']}."
    if best.get("silhouette_images", found["images"]) < found["images"]:
        text += f" Silhouette: of {best['silhouette_images']:,} images drawn at random."
    return text


def protocols(config: ConfigDict, results: dict) -> list[str]:
    """How the figures of the table were measured, and what was skipped."""
    first = next((r for r in results.values() if "features" in r), {})
    rows = ", ".join(f"{name}: {_ROWS.get(name, 'the encoder of that file')}" for name in results)
    features = [
        r["features"] for name, r in results.items() if name != "pixels" and "features" in r
    ]
    told = [f"{rows}." if rows else ""]
    told += [f"Features: {features[0]}."] if features else []
    if table.there(first, "knn"):
        told.append(_knn(first))
    if table.there(first, "probe_augmented"):
        told.append(_probe(results, "probe_augmented", "Linear probe"))
    if table.there(first, "probe"):
        told.append(_probe(results, "probe", "Probe, centre crops (the fast variant)"))
    if table.there(first, "lowshot"):
        told.append(_lowshot(first["lowshot"]))
    if table.there(first, "cluster"):
        told.append(_kmeans(first["cluster"]))
    tuned = results.get("finetune", {}).get("finetune")
    if tuned:
        told.append(
            f"Fine-tuned: encoder and classifier on {tuned['training_images']:,} labelled images; "
            f"top-5 {100 * tuned['top5']:.1f} of {tuned['images']:,} held-out images."
        )
    for name in config.eval.protocols if "eval" in config else ():
        if "skipped" in first.get(name, {}):
            told.append(f"{name} was skipped: {first[name]['skipped']}.")
    return list(filter(None, told))


def captions(config: ConfigDict, images: dict[str, int], results: dict) -> dict[str, str]:
    """What stands below each picture. `images` are their numbers by split."""
    kind = "Held-out" if "val" in images else "Training"
    mapped = min(images.get("val", images["train"]), plots.MAP_IMAGES)
    projection = maps.NAMES[config.eval.map] if "eval" in config else ""
    found = [r["cluster"] for r in results.values() if table.there(r, "cluster")]
    labelled = any("acc" in f["best"] for f in found) or not found
    colours = "labels, which training has not seen" if labelled else "clusters"
    drawn = f"{projection} of the features of {mapped:,} {kind.lower()} images, coloured by their "
    drawn += colours
    framed = " Framed: one that has the image's own label." if labelled else ""
    matched = ", each with the label that it is matched with, and that label's share"
    clusters = found[0]["clusters"] if found else 0
    which = f"{style.CLASSES} of the {clusters}" if clusters > style.CLASSES else "The"
    tuned = "the tuned encoder's features" if "ct" in results else "the encoder's features"
    return {
        "loss": "The loss of each stage, and its running mean. Losses of several stages, which "
        "reconstruct, contrast or classify, cannot be compared.",
        "nn_accuracy": "Neighbour accuracy: the share of images whose neighbour in the queue has "
        "their label. Labels serve this curve only.",
        "reconstructions": f"{kind} images; grey patches were removed. The decoder predicts "
        "patches less their mean, over their deviation; both are the original's here.",
        "neighbours": f"{kind} images and their nearest rows of the queue, nearest first, after "
        f"so many steps of a stage; a dash stands for a row of no image.{framed}",
        "knn_accuracy": "k-NN accuracy of held-out images while training: 10 neighbours among "
        "training images. Labels serve this curve only.",
        "map_mae": f"Before tuning: {drawn}.",
        "map_ct": f"After tuning: {drawn}.",
        "map_head": f"Before tuning: {drawn}.",
        "retrieval": f"{kind} images and the training images that are nearest to them by cosine, "
        f"nearest first, in the features of each encoder.{framed}",
        "probes": "Test accuracy of the probes by epoch, a line for each learning rate; the higher "
        "the rate, the stronger the line.",
        "clusters": f"{which} k-means clusters of {tuned}, from the centre (left) to the rim "
        f"(right){matched if labelled else ''}.",
        "confusion": "The same clusters (rows) and the labels (columns), in images; the diagonal "
        "is what the accuracy counts.",
    }
