"""The page of a run, from what is on its disk: `report.html`, and `pictures/*.png` beside it."""

import shutil
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from sklearn.preprocessing import normalize

from maect_jax import config as pages
from maect_jax import evaluate, files, metrics, table, watch
from maect_jax.data import sources
from maect_jax.errors import UserError
from maect_jax.report import plots, sheets, style, words

_TUNED = ("ct", "head", "mae")  # whose clusters are shown: the first that is there
_MAPPED = ("mae", "ct")
_SECTIONS = {
    "Training": ("loss", "nn_accuracy"),
    "What the masked autoencoder fills in": ("reconstructions",),
    "Neighbours as training goes on": ("neighbours",),
    "The map of the held-out images": ("map_mae", "map_ct"),
    "Clusters, found without labels": ("clusters", "confusion"),
}


def build(run: Path, images: dict[str, sources.Source]) -> Path:
    """Draws every picture that the run has the data for, and the page.

    Args:
      run: the folder of a run.
      images: those that the run's stages use, by split (`pipeline.open_sources`).

    Returns:
      The path of the page.

    Raises:
      UserError: it is no run, or a file of it is broken.
    """
    config, environment = read_config(run), files.read_json(run / "environment.json")
    results = read_results(run)
    history = metrics.read(run / "metrics.jsonl")
    drawn = _curves(history) | _watched(run, config, images) | _features(run, config, images)
    pictures = _save(drawn, run / "pictures")
    rows = table.cells(results)
    counts = {split: len(source) for split, source in images.items()}
    page = _template().render(
        name=config.name,
        sentence=words.sentence(config, counts, history, results),
        columns=table.COLUMNS,
        rows=rows,
        differences=list(filter(table.is_difference, rows)),
        how=words.protocols(results),
        sections=_SECTIONS,
        pictures=pictures,
        captions=words.captions(counts, results),
        timings=words.timings(history, results),
        machine=words.machine(environment),
        values={key: repr(value) for key, value in pages.flat(config).items()},
    )
    path = run / "report.html"
    files.write_text(path, page)
    return path


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
    return pages.read(run / "config.json")


def read_results(run: Path) -> dict:
    """The content of a run's `results.json`; nothing where it was not evaluated."""
    return files.read_json(run / "results.json")


def _curves(history: list[dict]) -> dict[str, Figure]:
    labels = {"loss": "loss", "nn_accuracy": "neighbour accuracy"}
    drawn = {key: plots.curves(history, key, label) for key, label in labels.items()}
    return {key: figure for key, figure in drawn.items() if figure}


def _watched(run: Path, config: ConfigDict, images: dict) -> dict[str, Figure]:
    """What the stages have made of the watched images."""
    drawn, moments, index = {}, [], ()
    seen = evaluate.record(config, images.get("val", images["train"]))
    for path in list(watch.saved(run, "mae").values())[-1:]:
        found = watch.load(path)
        originals = np.stack([seen(int(i))["image"] for i in found["index"]])
        sheet = sheets.reconstructions(originals, found["mask"], found["filled"])
        drawn["reconstructions"] = sheet
    for stage in ("head", "ct"):
        for step, path in watch.saved(run, stage).items():
            found = watch.load(path)
            index = found["index"]
            moments.append((f"{stage} {step}", found["neighbours"]))
    if moments:
        watched = [seen(int(i)) for i in index]
        train = evaluate.record(config, images["train"])
        drawn["neighbours"] = sheets.neighbours(watched, moments, train, images["train"].classes)
    return drawn


def _features(run: Path, config: ConfigDict, images: dict) -> dict[str, Figure]:
    """Maps of the held-out features, and the clusters that were found in them."""
    paths = {name: evaluate.features_file(run, name) for name in _TUNED}
    found = {name: dict(np.load(path)) for name, path in paths.items() if path.exists()}
    drawn = {}
    for name in filter(found.get, _MAPPED):
        # Spread over all images: those of a folder come class by class.
        chosen = sheets.spread(len(found[name]["x"]), plots.MAP_IMAGES)
        points = plots.map_points(found[name]["x"][chosen])
        labels = found[name]["labels"][chosen]
        drawn[f"map_{name}"] = plots.feature_map(points, labels, images["val"].classes)
    for arrays in list(found.values())[:1]:
        x = normalize(arrays["x"]) if config.eval.cluster.normalise else arrays["x"]
        labels, clusters = arrays["labels"], arrays["clusters"]
        held_out, classes = evaluate.record(config, images["val"]), images["val"].classes
        index = arrays.get("index", np.arange(len(x)))  # older runs have none
        drawn["clusters"] = sheets.montage(x, labels, clusters, index, held_out, classes)
        if len(np.unique(labels)) <= style.CLASSES:
            drawn["confusion"] = plots.confusion(labels, clusters, classes)
    return drawn
