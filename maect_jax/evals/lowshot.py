"""Low-shot classification: logistic regression on the features of a few labelled images.

The protocol is that of MSN (Assran et al., 2022) as the paper uses it: features of centre crops,
centred per image and L2-normalised, no bias, a penalty of 0.00025 over the number of images.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax import sharding
from maect_jax.data import subsets
from maect_jax.evals import features, logistic
from maect_jax.evals.features import Features

DRAWN = "seeded, stratified, nested"


@jax.jit
def _hits(weights, x, labels):
    guesses = jnp.einsum("nd,pdc->pnc", x, weights, precision="highest").argmax(-1)
    return (guesses == labels).sum(1)


def _accuracies(train: Features, records: np.ndarray, test: Features, decays, mesh) -> dict:
    """Of a regression on some training images, for each of P penalties: the test accuracy, the
    norm of the gradient that was reached, and the steps, `[P]`."""
    x, labels = logistic.prepare(train.x[records]), train.labels[records]
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    found = logistic.fit(x, labels, np.asarray(decays) / len(records), classes, mesh)
    hits = 0
    for x, truths in features.parts(test, mesh, logistic.prepare):
        hits = hits + _hits(found.weights, x, truths)
    hits, norm, steps = sharding.to_host((hits, found.gradient_norm, found.steps))
    return {"accuracy": hits / len(test.labels), "gradient_norm": norm, "steps": steps}


def _entry(splits: Sequence[dict], decays: Sequence[float]) -> dict:
    """Mean and (unbiased) deviation over splits, of each penalty; the first's are named."""
    several = []
    for place, decay in enumerate(decays):
        accuracies = [float(split["accuracy"][place]) for split in splits]
        several.append(
            {
                "weight_decay": decay,
                "accuracy": float(np.mean(accuracies)),
                "deviation": float(np.std(accuracies, ddof=1)) if len(splits) > 1 else None,
                "accuracies": accuracies,
                "gradient_norm": float(max(split["gradient_norm"][place] for split in splits)),
                "steps": int(max(split["steps"][place] for split in splits)),
            }
        )
    return {"splits": len(splits), **several[0], "weight_decays": several}


def _size(labels: np.ndarray, part: np.ndarray) -> dict:
    """What a list of images is: so many of each class, or a share of all."""
    counts = np.bincount(labels[part], minlength=labels.max() + 1)
    if counts.min() == counts.max():
        return {"images_per_class": int(counts[0])}
    return {"share": float(f"{len(part) / len(labels):.1g}")}


def lowshot(
    train: Features,
    test: Features,
    names: Callable[[], Sequence[str]],
    mesh,
    images: Sequence[int],
    shares: Sequence[float],
    splits: int,
    lists: Sequence[str],
    weight_decays: Sequence[float],
    seed: int,
) -> list[dict]:
    """Test accuracies of logistic regressions on parts of the training images.

    Args:
      train, test: features with labels.
      names: gives the names of all images of the training split, by record number; asked where
        there are lists.
      mesh: the device mesh, which must be the current one.
      images: numbers of images a class; over so many splits. Drawn at random, nested.
      shares: of all images; of one split each.
      splits: how many.
      lists: paths of text files with names of images, which take the place of the former. Files of
        one name, in various folders, are the splits of one entry.
      weight_decays: penalties times the number of images; the accuracies of the first are named.
      seed: of the first split.

    Returns:
      A dict for each number, share or list: `accuracy` (0 to 1), its `deviation`, and how they
      were found.

    Raises:
      UserError: a list that cannot be read, or names what is not there.
    """
    counts = np.unique(train.labels, return_counts=True)[1]

    def tested(parts: Sequence[np.ndarray]) -> dict:
        found = [_accuracies(train, part, test, weight_decays, mesh) for part in parts]
        return {"images": len(parts[0]), **_entry(found, weight_decays)}

    if lists:
        # Records of the split; features are of those that could be read.
        place = {record: i for i, record in enumerate(train.index.tolist())}
        known, by_name = names(), {}
        for path in lists:
            by_name.setdefault(Path(path).name, []).append(path)
        entries = []
        for name, paths in by_name.items():
            records = [subsets.from_list(path, known).tolist() for path in paths]
            parts = [np.array([place[r] for r in part if r in place]) for part in records]
            size = _size(train.labels, parts[0])
            entries.append({"list": name, **size, "drawn": list(paths), **tested(parts)})
        return entries
    entries = []
    for number in images:
        entry = {"images_per_class": number, "drawn": DRAWN}
        if number > counts.min():
            reason = f"a class has only {counts.min()} images"
            entries.append({**entry, "skipped": reason})
            continue
        parts = [subsets.per_class(train.labels, number, seed + split) for split in range(splits)]
        entries.append({**entry, **tested(parts)})
    for fraction in shares:
        part = subsets.fraction_of(train.labels, fraction, seed)
        entries.append({"share": fraction, "drawn": DRAWN, **tested([part])})
    return entries
