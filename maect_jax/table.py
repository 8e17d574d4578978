"""The results in one table: of a run, or of several runs as mean +- deviation."""

from collections.abc import Callable

import numpy as np

from maect_jax.errors import UserError

COLUMNS = ("k-NN", "linear probe", "k-means ACC", "mean of runs", "NMI", "ARI")
_K = 10


def neighbours(result: dict) -> dict:
    """The entry of a row's k-NN results that is shown: that of 10 neighbours, else the first."""
    return next((r for r in result["knn"] if r["k"] == _K), result["knn"][0])


def _shares(result: dict) -> tuple[float, ...]:
    """One row of `results.json` as the shares that `COLUMNS` name."""
    best, mean = result["cluster"]["best"], result["cluster"]["mean"]
    probe = result["probe"]["best_last_epoch"]
    return neighbours(result)["accuracy"], probe, best["acc"], mean["acc"], best["nmi"], best["ari"]


def percentages(results: dict) -> dict[str, np.ndarray]:
    """The rows of the table, in percent `[len(COLUMNS)]`; where MAE and CT are both there, a row
    of what tuning has changed as well."""
    rows = {name: 100 * np.array(_shares(result)) for name, result in results.items()}
    if {"mae", "ct"} <= set(rows):
        rows["ct - mae"] = rows["ct"] - rows["mae"]
    return rows


def is_difference(row: str) -> bool:
    """Whether a row is one of differences, which are written with their sign."""
    return " - " in row


def cells(results: dict) -> dict[str, list[str]]:
    """The table of one run, as text."""

    def written(name: str) -> Callable[[float], str]:
        return "{:+.1f}".format if is_difference(name) else "{:.1f}".format

    return {name: list(map(written(name), row)) for name, row in percentages(results).items()}


def cells_of_several(runs: dict[str, dict]) -> dict[str, list[str]]:
    """The table of several runs: mean and unbiased deviation, as text.

    Args:
      runs: the results of each, by its name.

    Raises:
      UserError: they do not have the same rows.
    """
    tables = [percentages(results) for results in runs.values()]
    for name, rows in zip(runs, tables, strict=True):
        if list(rows) != list(tables[0]) or not rows:
            have = {run: ", ".join(results) or "nothing" for run, results in runs.items()}
            raise UserError(
                f"{name!r} cannot be averaged with the other runs: evaluated are {have}"
            )
    several = {}
    for name in tables[0]:
        values = np.stack([table[name] for table in tables])
        form = "{:+.1f} +- {:.1f}" if is_difference(name) else "{:.1f} +- {:.1f}"
        pairs = zip(values.mean(0), values.std(0, ddof=1), strict=True)
        several[name] = [form.format(*pair) for pair in pairs]
    return several


def text(rows: dict[str, list[str]]) -> str:
    """A table as aligned lines."""
    lines = [("", *COLUMNS), *((name, *row) for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *rest = widths
    lines = [
        "  ".join((name.ljust(first), *(c.rjust(w) for c, w in zip(row, rest, strict=True))))
        for name, *row in lines
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
