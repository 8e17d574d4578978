"""Maps of features in two dimensions."""

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import normalize

NAMES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
_SAME = 1e-6  # features that differ by less, in every dimension


def points(x: np.ndarray, how: str) -> np.ndarray:
    """Places `[N, 2]` of features `[N, D]`, which are L2-normalised first, as k-means sees them.

    `how` is one of `NAMES`; "umap" wants the extra [umap]. Features that are all the same have one
    place.
    """
    x = normalize(x)
    if len(x) < 4 or np.ptp(x, axis=0).max() < _SAME:
        return np.zeros((len(x), 2))
    if how == "pca":
        return PCA(2, svd_solver="full").fit_transform(x)
    if how == "tsne":
        perplexity = min(30.0, len(x) / 4)
        return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(x)
    import umap  # an extra, which takes seconds to import

    # One thread, which a fixed seed asks for anyway.
    neighbours = min(15, len(x) - 1)
    return umap.UMAP(n_neighbors=neighbours, random_state=0, n_jobs=1).fit_transform(x)
