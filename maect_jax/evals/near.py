"""What to look at among the images: the nearest of each, duplicates, and outliers."""

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np

from maect_jax import files
from maect_jax.data.base import THREADS
from maect_jax.data.sources import Source
from maect_jax.evals import duplicates, features, knn
from maect_jax.evals.base import Protocol, Result, Row
from maect_jax.evals.cluster import Cluster, cluster_split
from maect_jax.evals.features import Prepared

_LOGGER = logging.getLogger(__name__)
_NEIGHBOURS = 10
_ALL = 2**16  # images that are all compared with each other; of more, each with a sample
_SAMPLE = 2**14
_FEW = 1  # neighbours in a sample, which has few images of a small cluster
_READ = 1024  # images whose distances from others are measured at a time
_NARROWEST = 1e-3  # of the widest component's variance, which narrower ones count as, too
_FENCE = 3  # interquartile ranges above the upper quartile
_DUPLICATES = ("image", "duplicate", "cosine", "same_content")  # columns
_OUTLIERS = ("image", "cluster", "score")
_EQUAL = 1e-6  # features that differ by less in every dimension are the same


def centred(x: np.ndarray) -> Prepared:
    """Features `[N, D]` minus their mean, of length 1."""
    mean = features.mean(x).astype(np.float32)

    def prepare(rows):
        rows = np.asarray(rows, np.float32) - mean
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    return Prepared(x, prepare, x.shape[1])


def nearest(search: knn.Search, x: Prepared, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the nearest of features `[N, D]` that are `centred` to each, and scores how far from
    these it is. If there are too many to compare all, they are compared with a sample, which `seed`
    draws. Returns row numbers int32 `[N, 10]`, the nearest first, -1 where there are fewer; and the
    scores fp32 `[N]`."""
    bank: features.Rows = x
    numbers, scored = np.arange(len(x)), _NEIGHBOURS
    if len(x) > _ALL:
        scored = _FEW
        numbers = np.sort(np.random.default_rng(seed).choice(len(x), _SAMPLE, replace=False))
        bank = x[numbers]
    _, places = search.nearest(bank, x, min(_NEIGHBOURS + 1, len(bank)))
    itself = numbers[places] == np.arange(len(x))[:, None]
    order = np.argsort(itself, axis=1, kind="stable")[:, :-1]  # the others, or all but the last
    others = np.take_along_axis(places, order, 1)
    found = np.full((len(x), _NEIGHBOURS), -1, np.int32)
    found[:, : others.shape[1]] = numbers[others]
    return found, _scores(x.x, numbers, others[:, :scored])


def _scores(x: np.ndarray, bank: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The distance of features `[N, D]` from the farthest of some others, fp32 `[N]`, where all
    principal components are as wide: what is rare may be so in a narrow one. The others are places
    `[N, k]` in the bank, row numbers `[M]`."""
    far = np.zeros(len(x), np.float32)
    if not others.size:
        return far
    mean, variance, axes = features.principal(x[bank[:: -(-len(bank) // _SAMPLE)]])
    widths = np.sqrt(variance.clip(0) + _NARROWEST * variance[0])
    scaled, mean = (axes.T / widths).astype(np.float32), mean.astype(np.float32)
    places = (x[bank] - mean) @ scaled
    for start in range(0, len(x), _READ):
        part = slice(start, start + _READ)
        apart = ((x[part] - mean) @ scaled)[:, None] - places[others[part]]
        far[part] = np.linalg.norm(apart, axis=2).max(1)
    return far


def outliers(far: np.ndarray) -> np.ndarray:
    """Which of the scores `[N]` are far above the others, bool `[N]`; of images with many copies it
    is 0, which says nothing of the others."""
    if not far.any():
        return np.zeros(len(far), bool)
    low, high = np.quantile(far[far > 0], (0.25, 0.75))
    return far > high + _FENCE * (high - low)


class Near(Protocol):
    """The nearest images, the outliers and the duplicates among the images that are clustered, by
    the features of the main row.

    Its arrays are of each image `index`, `neighbours` int32 `[N, 10]` (record numbers, the nearest
    first, by the cosine of features minus their mean; of very many images those of a sample; -1
    where there are fewer), `far` fp32 `[N]` (a distance from these, or of a sample's) and `outlier`
    bool `[N]`; of the duplicates `pairs` int32 `[P, 2]` (record numbers), `cosine` fp32 `[P]` and
    `same` bool `[P]` (whether their files, or pixels, are the same): these first, then by the
    cosine.
    """

    name = "near"
    of_main_row = True
    needs_labels = False
    arrays = ("index", "neighbours", "far", "outlier")

    def settings(self, config) -> dict:
        section = config.eval.cluster
        own = {"split": section.split, "duplicates": section.duplicates}
        return {"seed": config.seed, "texts": [], self.name: own}

    def run(self, row: Row) -> Result:
        section, split = row.config.eval.cluster, cluster_split(row.config, row.images)
        x, _, index = row.features[split]
        neighbours, far = np.full((len(x), _NEIGHBOURS), -1, np.int32), np.zeros(len(x), np.float32)
        found = duplicates.Pairs(np.zeros((0, 2), np.int32), np.zeros(0, np.float32))
        if all(np.abs(part - x[0]).max() < _EQUAL for part in features.in_parts(x)):
            self._warn(row, "all images have the same features: none is an outlier or a duplicate")
        else:
            rows, memory_mb = centred(x), row.config.eval.memory_mb
            neighbours, far = nearest(knn.Search(row.run.mesh, memory_mb), rows, row.config.seed)
            if section.duplicates:
                settings = dict(memory_mb=memory_mb, seed=row.config.seed)
                found = duplicates.find(rows, section.duplicates, **settings)
                self._explain(row, found, len(x))
        pairs = index[found.rows]
        same = _same_content(row.images[split], pairs)
        order = np.lexsort((-found.cosine, ~same))
        outlier = outliers(far)
        metrics = {
            "split": split,
            "images": len(x),
            "outliers": int(outlier.sum()),
            "duplicates": len(pairs),
            "of_same_content": int(same.sum()),
            "images_with_10": found.full,  # duplicates or more: the nearest are listed
        }
        neighbours = np.where(neighbours < 0, -1, index[neighbours])
        arrays = dict(index=index, neighbours=neighbours, far=far, outlier=outlier)
        of_pairs = dict(pairs=pairs, cosine=found.cosine, same=same)
        return Result(metrics, arrays | {key: x[order] for key, x in of_pairs.items()})

    def _explain(self, row: Row, found: duplicates.Pairs, count: int) -> None:
        """Says where so many images are alike that the list says little."""
        key = f"config.eval.cluster.duplicates={row.config.eval.cluster.duplicates:g}"
        if 2 * found.full > count:
            self._warn(
                row,
                f"{key}: {found.full} of {count} images have {duplicates.MOST} duplicates or more, "
                f"of which the {duplicates.MOST} nearest are listed; set it higher",
            )
        if found.compared < 1:
            self._warn(
                row,
                f"{key}: too many images are alike; of {1 - found.compared:.0%} of them the "
                "duplicates are not all listed; set it higher",
            )

    def _warn(self, row: Row, text: str) -> None:
        if jax.process_index() == 0:
            _LOGGER.warning("%s: %s: %s", row.name, self.name, text)

    def summarise(self, run, rows, images) -> None:
        """Lists duplicates, and outliers, the farthest first."""
        name = images[cluster_split(run.config, images)].name
        for row in rows:
            found, clusters = (p.read_arrays(run.folder, row) for p in (self, Cluster()))
            if not found or not clusters:
                continue
            tables = {
                "duplicates": (_DUPLICATES, partial(_duplicates, found, name)),
                "outliers": (_OUTLIERS, partial(_outliers, found, clusters, name)),
            }
            for title, (columns, lines) in tables.items():
                files.write_csv(run.folder / f"{title}.csv", columns, lines)


Name = Callable[[int], str]


def _duplicates(found: Mapping[str, np.ndarray], name: Name) -> Iterator[tuple]:
    """The lines of `duplicates.csv`."""
    of_pairs = (found[key].tolist() for key in ("pairs", "cosine", "same"))
    for (first, second), cosine, same in zip(*of_pairs, strict=True):
        yield name(first), name(second), f"{cosine:.4f}", int(same)


def _outliers(
    found: Mapping[str, np.ndarray], clusters: Mapping[str, np.ndarray], name: Name
) -> Iterator[tuple]:
    """The lines of `outliers.csv`."""
    places = np.flatnonzero(found["outlier"])
    for place in places[np.argsort(-found["far"][places], kind="stable")].tolist():
        record = int(found["index"][place])
        number = clusters["clusters"][np.searchsorted(clusters["index"], record)]
        yield name(record), number, f"{found['far'][place]:.4f}"


def _same_content(source: Source, pairs: np.ndarray) -> np.ndarray:
    """Whether the two records of each pair `[P, 2]` have the same file, or pixels, bool `[P]`;
    false where one cannot be read any more."""
    records, places = np.unique(pairs, return_inverse=True)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(source.digest_of, records.tolist()))
    first, second = np.array(digests, "U16")[places.reshape(pairs.shape)].T
    return (first == second) & (first != "")
