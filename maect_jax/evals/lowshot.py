"""Low-shot classification: logistic regression on the features of a few labelled images.

The protocol is that of MSN (Assran et al., 2022) as the paper uses it: features of centre crops,
centred per image and L2-normalised, no bias, a penalty of 0.00025 over the number of images.
The optimiser is L-BFGS (Liu & Nocedal, 1989) with a zoom line search, to the optimum.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maect_jax import sharding
from maect_jax.config import Rule, numbers_above_0, positive
from maect_jax.data import subsets
from maect_jax.evals import features
from maect_jax.evals.base import Protocol, Result, Row

_DRAWN = "seeded, stratified, nested"
_MULTIPLE = 256  # the rows of a device are padded to one, so that small parts share a program
_MEMORY = 20  # pairs of steps and gradients
_STEPS = 1000  # at most
# It ends where the objective is surely within this fraction of its optimum: a convex function whose
# curvature is at least the penalty is above its minimum by at most |gradient|^2 / (2 penalty);
_GAP = 1e-4
_SMALL = 1e-6  # or where the gradient, relative to the first one, is at rounding level


class Fit(NamedTuple):
    """The optimum for each of P penalties."""

    weights: jax.Array  # fp32 [P, D, C]
    objective: jax.Array  # [P]
    gradient_norm: jax.Array  # [P]
    steps: jax.Array  # [P]


def prepare(x: np.ndarray) -> np.ndarray:
    """Centres each row of `[N, D]` on its own mean, then L2-normalises it."""
    x = x - x.mean(1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnames="classes")
def _solve(x, labels, penalties, *, classes: int) -> Fit:
    known = labels >= 0  # the others are padding
    count = known.sum()

    def objective(weights, penalty):
        logits = jnp.einsum("nd,dc->nc", x, weights, precision="highest")
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return (loss * known).sum() / count + penalty / 2 * jnp.square(weights).sum()

    def fit_one(penalty):
        value_fn = partial(objective, penalty=penalty)
        optimiser = optax.lbfgs(memory_size=_MEMORY)
        value_and_grad = optax.value_and_grad_from_state(value_fn)

        def goes_on(carry):
            _, _, steps, value, norm = carry
            far = norm**2 / (2 * penalty) > _GAP * value
            return far & (norm > _SMALL * first) & (steps < _STEPS)

        def step(carry):
            weights, state, steps, _, _ = carry
            value, grad = value_and_grad(weights, state=state)
            updates, state = optimiser.update(
                grad, state, weights, value=value, grad=grad, value_fn=value_fn
            )
            # Of the new weights: the line search has computed them.
            value, grad = (optax.tree.get(state, key) for key in ("value", "grad"))
            weights = optax.apply_updates(weights, updates)
            return weights, state, steps + 1, value, jnp.linalg.norm(grad)

        zero = jnp.zeros((x.shape[1], classes))
        value, grad = jax.value_and_grad(value_fn)(zero)
        first = jnp.linalg.norm(grad)
        start = zero, optimiser.init(zero), jnp.int32(0), value, first
        weights, _, steps, _, _ = jax.lax.while_loop(goes_on, step, start)
        value, grad = jax.value_and_grad(value_fn)(weights)
        return Fit(weights, value, jnp.linalg.norm(grad), steps)

    return jax.vmap(fit_one)(penalties)


def fit(x: np.ndarray, labels: np.ndarray, penalties: np.ndarray, classes: int, mesh) -> Fit:
    """Minimises `mean cross entropy + penalty / 2 * |W|^2` for penalties `[P]` side by side, of
    rows `[N, D]`, as `prepare` returns them, and labels int `[N]`. `mesh` must be the current one.
    """
    padding = -len(x) % (mesh.size * _MULTIPLE)
    x = np.pad(np.float32(x), ((0, padding), (0, 0)))
    labels = np.pad(np.int32(labels), (0, padding), constant_values=-1)
    rows = (sharding.put_rows(array, mesh) for array in (x, labels))
    return _solve(*rows, sharding.replicate(np.float32(penalties), mesh), classes=classes)


@jax.jit
def _hits(weights, x, labels):
    guesses = jnp.einsum("nd,pdc->pnc", x, weights, precision="highest").argmax(-1)
    return (guesses == labels).sum(1)


def size_of(labels: np.ndarray, part: np.ndarray) -> dict:
    """Describes a list of images: a number of each class, or a fraction of all."""
    counts = np.bincount(labels[part], minlength=labels.max() + 1)
    if counts.min() == counts.max():
        return {"images_per_class": int(counts[0])}
    return {"share": float(f"{len(part) / len(labels):.1g}")}


class LowShot(Protocol):
    """Test accuracies of logistic regressions on parts of the training images.

    An entry for each number of images a class (nested random draws, several splits), each fraction
    of all images (one split), or, in place of both, each list of names. Lists with one file name in
    several folders are the splits of one entry.
    """

    name = section = "lowshot"
    rules: ClassVar = {
        "splits": positive,
        "weight_decays": numbers_above_0,
        "images": Rule("numbers above 0", lambda v, _: all(n > 0 for n in v)),
        "shares": Rule("from above 0 to 1", lambda v, _: all(0 < s <= 1 for s in v)),
        "lists": Rule(
            "paths of text files that exist",
            lambda v, _: all(isinstance(path, str) and os.path.isfile(path) for path in v),
        ),
    }

    def settings(self, config) -> dict:
        lists = [Path(path) for path in config.eval.lowshot.lists]
        texts = [
            path.read_text("utf-8", "surrogateescape") if path.is_file() else "" for path in lists
        ]
        return super().settings(config) | {"texts": texts}

    def check_training_images(self, config, images) -> None:
        if config.eval.lowshot.lists and not images.reads_labels:  # or names are read as well
            names = [images.name(record) for record in range(len(images))]
            for path in config.eval.lowshot.lists:
                subsets.from_list(path, names)

    def run(self, row: Row) -> Result:
        """Raises `UserError` if a list cannot be read or names an unknown image."""
        entries = self._of_lists(row) if row.config.eval.lowshot.lists else self._of_draws(row)
        return Result(list(entries))

    def _of_lists(self, row: Row) -> Iterator[dict]:
        train, images = row.features["train"], row.images["train"]
        by_name: dict[str, list[str]] = {}
        names = [images.name(record) for record in range(len(images))]
        # Lists name all images, features are those of the readable ones.
        positions = {record: i for i, record in enumerate(train.records.tolist())}
        for path in row.config.eval.lowshot.lists:
            by_name.setdefault(Path(path).name, []).append(path)
        for name, paths in by_name.items():
            records = [subsets.from_list(path, names).tolist() for path in paths]
            parts = [np.array([positions[r] for r in part if r in positions]) for part in records]
            size = size_of(train.labels, parts[0])
            yield {"list": name, **size, "drawn": list(paths), **self._measured(row, parts)}

    def _of_draws(self, row: Row) -> Iterator[dict]:
        section, seed = row.config.eval.lowshot, row.config.seed
        labels = row.features["train"].labels
        fewest = np.unique(labels, return_counts=True)[1].min()
        for number in section.images:
            entry = {"images_per_class": number, "drawn": _DRAWN}
            seeds = range(seed, seed + section.splits)
            if number > fewest:
                yield entry | {"skipped": f"a class has only {fewest} images"}
            else:
                parts = [subsets.per_class(labels, number, split) for split in seeds]
                yield entry | self._measured(row, parts)
        for fraction in section.shares:
            part = subsets.fraction_of(labels, fraction, seed)
            yield {"share": fraction, "drawn": _DRAWN, **self._measured(row, [part])}

    def _measured(self, row: Row, parts: Sequence[np.ndarray]) -> dict:
        """Mean and unbiased standard deviation over parts of the training images, one for each
        split, for each penalty; those of the first penalty come first."""
        train, test, mesh = row.features["train"], row.features["val"], row.run.mesh
        decays, splits = row.config.eval.lowshot.weight_decays, []
        for part in parts:
            x, labels, penalties = prepare(train.x[part]), train.labels[part], np.array(decays)
            fitted = fit(x, labels, penalties / len(part), classes=row.classes, mesh=mesh)
            hits = sum(_hits(fitted.weights, *rows) for rows in features.parts(test, mesh, prepare))
            splits.append(sharding.to_host((hits, fitted.gradient_norm, fitted.steps)))
        hits, norms, steps = np.stack(splits, axis=-1)
        accuracies = hits / len(test.labels)
        entries = [
            {
                "weight_decay": decay,
                "accuracy": float(accuracies[i].mean()),
                "deviation": float(accuracies[i].std(ddof=1)) if len(parts) > 1 else None,
                "accuracies": accuracies[i].tolist(),
                "gradient_norm": float(norms[i].max()),
                "steps": int(steps[i].max()),
            }
            for i, decay in enumerate(decays)
        ]
        sizes = {"images": len(parts[0]), "splits": len(parts)}
        return sizes | entries[0] | {"weight_decays": entries}
