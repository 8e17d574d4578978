"""The results in one table: of a run, or of several runs as mean +- deviation."""

from collections.abc import Callable, Mapping

import numpy as np

from maect_jax.errors import UserError

_K = 10
_CLUSTERS = {"acc": "k-means ACC", "nmi": "NMI", "ami": "AMI", "ari": "ARI"}
SUBSET_NAMES = {"imagenet_dogs15": "Dogs-15", "imagenet10": "ImageNet-10"}


def neighbours(result: dict) -> dict:
    """The entry of a row's k-NN results that is shown: that of 10 neighbours, else the first."""
    return next((r for r in result["knn"] if r["k"] == _K), result["knn"][0])


def there(result: dict, protocol: str) -> bool:
    """Whether a row has results of a protocol, which may not be asked for, or skipped."""
    return protocol in result and "skipped" not in result[protocol]


def shot(entry: dict) -> str:
    """What an entry of the low-shot results is called."""
    if "images_per_class" in entry:
        number = entry["images_per_class"]
        return f"low-shot, {number} image{'' if number == 1 else 's'}"
    return f"low-shot, {100 * entry['share']:g} %"


def _clusters(found: dict, name: str = "") -> dict[str, float]:
    best, mean = found["best"], found["mean"]
    own = {f"{name}{title}": best[key] for key, title in _CLUSTERS.items() if key in best}
    if "acc" in mean:
        first, *rest = own.items()
        own = dict([first, (f"{name}mean of runs", mean["acc"]), *rest])
    if "silhouette" in best:
        own[f"{name}silhouette"] = best["silhouette"]
    return own


def _shares(result: dict) -> dict[str, float]:
    """The figures of one row of `results.json`, by column."""
    own = {}
    if there(result, "knn"):
        own["k-NN"] = neighbours(result)["accuracy"]
    if there(result, "probe_augmented"):
        own["linear probe"] = result["probe_augmented"]["best_last_epoch"]["top1"]
    if there(result, "probe"):
        own["probe, centre crops"] = result["probe"]["best_last_epoch"]["top1"]
    if there(result, "lowshot"):
        own |= {shot(e): e["accuracy"] for e in result["lowshot"] if "accuracy" in e}
    if there(result, "classifier"):
        own["its classifier"] = result["classifier"]["top1"]
    if there(result, "finetune"):
        own["fine-tuned"] = result["finetune"]["top1"]
    if there(result, "cluster"):
        own |= _clusters(result["cluster"])
        for subset, found in result["cluster"].get("subsets", {}).items():
            if "best" in found:
                own |= _clusters(found, f"{SUBSET_NAMES[subset]} ")
    return own


def percentages(results: Mapping[str, dict]) -> dict[str, dict[str, float]]:
    """By row, the figures of the table by column, in percent; where MAE and CT are both there, a
    row of what tuning has changed as well."""
    rows = {name: _shares(result) for name, result in results.items()}
    rows = {name: {k: 100 * v for k, v in row.items()} for name, row in rows.items()}
    if {"mae", "ct"} <= set(rows):
        before, after = rows["mae"], rows["ct"]
        rows["ct - mae"] = {key: after[key] - before[key] for key in after if key in before}
    return rows


def is_difference(row: str) -> bool:
    """Whether a row is one of differences, which are written with their sign."""
    return " - " in row


def columns(rows: Mapping[str, Mapping]) -> list[str]:
    """All columns that a row has a figure in, in order."""
    return list(dict.fromkeys(column for row in rows.values() for column in row))


def cells(results: Mapping[str, dict]) -> dict[str, dict[str, str]]:
    """The table of one run, as text."""

    def written(name: str) -> Callable[[float], str]:
        return "{:+.1f}".format if is_difference(name) else "{:.1f}".format

    return {
        name: {column: written(name)(value) for column, value in row.items()}
        for name, row in percentages(results).items()
    }


def cells_of_several(runs: dict[str, dict]) -> dict[str, dict[str, str]]:
    """The table of several runs: mean and unbiased deviation, as text.

    Args:
      runs: the results of each, by its name.

    Raises:
      UserError: they do not have the same rows and columns.
    """
    tables = [percentages(results) for results in runs.values()]
    for name, rows in zip(runs, tables, strict=True):
        if list(rows) != list(tables[0]) or columns(rows) != columns(tables[0]) or not rows:
            have = {run: ", ".join(results) or "nothing" for run, results in runs.items()}
            raise UserError(
                f"{name!r} cannot be averaged with the other runs: evaluated are {have}"
            )
    several = {}
    for name, row in tables[0].items():
        form = "{:+.1f} +- {:.1f}" if is_difference(name) else "{:.1f} +- {:.1f}"
        several[name] = {}
        for column in row:
            values = [table[name][column] for table in tables]
            several[name][column] = form.format(np.mean(values), np.std(values, ddof=1))
    return several


def _lines(rows: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    """A line a column of the results, as they may be many: its name, and its figure in each row."""
    head = ["percent", *rows]
    return [head, *([key, *(row.get(key, "-") for row in rows.values())] for key in columns(rows))]


def text(rows: Mapping[str, Mapping[str, str]]) -> str:
    """A table as aligned lines."""
    lines = _lines(rows)
    first, *rest = (max(map(len, column)) for column in zip(*lines, strict=True))
    lines = [
        "  ".join((name.ljust(first), *(c.rjust(w) for c, w in zip(row, rest, strict=True))))
        for name, *row in lines
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(rows: Mapping[str, Mapping[str, str]]) -> str:
    """A table in Markdown."""
    head, *lines = _lines(rows)
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *lines)) + "\n"
