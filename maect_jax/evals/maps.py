"""Two-dimensional maps of features."""

import numpy as np

NAMES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
_EQUAL = 1e-6  # features that differ by less in every dimension are the same


def points(x: np.ndarray, how: str) -> np.ndarray:
    """Maps features `[N, D]`, L2-normalised as for k-means, to points `[N, 2]`.

    `how` is one of `NAMES`; "umap" needs the extra [umap]. Features that are all the same become
    one point.
    """
    from sklearn import decomposition, manifold, preprocessing  # takes a second

    x = preprocessing.normalize(x)
    if len(x) < 4 or np.ptp(x, axis=0).max() < _EQUAL:
        return np.zeros((len(x), 2))
    if how == "pca":
        return decomposition.PCA(2, svd_solver="full").fit_transform(x)
    if how == "tsne":
        perplexity = min(30.0, len(x) / 4)
        tsne = manifold.TSNE(init="pca", perplexity=perplexity, random_state=0)
        return tsne.fit_transform(x)
    import umap  # an extra, which takes seconds to import

    # A fixed seed allows one thread only, and without n_jobs=1 umap warns of that.
    neighbours = min(15, len(x) - 1)
    return umap.UMAP(n_neighbors=neighbours, random_state=0, n_jobs=1).fit_transform(x)
