"""k-means on frozen features, judged against the labels where there are any."""

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import PCA
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.metrics.cluster import contingency_matrix
from sklearn.preprocessing import normalize

from maect_jax.evals import kmeans

METRICS = ("acc", "nmi", "ami", "ari")
_PART = 65_536  # images at a time whose distances are measured
_SILHOUETTE = 10_000  # images, drawn at random where there are more: it compares each with all

# Well-known parts of ImageNet-1k, by WordNet id.
SUBSETS = {
    "imagenet_dogs15": (
        "n02085936", "n02086646", "n02088238", "n02091467", "n02097130", "n02099601", "n02101388",
        "n02101556", "n02102177", "n02105056", "n02105412", "n02105855", "n02107142", "n02110958",
        "n02112137",
    ),
    "imagenet10": (
        "n02056570", "n02085936", "n02128757", "n02690373", "n02692877", "n03095699", "n04254680",
        "n04285008", "n04467665", "n07747607",
    ),
}  # fmt: skip


def _matching(labels: np.ndarray, clusters: np.ndarray):
    """The contingency table, and the classes and clusters (rows, columns) that belong together."""
    counts = contingency_matrix(labels, clusters)
    return counts, *linear_sum_assignment(-counts)


def matched(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The clusters, renumbered by the class (in order) that each is matched with; those that no
    class is left for come after the classes."""
    counts, classes, columns = _matching(labels, clusters)
    number = np.full(counts.shape[1], -1)
    number[columns] = classes
    left = np.flatnonzero(number < 0)
    number[left] = len(counts) + np.arange(len(left))
    return number[np.unique(clusters, return_inverse=True)[1]].astype(np.int32)


def matched_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Accuracy under the best one-to-one matching of clusters and classes."""
    counts, *pairs = _matching(labels, clusters)
    return counts[tuple(pairs)].sum() / len(labels)


def agreement(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """ACC, NMI (arithmetic), AMI and ARI of a clustering, each at most 1."""
    scores = (matched_accuracy, normalized_mutual_info_score, adjusted_mutual_info_score)
    values = [score(labels, clusters) for score in (*scores, adjusted_rand_score)]
    return {name: float(value) for name, value in zip(METRICS, values, strict=True)}


def silhouette(x: np.ndarray, clusters: np.ndarray, seed: int) -> dict:
    """The silhouette, and of how many images, drawn at random where there are many; nothing where
    it is not defined."""
    if len(x) > _SILHOUETTE:
        drawn = np.random.default_rng(seed).choice(len(x), _SILHOUETTE, replace=False)
        x, clusters = x[drawn], clusters[drawn]
    if not 1 < len(np.unique(clusters)) < len(x):
        return {}
    return {"silhouette": float(silhouette_score(x, clusters)), "silhouette_images": len(x)}


def prepare(x: np.ndarray, normalise: bool, pca: int) -> np.ndarray:
    """Features `[N, D]` as k-means sees them: L2-normalised, then their first `pca` principal
    components (0: all dimensions as they are)."""
    x = normalize(x) if normalise else np.asarray(x)
    return PCA(pca, svd_solver="covariance_eigh").fit_transform(x) if pca else x


def cluster(
    features: np.ndarray,
    labels: np.ndarray | None,
    clusters: int,
    mesh,
    memory_mb: int,
    runs: int = 100,
    normalise: bool = True,
    pca: int = 0,
    minibatch: int = 0,
    seed: int = 0,
) -> tuple[dict, np.ndarray, np.ndarray]:
    """k-means in many seeded runs.

    Args:
      features: `[N, D]`.
      labels: int `[N]`, used only to judge the clusters; `None` where there are none.
      clusters: how many; 0 for as many as there are classes.
      mesh, memory_mb: as `kmeans.kmeans` takes them.
      runs: each k-means++ initialised.
      normalise, pca: as `prepare` takes them.
      minibatch: rows of a mini-batch; 0 for Lloyd's algorithm.
      seed: of all runs.

    Returns:
      The settings; `best`, the metrics of the run with the lowest k-means loss, with its
      silhouette; `mean` and (of all runs, so not unbiased) `deviation`. The clusters of that best
      run, int32 `[N]`, numbered so that cluster i is the one matched with the i-th class; and each
      image's distance from its centre, fp32 `[N]`.
    """
    x = prepare(features, normalise, pca)
    count = clusters or len(np.unique(labels))
    found = kmeans.kmeans(x, count, runs, seed, mesh, memory_mb, minibatch)
    best = int(found.loss.argmin())
    own = found.clusters[best]
    distance = np.empty(len(x), np.float32)
    for start in range(0, len(x), _PART):
        part = slice(start, start + _PART)
        distance[part] = np.linalg.norm(x[part] - found.centres[best][own[part]], axis=1)
    rows = [{"loss": float(loss)} for loss in found.loss]
    if labels is not None:
        rows = [agreement(labels, c) | row for c, row in zip(found.clusters, rows, strict=True)]
        own = matched(labels, own)
    names = list(rows[0])
    values = np.array([[row[name] for name in names] for row in rows])
    results = {
        "clusters": count,
        "images": len(x),
        "runs": runs,
        "l2_normalised": normalise,
        "pca": pca,
        "minibatch": minibatch,
        "best": {**rows[best], **silhouette(x, own, seed), "chosen_by": "k-means loss"},
        "mean": dict(zip(names, values.mean(0).tolist(), strict=True)),
        "deviation": dict(zip(names, values.std(0).tolist(), strict=True)),
    }
    return results, own, distance
