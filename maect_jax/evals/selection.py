"""How many clusters there are.

k-means is run over a grid of numbers on random halves of the images, and judged by four criteria:
the silhouette; the loss, of which the gap statistic (Tibshirani, Walther & Hastie, 2001) is made;
and how well restarts, and the clusters of two halves, agree by the adjusted Rand index. Each
criterion counts as far as it exceeds that of data without clusters. Silhouette and halves decide;
of all four it is read how sure the number is.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from maect_jax import sharding
from maect_jax.evals import kmeans
from maect_jax.evals.assignment import nearest
from maect_jax.evals.features import Rows

CRITERIA = ("silhouette", "gap", "restarts", "halves")
# On labelled sets these two, together, come nearest. The gap of real images grows with the number.
_DECIDE = ("silhouette", "halves")
FEWEST = 40  # images that a number is chosen of
_HALF = 2_000  # images, at most, of each half
_PER_CLUSTER = 10  # images of a half, on average, at least; with few images five
_MOST = 128  # clusters
_COMPONENTS = 128  # principal ones, at most
_SPLITS = 3  # into halves; as many draws of each kind of data without clusters
_RESTARTS = 5
_BETWEEN = 8  # numbers next to the best of the grid, at most, that are tried after it
_STEP = 1.3  # numbers within this factor are not told apart
_HEIGHT = 0.8  # of a runner-up, of the chosen number's score, at least
_CLUSTERED = 0.03  # excess of the silhouette, at least; data without clusters reach half of it


def grid(images: int) -> list[int]:
    """The numbers of clusters that are tried for so many images: all up to 16, then powers of the
    fourth root of 2."""
    most = min(_MOST, max(4, images // 2 // _PER_CLUSTER))
    counts = [*range(2, 16), *(round(2 ** (step / 4)) for step in range(16, 29))]
    return [count for count in counts if count <= most]


def select(x: Rows, *, seed: int, memory_mb: int, mesh) -> dict:
    """Chooses the number of clusters.

    Two kinds of data without clusters are drawn: uniform in the box of the principal components, as
    Tibshirani's, and Gaussian with their variances; of the two the one that looks more like
    clusters counts. What exceeds it, relative to the largest excess, is averaged over the criteria
    that decide. The number with the largest mean is chosen, of the grid and next to its best.

    Args:
      x: features `[N, D]` as k-means sees them, at least `FEWEST`; of many a sample is used.
      seed: of the sample, its halves, the data without clusters, and the restarts.
      memory_mb, mesh: as for `kmeans.kmeans`; all processes call it.

    Returns:
      Plain JSON: what `_chosen` returns, and of how many `images`, `components`, `splits` and
      `restarts` it is.
    """
    half = min(len(x) // 2, _HALF)
    sample = np.random.default_rng(seed).permutation(len(x))[: 2 * half]
    x = _components(x[np.sort(sample)])
    counts = grid(len(x))
    settings = kmeans.Settings(counts[-1], runs=_RESTARTS, seed=seed, memory_mb=memory_mb)
    values = _judged(x, counts, settings, mesh)
    best = int(_score(_excess(values)[0]).argmax())
    beside = [*counts[max(best - 1, 0) : best], *counts[best + 1 : best + 2]]
    between = sorted({*range(min(beside), max(beside))} - {*counts})
    if between := between[:: -(-len(between) // _BETWEEN)] if between else []:
        order = np.argsort(counts + between)
        counts = sorted(counts + between)
        values = np.concatenate([values, _judged(x, between, settings, mesh)], -1)[..., order]
    used = dict(images=len(x), components=x.shape[1], splits=_SPLITS, restarts=_RESTARTS)
    return _chosen(counts, values) | used


def _components(x: np.ndarray) -> np.ndarray:
    """The first principal components of rows `[N, D]`, which keep their distances, `[N, P]`."""
    x = x - x.mean(0, dtype=np.float64).astype(np.float32)
    if x.shape[1] <= len(x):
        axes = np.linalg.eigh(x.T @ x)[1][:, ::-1][:, :_COMPONENTS]
        return np.ascontiguousarray(x @ axes)
    values, axes = np.linalg.eigh(x @ x.T)
    return np.ascontiguousarray((axes * np.sqrt(np.maximum(values, 0)))[:, ::-1][:, :_COMPONENTS])


def _judged(x: np.ndarray, counts: Sequence[int], settings: kmeans.Settings, mesh) -> np.ndarray:
    """The criteria `[3, C, S, K]`: of halves of `x`, and of the two kinds of data without clusters;
    C criteria, S draws, K numbers of clusters."""
    rng = np.random.default_rng([settings.seed, 1])
    shape, low, high = (len(x) // 2, x.shape[1]), x.min(0), x.max(0)
    found = []
    for _ in range(_SPLITS):
        order = rng.permutation(len(x))
        pairs = [
            [x[order[: shape[0]]], x[order[shape[0] : 2 * shape[0]]]],
            [rng.uniform(low, high, shape) for _ in range(2)],
            [rng.normal(0, x.std(0), shape) for _ in range(2)],
        ]
        pairs = [[half.astype(np.float32) for half in pair] for pair in pairs]
        found.append([_of_halves(pair, counts, settings, mesh) for pair in pairs])
    values = np.moveaxis(np.array(found), 0, 2)
    # All choose by those of one: where a host rounds otherwise it could choose another number, and
    # the others would wait for it.
    content = bytes.fromhex(sharding.of_first_host(values.tobytes().hex()))
    return np.frombuffer(content).reshape(values.shape)


def _of_halves(halves, counts: Sequence[int], settings: kmeans.Settings, mesh) -> np.ndarray:
    """The criteria `[C, K]` of the clusters of two halves `[N, P]`; of the gap minus the logarithm
    of the loss, of which it is the excess."""
    from sklearn.metrics import adjusted_rand_score as rand

    all_rows, assigned, found = np.concatenate(halves), [], []
    for half in halves:
        clusterings = kmeans.over(half, counts, settings, mesh).values()
        best = [found.loss.argmin() for found in clusterings]
        pairs = list(zip(clusterings, best, strict=True))
        assigned.append([nearest(all_rows, c.centres[run])[0] for c, run in pairs])
        tiny = np.finfo(np.float32).tiny
        found.append(
            [
                _silhouettes(half, [c.clusters[run] for c, run in pairs]),
                [-np.log(max(c.loss[run], tiny)) for c, run in pairs],
                [np.mean([rand(*two) for two in combinations(c.clusters, 2)]) for c in clusterings],
            ]
        )
    agree = [rand(*two) for two in zip(*assigned, strict=True)]
    return np.array([*np.mean(found, 0), agree])


def _silhouettes(x: np.ndarray, clusterings: Sequence[np.ndarray]) -> list[float]:
    """The mean silhouette of rows `[N, P]` in each of several clusterings int `[N]`, 0 where it is
    not defined; the distances between all rows are computed once."""
    from sklearn.metrics import pairwise_distances, silhouette_score

    distances = pairwise_distances(x)
    return [
        float(silhouette_score(distances, clusters, metric="precomputed"))
        if 1 < len(np.unique(clusters)) < len(x)
        else 0.0
        for clusters in clusterings
    ]


def _excess(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the criteria `[3, C, S, K]` of the data exceed those of data without clusters, and
    the standard deviation of that mean, `[C, K]`."""
    means, squares = values.mean(2), values.var(2, ddof=1) / values.shape[2]
    chosen = means[1:].argmax(0)[None]
    reference, square = (np.take_along_axis(x[1:], chosen, 0)[0] for x in (means, squares))
    return means[0] - reference, np.sqrt(squares[0] + square)


def _score(excess: np.ndarray) -> np.ndarray:
    """The mean of `[C, K]` over the criteria that decide, each relative to its largest; from 0 to
    1, `[K]`."""
    excess = np.maximum(excess[[CRITERIA.index(name) for name in _DECIDE]], 0)
    return (excess / np.maximum(excess.max(1, keepdims=True), 1e-9)).mean(0)


def _near(a: int, b: int) -> bool:
    return max(a, b) <= _STEP * min(a, b) or abs(a - b) <= 1


def _runners_up(counts: Sequence[int], score: np.ndarray, chosen: int) -> list[int]:
    """At most two other peaks that are nearly as high as the chosen number, the higher first."""
    best, padded = score.max(), np.pad(score, 1)
    peaks = (score >= padded[:-2]) & (score >= padded[2:]) & (score > 0) & (score >= _HEIGHT * best)
    found: list[int] = []
    for place in np.argsort(-score, kind="stable"):
        if peaks[place] and not any(_near(counts[place], number) for number in (chosen, *found)):
            found.append(counts[place])
    return found[:2]


def _chosen(counts: Sequence[int], values: np.ndarray) -> dict:
    """The choice among K numbers of clusters by the criteria `[3, C, S, K]`.

    Returns:
      `chosen`; `runners_up`, at most two other peaks that have 80 % of its score, the higher first;
      `sure`, which is clear, fair, weak or none, and in `words` why; `agree`, the criteria that are
      highest near the chosen number; `grid`, the numbers; for each of them the `score` and, by
      criterion, the `value`, its `excess` and the standard `deviation` of that.
    """
    excess, deviation = _excess(values)
    score = _score(excess)
    best = int(score.argmax())
    number = counts[best]
    others = _runners_up(counts, score, number)
    highest = dict(zip(CRITERIA, (counts[place] for place in excess.argmax(1)), strict=True))
    agree = [name for name, count in highest.items() if _near(count, number)]
    are = "is" if len(agree) == 1 else "are"
    reason = f"{len(agree) or 'None'} of the {len(CRITERIA)} criteria {are} highest near it"
    if excess[CRITERIA.index("silhouette"), best] < _CLUSTERED:
        sure, reason = "none", "The images look hardly more like clusters than data without any do"
    elif _near(number, counts[-1]):
        sure, reason = "weak", f"More may fit better: {counts[-1]} is the largest number tried"
    elif len(agree) > 2 and not others:
        sure = "clear"
    else:
        sure = "fair" if len(agree) > 1 else "weak"
    verdict = {
        "clear": f"{number} clusters are clear.",
        "fair": f"{number} clusters are likely.",
        "weak": f"{number} clusters fit best, but not clearly.",
        "none": f"There is no clear number of clusters; {number} is a guess.",
    }[sure]
    shares = [f"{k} ({score[counts.index(k)] / score[best]:.0%} of its score)" for k in others]
    rivals = f" Runners-up: {', '.join(shares)}." if shares else ""
    criteria = zip(CRITERIA, values[0].mean(1), excess, deviation, strict=True)
    return {
        "chosen": number,
        "runners_up": others,
        "sure": sure,
        "words": f"{verdict} {reason}.{rivals}",
        "agree": agree,
        "grid": list(counts),
        "score": score.tolist(),
        "criteria": {
            name: {"value": value.tolist(), "excess": above.tolist(), "deviation": sd.tolist()}
            for name, value, above, sd in criteria
        },
    }
