"""The hierarchy of clusters: many small ones, read as few."""

import numpy as np


def merges(centres: np.ndarray) -> np.ndarray:
    """SciPy's linkage of centres `[K, P]` by Ward's method, fp64 `[K - 1, 4]`."""
    from scipy.cluster.hierarchy import linkage

    if len(centres) < 2:
        return np.zeros((0, 4))
    return linkage(centres.astype(np.float64), "ward")


def groups(merges: np.ndarray, count: int) -> np.ndarray:
    """The group of each of K clusters that `merges` joins until `count` groups are left (no more
    than there are clusters), numbered by the first cluster of each, int32 `[K]`."""
    clusters = len(merges) + 1
    joined = np.arange(clusters)
    for step, pair in enumerate(merges[: max(clusters - count, 0), :2]):
        joined[np.isin(joined, pair)] = clusters + step
    _, first, group = np.unique(joined, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[group].astype(np.int32)
