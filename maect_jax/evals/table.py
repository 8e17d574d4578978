"""The results in one table: of a run, or of several runs as mean +- standard deviation."""

from collections.abc import Mapping, Sequence

import numpy as np

from maect_jax.stages import STAGES
from maect_jax.stages.mae import MAE

_K = 10
_CLUSTERS = {
    "acc": "k-means ACC", "nmi": "NMI", "ami": "AMI", "ari": "ARI", "silhouette": "silhouette",
}  # fmt: skip
SUBSET_NAMES = {"imagenet_dogs15": "Dogs-15", "imagenet10": "ImageNet-10"}
_BY_BLOCK = ("k-NN", "k-means ACC", "silhouette")
# Rows of an MAE's encoder as it was pre-trained, and stages that tune it without labels.
_BEFORE = (MAE.name, *(s.name for s in STAGES.values() if s.encoder_of == MAE.name))
_TUNING = [s.name for s in STAGES.values() if s.takes and s.learns_features and not s.needs_labels]

Rows = dict[str, dict[str, str]]  # cells as text, by row and column


def neighbours(result: dict) -> dict:
    """The entry of a row's k-NN results for the table: that of 10 neighbours, else the first."""
    return next((r for r in result["knn"] if r["k"] == _K), result["knn"][0])


def there(result: dict, protocol: str) -> bool:
    """Whether a row has results of a protocol, which may be absent or skipped."""
    return protocol in result and "skipped" not in result[protocol]


def shot(entry: dict) -> str:
    """The column of an entry of the low-shot results."""
    if "images_per_class" in entry:
        number = entry["images_per_class"]
        return f"low-shot, {number} image{'' if number == 1 else 's'}"
    return f"low-shot, {100 * entry['share']:g} %"


def _clusters(result: dict) -> dict[str, float]:
    columns = {}
    parts = {f"{SUBSET_NAMES[name]} ": part for name, part in result.get("subsets", {}).items()}
    for name, part in ({"": result} | parts).items():
        best = part.get("best", {})
        for key, title in _CLUSTERS.items():
            if key in best:
                columns[f"{name}{title}"] = best[key]
            if key == "acc" in best:
                columns[f"{name}mean of runs"] = part["mean"]["acc"]
    return columns


# By protocol, in the order of the table, its columns from its results, in fractions.
_COLUMNS = {
    "knn": lambda result: {"k-NN": neighbours({"knn": result})["accuracy"]},
    "probe_augmented": lambda result: {"linear probe": result["best_last_epoch"]["top1"]},
    "probe": lambda result: {"probe, centre crops": result["best_last_epoch"]["top1"]},
    "lowshot": lambda result: {shot(e): e["accuracy"] for e in result if "accuracy" in e},
    "classifier": lambda result: {"its classifier": result["top1"]},
    "finetune": lambda result: {"fine-tuned": result["top1"]},
    "cluster": _clusters,
}


def percentages(results: Mapping[str, dict]) -> dict[str, dict[str, float]]:
    """The numbers of the table, in percent, by row and column; for a stage that tunes an MAE,
    if both are there, a row with what it has changed as well. Different numbers of clusters, as
    where they are chosen, are not compared."""
    rows = {}
    for name, result in results.items():
        parts = [of(result[key]) for key, of in _COLUMNS.items() if there(result, key)]
        rows[name] = {column: 100 * value for part in parts for column, value in part.items()}
    base = next((name for name in _BEFORE if name in rows), "")
    before = rows.get(base, {})
    for name in _TUNING if before else ():
        if after := rows.get(name):
            both = [results[row].get("cluster", {}).get("clusters") for row in (base, name)]
            other = {"mean of runs", *_CLUSTERS.values()} if both[0] != both[1] else set()
            alike = [key for key in after if key in before and key not in other]
            change = {key: after[key] - before[key] for key in alike}
            if change:
                rows[f"{name} - {base}"] = change
    return rows


def by_block(results: Mapping[str, dict]) -> dict[str, dict[str, dict[str, float]]]:
    """What was measured behind blocks, in percent: by column of the table (k-NN, and k-means ACC
    or, without labels, the silhouette), row and block; "final" for the features of the row itself.
    """
    curves: dict[str, dict[str, dict[str, float]]] = {}
    for row, result in results.items():
        final = percentages({row: result})[row]
        for block, part in result.get("blocks", {}).items():
            for column, value in percentages({row: part})[row].items():
                if column in _BY_BLOCK:
                    line = curves.setdefault(column, {}).setdefault(row, {})
                    line[block] = value
                    if column in final:
                        line["final"] = final[column]
    if "k-means ACC" in curves:
        curves.pop("silhouette", None)
    return curves


def is_difference(row: str) -> bool:
    """Whether a row has differences, which are written with their sign."""
    return " - " in row


def columns(rows: Mapping[str, Mapping]) -> list[str]:
    """All columns that have a value in some row, in order."""
    return list(dict.fromkeys(column for row in rows.values() for column in row))


def cells(results: Mapping[str, dict]) -> Rows:
    """The table of one run."""
    return formatted([percentages(results)])


def cells_of_several(runs: Mapping[str, dict]) -> Rows:
    """The table of several runs that lack nothing (`lacking`): mean and unbiased standard deviation
    of their results."""
    return formatted([percentages(results) for results in runs.values()])


def columns_of_several(runs: Mapping[str, dict]) -> dict[str, list[str]]:
    """All columns that a row has in some run, by row, in order."""
    rows: dict[str, dict[str, None]] = {}
    for results in runs.values():
        for row, values in percentages(results).items():
            if values:
                rows.setdefault(row, {}).update(dict.fromkeys(values))
    return {row: list(found) for row, found in rows.items()}


def lacking(runs: Mapping[str, dict]) -> dict[str, str]:
    """The rows, or the columns of rows, that a run lacks and another has; without runs that lack
    nothing."""
    lacks, everything = {}, columns_of_several(runs)
    for run, results in runs.items():
        rows, parts = percentages(results), []
        for row, wanted in everything.items():
            absent = [column for column in wanted if column not in rows.get(row, {})]
            if absent:
                parts.append(f"{row} ({', '.join(absent)})" if row in rows else row)
        if parts:
            lacks[run] = ", ".join(parts)
    return lacks


def formatted(tables: Sequence[Mapping[str, dict[str, float]]]) -> Rows:
    """`percentages` of one run as text, or of several runs as their mean and deviation."""
    rows: Rows = {}
    for name, row in tables[0].items():
        rows[name], form = {}, "{:+.1f}" if is_difference(name) else "{:.1f}"
        for column in row:
            values = [table[name][column] for table in tables]
            spread = f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            mean = form.format(np.mean(values)).replace("-0.0", "+0.0")  # which is no loss
            rows[name][column] = mean + spread
    return rows


def _lines(rows: Rows) -> list[list[str]]:
    """A line for each column of the results, as they may be many, and a head with the rows."""
    head = ["percent", *rows]
    return [head, *([key, *(row.get(key, "-") for row in rows.values())] for key in columns(rows))]


def text(rows: Rows) -> str:
    """Formats a table as aligned lines."""
    lines = _lines(rows)
    first, *rest = (max(map(len, column)) for column in zip(*lines, strict=True))
    form = "  ".join([f"{{:{first}}}", *(f"{{:>{width}}}" for width in rest)])
    head, *body = (form.format(*line) for line in lines)
    return "\n".join([head, "-" * len(head), *body])


def markdown(rows: Rows) -> str:
    """Formats a table in Markdown."""
    head, *lines = _lines(rows)
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *lines)) + "\n"
