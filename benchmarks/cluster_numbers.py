"""How near the number of clusters that is chosen comes to the number of classes, and how good many
clusters are that are read as few.

    python -m benchmarks.cluster_numbers RUN ROW [--split=val]    # an evaluation of labelled images
    python -m benchmarks.cluster_numbers made                     # blobs, and data without clusters
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage

from maect_jax import sharding
from maect_jax.evals import cluster, features, kmeans, selection
from maect_jax.evals.assignment import Space

_MEMORY_MB = 1024
_METRICS = ("acc", "nmi", "ari")


def blobs(k: int, width: int, apart: float, *, unequal: bool = False):
    """2,000 points of k Gaussians, the median of whose centres is `apart` deviations from the next,
    and which of them each is of; some have few points, if they are unequal."""
    rng = np.random.default_rng(7 * k + width)
    centres = rng.normal(size=(k, width))
    distances = np.linalg.norm(centres[:, None] - centres, axis=-1)
    np.fill_diagonal(distances, np.inf)
    centres *= apart / np.median(distances.min(1))
    fractions = np.maximum(rng.dirichlet(np.full(k, 2)), 0.25 / k) if unequal else np.ones(k)
    labels = rng.choice(k, 2_000, p=fractions / fractions.sum())
    return centres[labels] + rng.normal(size=(2_000, width)), labels


def made() -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(2_000, 64)) / np.sqrt(np.arange(1, 65)) + 0.2
    return {
        "ten blobs that overlap, 10 dimensions": blobs(10, 10, 4),
        "20 unequal blobs, 32 dimensions": blobs(20, 32, 8, unequal=True),
        "one Gaussian, 10 dimensions": (rng.normal(size=(2_000, 10)), None),
        "one Gaussian, 64 dimensions, of length 1": (
            wide / np.linalg.norm(wide, axis=1, keepdims=True), None,
        ),
        "uniform, 5 dimensions": (rng.uniform(size=(2_000, 5)), None),
    }  # fmt: skip


def measure(title: str, x: np.ndarray, labels: np.ndarray | None, mesh) -> None:
    chosen = selection.select(x, seed=0, memory_mb=_MEMORY_MB, mesh=mesh)
    print(f"{title}, {len(x):,} x {x.shape[1]}\n  {chosen['words']}")
    if labels is None:
        return
    classes, counts = len(np.unique(labels)), {}
    for count in sorted({chosen["chosen"], classes, 50, 100}):
        if count * 5 > len(x):
            continue
        settings = kmeans.Settings(count, 20, 0, memory_mb=_MEMORY_MB)
        found = kmeans.kmeans(x, settings, mesh)
        counts[count] = int(found.loss.argmin()), found
    for count, (best, found) in counts.items():
        what = " (chosen)" * (count == chosen["chosen"]) + " (classes)" * (count == classes)
        _print(f"{count} clusters{what}", labels, found.clusters[best])
        for kind in ("ward", "average", "complete") if count in (50, 100) else ():
            tree = cut_tree(linkage(found.centres[best].astype(float), kind), n_clusters=classes)
            _print(f"{count} read as {classes}, {kind}", labels, tree[found.clusters[best], 0])


def _print(title: str, labels: np.ndarray, clusters: np.ndarray) -> None:
    scores = cluster.agreement(labels, clusters)
    print(f"  {title:32}", *(f"{name} {100 * scores[name]:5.1f}" for name in _METRICS), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the folder of a run, or 'made'")
    parser.add_argument("row", nargs="?", help="of its results")
    parser.add_argument("--split", default="val")
    flags = parser.parse_args()
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        if flags.run == "made":
            for title, (x, labels) in made().items():
                measure(title, x.astype(np.float32), labels, mesh)
            return
        found = features.load(Path(flags.run) / "features" / flags.row / flags.split)
        x = Space.of(found.x, normalise=True, pca=0)(found.x)
        labels = found.labels if found.labelled else None
        measure(f"{flags.run}, {flags.row}", x, labels, mesh)


if __name__ == "__main__":
    main()
