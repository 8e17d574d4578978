"""k-means on frozen features, judged against the labels."""

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
)
from sklearn.metrics.cluster import contingency_matrix
from sklearn.preprocessing import normalize

METRICS = ("acc", "nmi", "ami", "ari")


def matched(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The clusters, renumbered by the class (in order) that each is matched with."""
    counts = contingency_matrix(labels, clusters)
    classes, columns = linear_sum_assignment(-counts)
    number = np.empty(counts.shape[1], np.int32)
    number[columns] = classes
    return number[np.unique(clusters, return_inverse=True)[1]]


def matched_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Accuracy under the best one-to-one matching of clusters and classes."""
    counts = contingency_matrix(labels, clusters)
    return counts[linear_sum_assignment(-counts)].sum() / len(labels)


def agreement(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """ACC, NMI (arithmetic), AMI and ARI of a clustering, each at most 1."""
    scores = (matched_accuracy, normalized_mutual_info_score, adjusted_mutual_info_score)
    values = [score(labels, clusters) for score in (*scores, adjusted_rand_score)]
    return {name: float(value) for name, value in zip(METRICS, values, strict=True)}


def cluster(
    features: np.ndarray, labels: np.ndarray, runs: int = 100, normalise: bool = True, seed: int = 0
) -> tuple[dict, np.ndarray]:
    """k-means with as many clusters as there are classes, in many seeded runs.

    Args:
      features: `[N, D]`.
      labels: int `[N]`; used only to judge the clusters.
      runs: each k-means++ initialised.
      normalise: whether features are L2-normalised first.
      seed: of the first run; the others count up.

    Returns:
      The settings; `best`, the metrics of the run with the lowest k-means loss; `mean` and
      `deviation` over all runs. And the clusters of that best run, int32 `[N]`, numbered so that
      cluster i is the one matched with the i-th class.
    """
    x = normalize(features) if normalise else features
    classes = len(np.unique(labels))
    fits = [
        KMeans(classes, init="k-means++", n_init=1, random_state=seed + run).fit(x)
        for run in range(runs)
    ]
    scores = [agreement(labels, fit.labels_) for fit in fits]
    table = np.array([[score[name] for name in METRICS] for score in scores])
    best = int(np.argmin([fit.inertia_ for fit in fits]))

    def named(row):
        return {name: float(value) for name, value in zip(METRICS, row, strict=True)}

    results = {
        "clusters": classes,
        "runs": runs,
        "l2_normalised": normalise,
        "best": {**scores[best], "loss": float(fits[best].inertia_), "chosen_by": "k-means loss"},
        "mean": named(table.mean(0)),
        "deviation": named(table.std(0)),
    }
    return results, matched(labels, fits[best].labels_)
