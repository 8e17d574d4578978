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
    from scipy.cluster.hierarchy import cut_tree

    if len(merges) < count:
        return np.arange(len(merges) + 1, dtype=np.int32)
    return cut_tree(merges, count)[:, 0].astype(np.int32)
