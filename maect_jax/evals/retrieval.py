"""The nearest training images of some images, for the report."""

import numpy as np

from maect_jax.evals import knn
from maect_jax.evals.base import Protocol, Result, Row

_QUERIES, _NEIGHBOURS = 8, 5


class Retrieval(Protocol):
    """No metrics, but `index` int32 `[Q]`, the record numbers of some images, and `neighbours`
    `[Q, k]`, those of the nearest training images.

    The images are held out, or else training images, which are not their own neighbours.
    """

    name = "retrieval"
    needs_labels = False
    arrays = ("index", "neighbours")

    def run(self, row: Row) -> Result:
        train = row.features["train"]
        test = row.features.get("val", train)
        queries = np.unique(np.linspace(0, len(test.x) - 1, _QUERIES).astype(int))
        k = min(_NEIGHBOURS + 1, len(train.x))
        search = knn.Search(row.run.mesh, row.config.eval.memory_mb)
        _, nearest = search.nearest(train.x, test.x[queries], k)
        itself = np.where("val" in row.features, -1, queries)[:, None]
        # The sort is stable: all but the image itself move up.
        order = np.argsort(nearest == itself, axis=1, kind="stable")[:, :_NEIGHBOURS]
        neighbours = train.index[np.take_along_axis(nearest, order, 1)]
        return Result({}, {"index": test.index[queries], "neighbours": neighbours})
