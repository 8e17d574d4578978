"""Assigning features to the clusters that k-means found, and the names that people give these."""

import logging
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maect_jax import files
from maect_jax.data.base import digest
from maect_jax.errors import UserError, first_of, shown
from maect_jax.evals import features

NAMES = "names.json"  # in a run's folder

# Of `Centres.arrays`.
ARRAYS = ("centres", "numbers", "sizes", "rim", "normalise", "mean", "components")
_RIM = 0.99  # the fraction of a cluster's images that lie within its rim
_FLOATS = 2**24  # of the products of a part of the images with all centres
_LOGGER = logging.getLogger(__name__)


class Assigned(NamedTuple):
    """The clusters of N images.

    Attributes:
      cluster: the number of the cluster with the nearest centre, int32 `[N]`.
      name: that people have given it, text `[N]`; empty where it has none.
      distance: from that centre, fp32 `[N]`.
      margin: how much farther the next centre is, fp32 `[N]`; infinite where there is one cluster.
      beyond_rim: whether it is farther than 99 % of the images that the cluster was made of, as far
        as these are from the centre of the others.
    """

    cluster: np.ndarray
    name: np.ndarray
    distance: np.ndarray
    margin: np.ndarray
    beyond_rim: np.ndarray


class Space(NamedTuple):
    """Where distances are measured: features as k-means sees them."""

    normalise: bool  # whether features are L2-normalised first
    mean: np.ndarray  # fp32 [D], subtracted then; zeros where there are no components
    # Principal components that are kept, fp32 [P, D]; none, [0, D], for all.
    components: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, *, normalise: bool, pca: int) -> "Space":
        """The space of features `[N, D]`, with their first `pca` principal components, if any."""
        width = x.shape[1]
        space = cls(normalise, np.zeros(width, np.float32), np.zeros((0, width), np.float32))
        if not pca:
            return space
        mean, _, axes = features.principal(space.view(x))
        components = axes[:pca].astype(np.float32)
        return space._replace(mean=mean.astype(np.float32), components=components)

    def view(self, x: np.ndarray) -> features.Prepared:
        """Features `[N, D]` as rows of this space, made where they are read."""
        return features.Prepared(x, self.__call__, len(self.components) or x.shape[1])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Features fp32 `[N, D]` in this space, `[N, D]` or `[N, P]`."""
        x = np.asarray(x, np.float32)
        if self.normalise:
            x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return (x - self.mean) @ self.components.T if len(self.components) else x


class Centres(NamedTuple):
    """The clusters of a clustering that have an image, with which others are assigned."""

    space: Space  # that of `x`
    x: np.ndarray  # fp32 [K, P]
    numbers: np.ndarray  # of the clusters, int32 [K]
    sizes: np.ndarray  # how many images they were made of, int32 [K]
    # The distance from its centre within which 99 % of a cluster's images lie, fp32 [K].
    rim: np.ndarray

    @classmethod
    def of(
        cls, space: Space, x: np.ndarray, *, numbers: np.ndarray, places: np.ndarray, distance
    ) -> "Centres":
        """Clusters by the images that they were made of: for each the place of its cluster among
        `x`, and its distance from the centre, `[N]`."""
        sizes = np.bincount(places).astype(np.int32)
        parts = np.split(distance[np.argsort(places, kind="stable")], np.cumsum(sizes)[:-1])
        rim = np.array([np.quantile(part, _RIM) for part in parts], np.float32)
        return cls(space, x, numbers, sizes, rim)

    def arrays(self) -> dict[str, np.ndarray]:
        """Its arrays, by name, to be saved; `read` takes them."""
        space = {"normalise": np.array(self.space.normalise), "mean": self.space.mean}
        own = {"centres": self.x, "numbers": self.numbers, "sizes": self.sizes, "rim": self.rim}
        return own | space | {"components": self.space.components}

    @classmethod
    def read(cls, arrays: Mapping[str, np.ndarray]) -> "Centres":
        """Those whose `arrays` these are, among others."""
        space = Space(bool(arrays["normalise"]), arrays["mean"], arrays["components"])
        return cls(space, *(arrays[key] for key in ("centres", "numbers", "sizes", "rim")))

    @property
    def digest(self) -> str:
        """Tells these clusters from those of any other clustering, 16 characters."""
        # By what assigns images, and no more: names hold for as long as that does.
        return digest(*map(np.asarray, self.space), self.x, self.numbers)

    @property
    def beyond(self) -> np.ndarray:
        """The fraction of new images of the same kind that is beyond each rim, `[K]`: one of n + 1
        is the farthest, however few they are."""
        return np.maximum(1 - _RIM, 1 / (self.sizes + 1))

    def assign(self, x: np.ndarray, names: Mapping[int, str]) -> Assigned:
        """Assigns features `[N, D]`; `names` are those of some clusters, by number."""
        places, distance, margin = nearest(self.space(x), self.x)
        # An image has pulled its centre towards itself, which one that is new has not.
        rim = self.rim * self.sizes / np.maximum(self.sizes - 1, 1)
        numbers = self.numbers[places]
        named = np.array([names.get(number, "") for number in numbers.tolist()])
        return Assigned(numbers, named, distance, margin, distance > rim[places])


def nearest(x: features.Rows, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nearest of centres `[K, P]` to each row of `[N, P]`, the first of equals; its distance;
    and how much farther the next one is (infinite for K = 1): int32 and fp32 `[N]`."""
    few = min(2, len(centres))
    places = np.empty((len(x), few), np.int32)
    apart = np.empty((len(x), few), np.float32)
    size = max(1, _FLOATS // max(centres.shape))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        rows = x[part]
        scores = rows @ centres.T - np.square(centres).sum(1) / 2
        places[part] = np.argpartition(-scores, few - 1, axis=1)[:, :few]
        # The products lose digits, which tell the nearest from the next.
        for column in range(few):
            differences = rows - centres[places[part, column]]
            apart[part, column] = np.linalg.norm(differences, axis=1)
    order = np.lexsort((places, apart))
    first, distances = np.take_along_axis(places, order, 1)[:, 0], np.sort(apart, axis=1)
    margin = distances[:, 1] - distances[:, 0] if few == 2 else np.full(len(x), np.inf, np.float32)
    return first, distances[:, 0], margin


def places(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """For each image of a clustering, of which these are arrays, the place of its cluster among
    all, int32 `[N]`."""
    order = np.argsort(arrays["numbers"]).astype(np.int32)
    return order[np.searchsorted(arrays["numbers"], arrays["clusters"], sorter=order)]


class Names(NamedTuple):
    """What people have named."""

    clusters: dict[int, str]  # the name of a cluster by its number, of those that have one
    # The name that an image was moved to, by its path below the folder of all images.
    images: dict[str, str]


def checked_names(path: Path, centres: Centres) -> Names:
    """Reads names that were given to these clusters. Raises `UserError` if there is no such file,
    it is damaged, or it names other clusters or images by what is no text."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    content = files.read_json(path)
    if (given := content.get("clustering")) != centres.digest:
        raise UserError(
            f"{path}: has the names of other clusters, of another run or of this one before it was "
            f"clustered anew (clustering {shown(repr(given))}; must be {centres.digest}). Name its "
            "present clusters, on clusters.html"
        )
    names, images = (content.get(key, {}) for key in ("names", "images"))
    for key, given in {"names": names, "images": images}.items():
        if not isinstance(given, dict):
            raise UserError(f"{path}: {key!r} is {shown(repr(given))}; must be an object")
        if wrong := [name for name, x in given.items() if not _is_text(x)]:
            raise UserError(f"{path}: {key!r} must be text on one line, not of {first_of(wrong)}")
    numbers = {str(number): number for number in centres.numbers.tolist()}
    if unknown := [number for number in names if number not in numbers]:
        raise UserError(
            f"{path}: there is no cluster {first_of(unknown)}; they have the numbers "
            f"{min(numbers.values())} to {max(numbers.values())}"
        )
    return Names({numbers[key]: name for key, name in names.items() if name}, images)


def _is_text(name: object) -> bool:
    return isinstance(name, str) and not {"Cc", "Cs"} & set(map(unicodedata.category, name))


def read_names(run: Path, centres: Centres) -> Names:
    """The names in a run's folder of its clusters; none where there is no such file. One that is
    not of these clusters, or is damaged, is not used, and a warning says so."""
    path = run / NAMES
    try:
        return checked_names(path, centres) if path.exists() else Names({}, {})
    except UserError as error:
        _LOGGER.warning("%s. The file is not used.", error)
        return Names({}, {})
