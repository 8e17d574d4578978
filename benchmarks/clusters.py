"""Time and memory of clusters of many images, and of what is looked at among them.

    python -m benchmarks.clusters 100000 384
    python -m benchmarks.clusters 1000000 768 --minibatch=8192     # 3 GB of features in /tmp

Features are synthetic: a thousand clusters whose variance falls with the component, with planted
copies (the same but for a little noise) and images far from all. They lie on disk, as those of a
run do; the memory is what the process takes beside the file (its anonymous pages), the highest of
each step, sampled.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from maect_jax import files, sharding
from maect_jax.data import subsets
from maect_jax.data.arrays import Arrays
from maect_jax.evals import assignment, cluster, duplicates, kmeans, knn, near
from maect_jax.evals.assignment import Space

_PLANTED = 1000  # copies, and half as many images far from all
_PART = 10_000  # images
_MEMORY_MB = 1024
_COSINE = 0.95


def synthetic(path: Path, images: int, width: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Writes features `[N, D]`; returns the planted pairs `[P, 2]` and the images far from all."""
    rng = np.random.default_rng(0)
    scale = (np.arange(1, width + 1) ** -0.5).astype(np.float32)
    centres = 1.5 * scale * rng.standard_normal((clusters, width), np.float32)
    x = np.lib.format.open_memmap(path, "w+", np.float32, (images, width))
    for start in range(0, images, _PART):
        size = min(_PART, images - start)
        noise = scale * rng.standard_normal((size, width), np.float32)
        x[start : start + size] = centres[rng.integers(0, clusters, size)] + noise
    chosen = rng.choice(images, 2 * _PLANTED + _PLANTED // 2, replace=False)
    first, copies, far = np.split(chosen, (_PLANTED, 2 * _PLANTED))
    x[copies] = x[first] + 0.1 * scale * rng.standard_normal((_PLANTED, width), np.float32)
    # As long as the others, in directions of their own.
    alone = rng.standard_normal((len(far), width), np.float32)
    x[far] = alone * np.linalg.norm(x[first[: len(far)]], axis=1, keepdims=True) / width**0.5
    x.flush()
    return np.sort(np.column_stack([first, copies]), axis=1), far


def _anonymous_mb() -> float:
    """MiB of the process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def measured(title: str, run: Callable):
    """Runs, prints seconds and the highest memory, and returns the result."""
    highest, done = [_anonymous_mb()], threading.Event()

    def watch():
        while not done.wait(0.05):
            highest.append(_anonymous_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    try:
        return run()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        thread.join()
        print(
            f"{title:28}{seconds:9.1f} s   peak {max(highest):8,.0f} MiB, "
            f"+{max(highest) - highest[0]:,.0f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--minibatch", type=int, default=0)
    flags = parser.parse_args()
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        planted, far = synthetic(path, flags.images, flags.width, flags.clusters)
        x = np.load(path, mmap_mode="r")
        print(f"{flags.images:,} x {flags.width}: {x.nbytes / 2**20:,.0f} MiB on disk", flush=True)
        rows = Space.of(x, normalise=True, pca=0).view(x)
        settings = kmeans.Settings(
            flags.clusters, flags.runs, 0, memory_mb=_MEMORY_MB, batch_size=flags.minibatch
        )
        found = measured("k-means", lambda: kmeans.kmeans(rows, settings, mesh))
        clusters, places = np.unique(found.clusters[0], return_inverse=True)
        centres = found.centres[0][clusters]
        _, distance, margin = measured("distances", lambda: assignment.nearest(rows, centres))
        rank = measured("ranks", lambda: subsets.ranks(places, distance))
        centred = measured("mean", lambda: near.centred(x))
        search = knn.Search(mesh, _MEMORY_MB)
        _, score = measured("neighbours, scores", lambda: near.nearest(search, centred, seed=0))
        pairs = measured(
            "duplicates", lambda: duplicates.find(centred, _COSINE, memory_mb=_MEMORY_MB)
        )
        arrays = dict(
            index=np.arange(len(x)), labels=np.full(len(x), -1), clusters=places,
            distance=distance, margin=margin, rank=rank,
        )  # fmt: skip
        source = Arrays(np.zeros((len(x), 1, 1, 1), np.uint8), np.zeros(len(x), np.int32), [])
        measured("clusters.csv, two rows", lambda: _csv(Path(folder), source, [arrays, arrays]))
    listed = set(map(tuple, pairs.rows.tolist()))
    copies = sum(pair in listed for pair in map(tuple, planted.tolist()))
    outlier = near.outliers(score)
    print(
        f"planted copies found: {copies} of {len(planted)}, pairs in all {len(listed)}; "
        f"far images found: {outlier[far].sum()} of {len(far)}, outliers in all {outlier.sum()}"
    )


def _csv(folder: Path, source: Arrays, rows: list[dict]) -> None:
    columns = ["image", "label", *map(str, range(8))]
    files.write_csv(folder / "clusters.csv", columns, lambda: cluster.lines(source, rows))


if __name__ == "__main__":
    main()
