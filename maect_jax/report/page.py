"""The page of a run, from what is on its disk: `report.html`, and `pictures/*.png` beside it."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from maect_jax import config as configs
from maect_jax import files
from maect_jax.data import sources
from maect_jax.errors import UserError
from maect_jax.evals import cluster, features, maps, paper, runner, table
from maect_jax.report import plots, sheets, style, words
from maect_jax.run import jsonl, snapshots
from maect_jax.stages import STAGES

_TUNED = ("ct", "head", "mae")  # whose clusters are shown: the first that is there
_MAPPED = ("mae", "ct")
_DATA = ("source", "path", "name", "train_split", "val_split", "short_side")
_SECTIONS = {
    "Training": ("loss", "nn_accuracy", "knn_accuracy"),
    "What the masked autoencoder fills in": ("reconstructions",),
    "Neighbours as training goes on": ("neighbours",),
    "The map of the features": ("map_mae", "map_head", "map_ct"),
    "Nearest training images": ("retrieval",),
    "Clusters, found without labels": ("clusters", "confusion"),
    "Linear probes": ("probes",),
}


def build(run: Path, images: dict[str, sources.Source]) -> Path:
    """Draws every picture that the run has the data for, and the page.

    Args:
      run: the folder of a run.
      images: those that the run's stages use, by split (`inputs.open_sources`).

    Returns:
      The path of the page.

    Raises:
      UserError: it is no run, or a file of it is broken.
    """
    config, environment = read_config(run), files.read_json(run / "environment.json")
    results = runner.read_results(run)
    # A stage that was trained again is at the end of the file.
    order = {name: place for place, name in enumerate(STAGES)}
    history = jsonl.read(run / "metrics.jsonl")
    history.sort(key=lambda entry: order.get(entry["stage"], len(order)))
    counts = {split: len(source) for split, source in images.items()}
    with _taken_from(run / "metrics.jsonl"):
        curves = _curves(history, images["train"].labelled)
        words.timings(history, {})
    with _taken_from(run / "environment.json"):
        machine = words.machine(environment)
    with _taken_from(run / "results.json", runner.AGAIN):
        rows = table.cells(results)
        how = words.protocols(config, results)
        captions = words.captions(config, counts, results)
        timings = words.timings(history, results)
        figure = plots.probes(results)
    drawn = curves | _watched(run, config, images) | _features(run, config, images)
    drawn |= {"probes": figure} if figure else {}
    pictures = _save(drawn, run / "pictures")
    beside = _paper(config, images) if rows else {}
    how += [paper.NOTE] if beside else []
    if rows:
        told = [table.markdown(rows | beside), *how]
        files.write_text(run / "results.md", "\n\n".join(map(str.strip, told)) + "\n")
    page = _template().render(
        name=config.name,
        sentence=words.sentence(config, counts, history, results),
        columns=table.columns(rows | beside),
        rows=rows | beside,
        differences=list(filter(table.is_difference, rows)),
        how=how,
        sections=_SECTIONS,
        pictures=pictures,
        captions=captions,
        timings=timings,
        machine=machine,
        values={key: repr(value) for key, value in configs.flat(config).items()},
    )
    path = run / "report.html"
    files.write_text(path, page)
    return path


@contextmanager
def _taken_from(path: Path, mend: str = "remove it, to do without"):
    """A file of a run may be whole, and hold something else than a run writes."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: does not hold what a run writes ({error!r}); {mend}") from error


def _template() -> jinja2.Template:
    files = jinja2.PackageLoader("maect_jax.report", package_path="")
    options = dict(autoescape=True, undefined=jinja2.StrictUndefined)
    return jinja2.Environment(loader=files, **options).get_template("page.html")


def _save(drawn: dict[str, Figure], folder: Path) -> dict[str, str]:
    """Writes the pictures as the only ones of the folder; returns them as SVG."""
    draft = folder.with_suffix(".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    pictures = {name: style.save(figure, draft / f"{name}.png") for name, figure in drawn.items()}
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return pictures


def read_config(run: Path) -> ConfigDict:
    """The config of a run. Raises `UserError` where there is none."""
    if not (run / "config.json").is_file():
        raise UserError(f"{str(run)!r}: there is no run (no config.json); name the folder of a run")
    path = run / "config.json"
    config = configs.read(path)
    configs.require(path, config, "data", _DATA)
    for key in ("checkpoint", "monitor", *config.get("stages", ("stages",))):
        configs.require(path, config, key)
    return config


def _curves(history: list[dict], labelled: bool) -> dict[str, Figure]:
    labels = {
        "loss": "loss",
        "nn_accuracy": "neighbour accuracy",
        "knn_accuracy": "k-NN accuracy",
    }
    if not labelled:  # a share of nothing
        del labels["nn_accuracy"]
    drawn = {key: plots.curves(history, key, label) for key, label in labels.items()}
    return {key: figure for key, figure in drawn.items() if figure}


def _watched(run: Path, config: ConfigDict, images: dict) -> dict[str, Figure]:
    """What the stages have made of the watched images."""
    drawn, moments, index = {}, [], ()
    seen = runner.record(config, images.get("val", images["train"]))
    for path in list(snapshots.saved(run, "mae").values())[-1:]:
        found = snapshots.load(path)
        with _taken_from(path):
            originals = np.stack([seen(int(i))["image"] for i in found["index"]])
            sheet = sheets.reconstructions(originals, found["mask"], found["filled"])
        drawn["reconstructions"] = sheet
    for stage in ("head", "ct"):
        for step, path in snapshots.saved(run, stage).items():
            found = snapshots.load(path)
            with _taken_from(path):
                index = found["index"]
                moments.append((f"{stage} {step}", found["neighbours"]))
    if moments:
        train, classes = runner.record(config, images["train"]), images["train"].classes
        with _taken_from(run / "watch"):
            watched = [seen(int(i)) for i in index]
            drawn["neighbours"] = sheets.neighbours(watched, moments, train, classes)
    return drawn


def _paper(config: ConfigDict, images: dict) -> dict[str, dict[str, str]]:
    """What the paper has for such a model, where the images are ImageNet's."""
    if not paper.is_imagenet(images["train"].classes):
        return {}
    return paper.figures(config.model.variant, config.model.patch_size)


def _features(run: Path, config: ConfigDict, images: dict) -> dict[str, Figure]:
    """Maps of the features, their nearest training images, and the clusters found in them."""
    split = "val" if "val" in images else "train"
    there = [name for name in runner.read_results(run) if runner.folder_of(run, name).is_dir()]
    # An imported encoder's row has a name of its own.
    others = [name for name in there if name not in (*_TUNED, runner.PIXELS)]
    rows = [name for name in _TUNED if name in there] + others
    drawn = {}
    for name in rows:
        place = runner.folder_of(run, name) / split
        if name in (*_MAPPED, rows[0]) and features.is_whole(place):
            with _taken_from(place):
                drawn[f"map_{name}"] = _map(run, name, split, features.load(place), config, images)
    moments = {name: runner.read_retrieval(run, name) for name in reversed(rows)}
    moments = {name: found for name, found in moments.items() if found}
    if moments:
        train, shown = (runner.record(config, images[s]) for s in ("train", split))
        classes = images["train"].classes
        with _taken_from(run / "features" / "*" / "retrieval.npz"):
            index = next(iter(moments.values()))["index"]
            found = [(name, arrays["neighbours"]) for name, arrays in moments.items()]
            queries = [shown(int(i)) for i in index]
            drawn["retrieval"] = sheets.neighbours(queries, found, train, classes)
    for name in rows[:1]:
        clusters = runner.read_clusters(run, name)
        if clusters:
            with _taken_from(runner.folder_of(run, name) / "cluster.npz"):
                drawn |= _clusters(run, name, clusters, config, images)
    return drawn


def _map(run: Path, name: str, split: str, found, config: ConfigDict, images: dict) -> Figure:
    """A map in the colours of the labels; without labels, in those of the clusters."""
    # Spread over all images: those of a folder come class by class.
    chosen = sheets.spread(len(found.x), plots.MAP_IMAGES)
    points = maps.points(found.x[chosen], config.eval.map)
    labels, classes = found.labels[chosen], images[split].classes
    clusters = runner.read_clusters(run, name)
    if not found.labelled and clusters and len(clusters["clusters"]) == len(found.labels):
        labels = clusters["clusters"][chosen]
        classes = [f"cluster {i}" for i in range(labels.max() + 1)]
    return plots.feature_map(points, labels, classes)


def _clusters(run: Path, name: str, found: dict, config: ConfigDict, images: dict) -> dict:
    """The montage of the clusters, and their confusion with the labels."""
    split = cluster.cluster_split(config, images)
    labels, clusters, classes = found["labels"], found["clusters"], images[split].classes
    shown = runner.record(config, images[split])
    drawn = {
        "clusters": sheets.montage(
            found["distance"], labels, clusters, found["index"], shown, classes
        )
    }
    if (labels >= 0).all():
        drawn["confusion"] = plots.confusion(labels, clusters, classes)
    return drawn
