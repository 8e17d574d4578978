"""The hierarchy of clusters: many small ones, read as few."""

import numpy as np


def merges(centres: np.ndarray) -> np.ndarray:
    """SciPy's linkage of centres `[K, P]` by Ward's method, fp64 `[K - 1, 4]`."""
    from scipy.cluster.hierarchy import linkage

    if len(centres) < 2:
        return np.zeros((0, 4))
    return linkage(centres.astype(np.float64), "ward")


def groups(merges: np.ndarray, clusters: int, count: int) -> np.ndarray:
    """The group of each of K clusters that `merges` joins until `count` groups are left (no more
    than there are clusters), numbered by the first cluster of each, int32 `[K]`."""
    members = {cluster: [cluster] for cluster in range(clusters)}
    for step, (a, b) in enumerate(merges[: max(clusters - count, 0), :2].astype(int).tolist()):
        members[clusters + step] = members.pop(a) + members.pop(b)
    found = np.empty(clusters, np.int32)
    for number, group in enumerate(sorted(members.values(), key=min)):
        found[group] = number
    return found
