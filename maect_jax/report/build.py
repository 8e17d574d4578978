"""Builds the report of a run from its folder: `report.html`, `results.md` and `pictures/`; and the
page of its clusters."""

import itertools
import logging
import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from maect_jax import config as configs
from maect_jax import files
from maect_jax.data.base import evenly_spaced
from maect_jax.data.sources import Source, title
from maect_jax.errors import UserError, first_of
from maect_jax.evals import cluster, features, maps, paper, runner, table
from maect_jax.models import vit
from maect_jax.report import clusters, plots, sheets, style
from maect_jax.run import jsonl, snapshots
from maect_jax.stages import SAVED, STAGES

_LOGGER = logging.getLogger(__name__)
MAP_IMAGES = 1_000  # more make a cloud, and t-SNE slow
_DATA_KEYS = ("source", "path", "name", "train_split", "val_split", "short_side")
_PERCENT = "{:.1%}"
# By key of `metrics.jsonl`: what it is, and how one number is written.
_CURVES = {
    "loss": ("loss", "{:.4g}"),
    "nn_accuracy": ("neighbour accuracy", _PERCENT),
    "knn_accuracy": ("k-NN accuracy", _PERCENT),
}
_OF_HEAD = re.compile(r"(.+)_(?:block)?(\d+|final)")  # a key of one head: the quantity, its block
_UNFIT = (LookupError, TypeError, ValueError, AttributeError, OverflowError, jinja2.TemplateError)
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("maect_jax.report", package_path=""),
    autoescape=jinja2.select_autoescape(),  # in *.html
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals |= dict(
    stages=STAGES, saved=SAVED, projections=maps.NAMES, shown_knn=table.neighbours,
    columns=table.columns, is_difference=table.is_difference, map_images=MAP_IMAGES,
    many_classes=style.MANY_CLASSES,
)  # fmt: skip


def read_config(run: Path) -> ConfigDict:
    """Reads the config of a run. Raises `UserError` if there is none, or it lacks a section."""
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{str(run)!r}: has no config.json. Name the folder of a run.")
    config = configs.read(path)
    configs.require(path, config, "data", _DATA_KEYS)
    for section in ("checkpoint", "monitor", *config.get("stages", ("stages",))):
        configs.require(path, config, section)
    return config


def report(run: Path, images: Mapping[str, Source]) -> Path:
    """Draws the figures that a run has the data for, and writes its report.

    Args:
      run: the folder of a run.
      images: those that its stages use, by split (`pipeline.open_images`).

    Returns:
      The path of the report.

    Raises:
      UserError: it is no run, or a file of it is damaged.
    """
    config, results = read_config(run), runner.read_results(run)
    environment = files.read_json(run / "environment.json")
    history = read_history(run, images)
    run_figures = _RunFigures(run, config, images, results)
    with matplotlib.rc_context(fname=style.SETTINGS):
        with _reading(run / "metrics.jsonl"):
            timings = stage_timings(history)
            figures, numbers = curves(history, colours={})
            by_head, numbers_by_head = curves_by_head(history)
            figures, numbers = figures | by_head, numbers | numbers_by_head
        with _reading(run / "results.json", runner.AGAIN):
            evaluation = _evaluation(config, images, results)
            measured = evaluation["measured"]
            probes = measured["probe"] | measured["probe_augmented"]
            figures["probes"] = plots.probes(probes)
            first_row = next(iter(run_figures.rows), "")
            selected = measured["cluster"].get(first_row, {}).get("selection")
            if selected:
                figures["selection"] = plots.selection(selected)
            blocks = table.by_block(results)
            figures["blocks"] = plots.blocks(blocks, vit.size_of(config.model).depth)
            if one_epoch := [
                [row, "1", _PERCENT.format(result["best_last_epoch"]["top1"])]
                for row, result in probes.items()
                if len(result["epochs_top1"]) == 1
            ]:
                numbers["probes"] = [["", "epoch", "top-1"], *one_epoch]
        figures |= run_figures.draw()
        pictures = _save({name: figure for name, figure in figures.items() if figure}, run)
    has_page = run_figures.write_page()
    with _reading(run / "{config,environment}.json", "restore it"):
        html = TEMPLATES.get_template("report.html").render(
            **evaluation,
            values={key: repr(value) for key, value in configs.flat(config).items()},
            size=vit.size_of(config.model),
            environment=environment,
            counts={split: len(source) for split, source in images.items()},
            labelled=all(source.labelled for source in images.values()),
            timings=timings,
            pictures=dict.fromkeys(numbers, "") | pictures,
            numbers=numbers,
            maps=[name for name in pictures if name.startswith("map_")],
            first_row=first_row,
            has_page=has_page,
            selected=selected,
        )
    if results:
        paragraphs = [table.markdown(evaluation["rows"]).strip(), *evaluation["notes"]]
        files.write_text(run / "results.md", "\n\n".join(paragraphs) + "\n")
    path = run / "report.html"
    files.write_text(path, html)
    return path


def show(report: Path) -> None:
    """Prints the path of a report, and of the page of clusters beside it, if there is one."""
    print(report, *report.parent.glob("clusters.html"), sep="\n", flush=True)


def read_history(run: Path, images: Mapping[str, Source]) -> list[dict]:
    """The lines of a run's `metrics.jsonl`, in the order of the stages: those of a stage that was
    trained again are at the end of the file."""
    history = in_order(jsonl.read(run / "metrics.jsonl"))
    if not images["train"].labelled:  # earlier versions have logged it, as that of no image
        unknown = "nn_accuracy"
        history = [{k: x for k, x in line.items() if not k.startswith(unknown)} for line in history]
    return history


def in_order(history: Sequence[dict]) -> list[dict]:
    """Sorts lines by the order of the stages."""
    order = {name: place for place, name in enumerate(STAGES)}
    return sorted(history, key=lambda line: order.get(line["stage"], len(order)))


def curves(history: Sequence[dict], colours: Mapping[str, str]) -> tuple[dict, dict]:
    """Draws the training curves; of a stage with a single point, takes the number.

    Args:
      history: lines of `metrics.jsonl`; those of several runs name their `run`.
      colours: by run, for several runs.

    Returns:
      Figures, and tables of numbers (lines of cells, the head first), by key of the lines.
    """
    figures, numbers, runs = {}, {}, [*colours] or [""]
    for key, (label, form) in _CURVES.items():
        found = plots.by_stage(history, key)
        figures[key] = plots.curves(found, label, colours)
        if singles := plots.single_points(found):
            lines = [["", "step", *(colours or [label])]]
            for (stage, step), values in singles.items():
                shown = (form.format(values[run]) if run in values else "-" for run in runs)
                lines.append([stage, f"{step:,}", *shown])
            numbers[key] = lines
    return figures, numbers


def curves_by_head(history: Sequence[dict]) -> tuple[dict, dict]:
    """What `curves` does, of stages with several heads: a colour a head, by key and "_by_head"."""
    lines = [
        {"stage": line["stage"], "step": line["step"], "run": match[2], match[1]: value}
        for line in history
        for key, value in line.items()
        if (match := _OF_HEAD.fullmatch(key))
    ]
    final = "final"
    blocks = sorted({line["run"] for line in lines} - {final}, key=int)
    colours = dict(zip(blocks, style.depths(len(blocks)), strict=True)) | {final: style.ORANGE}
    figures, numbers = curves(lines, colours)
    for figure in filter(None, figures.values()):
        plots.legend(figure, "head behind block", colours)
    # A line a head: there may be more than a screen has room for.
    numbers = {f"{key}_by_head": [*zip(*lines, strict=True)] for key, lines in numbers.items()}
    return {f"{key}_by_head": figure for key, figure in figures.items()}, numbers


def stage_timings(history: Sequence[dict]) -> list[dict]:
    """What each stage took, from the lines of `metrics.jsonl` in the order of the stages.

    Returns:
      For each stage its `name`, `steps`, `rate` (median images per second) and `seconds`.
    """
    timings = []
    for stage, group in itertools.groupby(history, key=lambda line: line["stage"]):
        lines = list(group)
        rated = [line for line in lines if "images_per_second" in line]
        if rated:
            # The first line is of one step and its compilation.
            rates = [line["images_per_second"] for line in rated[1:] or rated]
            # Of all lines: the last checkpoint is saved after the last step.
            seconds = float(max(line["seconds"] for line in lines))
            timing = dict(name=stage, rate=float(statistics.median(rates)), seconds=seconds)
            timings.append(timing | dict(steps=rated[-1]["step"]))
    return timings


def _evaluation(config: ConfigDict, images: Mapping[str, Source], results: Mapping) -> dict:
    """The templates' values for the table of results, with the paper's figures on ImageNet, and
    for the notes on how they were measured."""
    measured: defaultdict[str, dict] = defaultdict(dict)  # by protocol, then by row
    for row, result in results.items():
        for key, value in result.items():
            if isinstance(value, dict | list) and table.there(result, key):
                measured[key][row] = value
    rows, published = table.cells(results), {}
    if rows and paper.is_imagenet(images["train"].classes):
        published = paper.figures(config.model.variant, config.model.patch_size)
    inner = (block for blocks in measured["blocks"].values() for block in blocks.values())
    timed = [*measured["seconds"].values(), *(block["seconds"] for block in inner)]
    seconds = sum(sum(times.values()) for times in timed)
    values = dict(config=config, dataset=title(config.data), results=results)
    values |= dict(measured=measured, eval_seconds=seconds)
    values |= dict(rows=rows | published, about_paper=paper.NOTE if published else "")
    notes = re.split(r"\n\s*\n", TEMPLATES.get_template("notes.txt").render(values))
    return values | dict(notes=[" ".join(note.split()) for note in notes if note.strip()])


def _save(figures: Mapping[str, Figure], run: Path) -> dict[str, str]:
    """Writes figures as the only ones in `pictures/`; returns them as SVG, by name."""
    folder, draft = run / "pictures", run / "pictures.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    svgs = {name: style.save(figure, draft / f"{name}.png") for name, figure in figures.items()}
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return svgs


@contextmanager
def _reading(path: Path, remedy: str = "remove it, to do without") -> Iterator[None]:
    """Raises `UserError` if the content of a readable file is not what a run writes."""
    try:
        yield
    except _UNFIT as error:
        raise UserError(f"{path}: does not hold what a run writes ({error!r}); {remedy}") from error


@dataclass(frozen=True)
class _RunFigures:
    """Draws images and features of a run: its folder, its config, its images by split ("val" may be
    absent), and the content of its `results.json`."""

    folder: Path
    config: ConfigDict
    images: Mapping[str, Source]
    results: Mapping[str, dict]

    @cached_property
    def rows(self) -> list[str]:
        """Rows of the results with features of the images on disk (`runner.ordered`), without raw
        pixels."""
        rows = [row for row in runner.ordered(self.results) if row != runner.PIXELS]
        rows = [row for row in rows if runner.folder_of(self.folder, row).is_dir()]
        return [row for row in rows if not runner.is_outdated(self.folder, row, self.images)]

    def draw(self) -> dict[str, Figure]:
        """Draws all that the run has the data for, by name. Raises `UserError` if it is damaged."""
        return self._snapshots() | self._maps() | self._retrieval() | self._clusters()

    @property
    def _split(self) -> str:
        """The images that snapshots, maps and queries show."""
        return "val" if "val" in self.images else "train"

    def _records(self, split: str) -> sheets.Records:
        return runner.record(self.config, self.images[split])

    def _snapshots(self) -> dict[str, Figure]:
        """What the stages make of some images as training goes on."""
        loaded = {
            f"{stage} {step}": files.read_saved_arrays(path)
            for stage in STAGES
            for step, path in snapshots.saved(self.folder, stage).items()
        }
        figures, records = {}, self._records(self._split)
        with _reading(self.folder / "watch"):
            of_others = [
                t for t, arrays in loaded.items() if not snapshots.is_of(arrays, self.images)
            ]
            if of_others:
                _LOGGER.warning(
                    "%s: snapshots of other images are left out: %s",
                    self.folder,
                    first_of(of_others),
                )
            loaded = {title: arrays for title, arrays in loaded.items() if title not in of_others}
            filled = [arrays for arrays in loaded.values() if "filled" in arrays]
            looked_up = {t: arrays for t, arrays in loaded.items() if "neighbours" in arrays}
            for last in filled[-1:]:
                images = np.stack([records(int(record))["image"] for record in last["index"]])
                sheet = sheets.reconstructions(images, last["mask"], last["filled"])
                figures["reconstructions"] = sheet
            if looked_up:
                figures["neighbours"] = self._neighbours(looked_up)
        return figures

    def _neighbours(self, found: Mapping[str, Mapping]) -> Figure:
        """Images `index` `[Q]` with training images `neighbours` `[Q, k]` near them, by title."""
        records, index = self._records(self._split), next(iter(found.values()))["index"]
        queries = [records(int(record)) for record in index]
        neighbours = {title: arrays["neighbours"] for title, arrays in found.items()}
        classes = self.images["train"].classes
        return sheets.neighbours(queries, neighbours, self._records("train"), classes)

    def _maps(self) -> dict[str, Figure]:
        """Features in two dimensions: of stages that learn features, and of the first row."""
        figures = {}
        for row in reversed(self.rows):
            folder = runner.folder_of(self.folder, row) / self._split
            wanted = row == self.rows[0] or (row in STAGES and STAGES[row].learns_features)
            if wanted and features.is_whole(folder):
                with _reading(folder):
                    figures[f"map_{row}"] = self._map(row, features.load(folder))
        return figures

    def _map(self, row: str, found: features.Features) -> Figure:
        """A map in the colours of the labels; without labels, in those of the clusters."""
        # Spread over all images, because those of a folder are sorted by class.
        chosen = evenly_spaced(len(found.x), MAP_IMAGES)
        points = maps.points(found.x[chosen], self.config.eval.map)
        labels, classes = found.labels[chosen], self.images[self._split].classes
        clusters = runner.read_clusters(self.folder, row).get("clusters")
        if clusters is not None and not found.labelled and len(clusters) == len(found.labels):
            labels = clusters[chosen]
            classes = [f"cluster {i}" for i in range(labels.max() + 1)]
        return plots.feature_map(points, labels, classes)

    def _retrieval(self) -> dict[str, Figure]:
        """Some images and the training images nearest to them in the features of each row."""
        found = {row: runner.read_retrieval(self.folder, row) for row in reversed(self.rows)}
        found = {row: arrays for row, arrays in found.items() if arrays}
        with _reading(self.folder / "features" / "*" / "retrieval.npz"):
            return {"retrieval": self._neighbours(found)} if found else {}

    @cached_property
    def _clustered(self) -> Source | None:
        """The images whose clusters the first row has; the config may name other ones since."""
        if not self.rows:
            return None
        default = cluster.cluster_split(self.config, self.images)
        return self.images.get(self.results[self.rows[0]].get("cluster", {}).get("split", default))

    def write_page(self) -> bool:
        """Writes the page of the clusters of the first row, if there are any; else removes that of
        others. Returns whether there is one."""
        clustered = None
        if self._clustered:
            row = self.rows[0]
            with _reading(runner.folder_of(self.folder, row), runner.AGAIN):
                clustered = clusters.Clustered.read(
                    self.folder, row, self._clustered, entry=self.results[row]
                )
        if not clustered:
            clusters.remove(self.folder)
            return False
        template = TEMPLATES.get_template("clusters.html")
        clusters.write(self.folder, clustered, self.config, template)
        return True

    def _clusters(self) -> dict[str, Figure]:
        """The clusters of the first row, and how they agree with the labels."""
        source = self._clustered
        if not source or not (found := runner.read_clusters(self.folder, self.rows[0])):
            return {}
        records, classes = runner.record(self.config, source), source.classes
        with _reading(runner.folder_of(self.folder, self.rows[0]) / "cluster.npz"):
            figures = {"clusters": sheets.montage(found, records, classes)}
            if (found["labels"] >= 0).all():
                figures["confusion"] = plots.confusion(found["labels"], found["clusters"], classes)
        return figures
