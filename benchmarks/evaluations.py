"""The protocols' speed against other libraries', on the same numbers in one run.

    python -m benchmarks.evaluations knn        # 10,000 x 100,000 x 768, ten minutes
    python -m benchmarks.evaluations grid       # how the cost of k-NN grows, and its memory
    python -m benchmarks.evaluations kmeans     # 50,000 x 384 in 1,000 clusters, ten minutes
    python -m benchmarks.evaluations probe      # ten probes against one

Medians of the rounds, the sides in turns. `knn` wants PyTorch (extra [torch]).
"""

import resource
import statistics
import sys
import time
from functools import partial

import jax
import numpy as np
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

from maect_jax import sharding
from maect_jax.evals import features, kmeans, knn, probe
from maect_jax.models import vit

_MEMORY_MB = 1024


def in_turns(sides: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each side; each has run once before, to compile."""
    times = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def told(times: dict[str, float]) -> None:
    """Prints seconds, and ratios to the first side."""
    first = next(iter(times.values()))
    for name, seconds in times.items():
        print(f"{name:36}{seconds:9.2f} s  {seconds / first:6.2f} of the first", flush=True)


def blobs(rows: int, width: int, k: int, noise: float = 2.5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(k, width)).astype(np.float32)
    x = noise * rng.standard_normal((rows, width), np.float32)
    return x + centres[rng.integers(0, k, rows)]


def nearest_neighbours(mesh, rounds: int = 3) -> None:
    """Ours, scikit-learn's brute force, and PyTorch's product and topk by blocks of queries."""
    import torch

    k = 20
    bank, queries = blobs(100_000, 768, 1000), blobs(10_000, 768, 1000, seed=1)
    found = {}

    def ours():
        found["ours"] = knn.Search(mesh, _MEMORY_MB).nearest(bank, queries, k)[1]

    def sklearn():
        search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute")
        found["scikit-learn"] = search.fit(bank).kneighbors(queries)[1]

    def blocked():
        normal = torch.nn.functional.normalize
        rows, those = normal(torch.from_numpy(bank)), normal(torch.from_numpy(queries))
        found["PyTorch"] = torch.cat([(part @ rows.T).topk(k, 1)[1] for part in those.split(1024)])

    told(
        in_turns({"ours": ours, "PyTorch, blocks": blocked, "scikit-learn, brute": sklearn}, rounds)
    )
    for name, rows in found.items():
        print(f"neighbours equal to ours, {name}: {np.mean(np.asarray(rows) == found['ours']):.5f}")


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def grid(mesh, width: int = 256) -> None:
    """Seconds for a grid of sizes, and what the peak of the process's memory rises by."""
    for rows, count in ((50_000, 4_000), (50_000, 8_000), (100_000, 8_000), (200_000, 8_000)):
        bank, queries = blobs(rows, width, 10), blobs(count, width, 10)
        for memory_mb in (32, 256):
            before = _peak_mb()
            run = partial(knn.Search(mesh, memory_mb).nearest, bank, queries, 20)
            seconds = in_turns({"": run}, 3)[""]
            print(
                f"{count:6,} x {rows:7,}  bound {memory_mb:4} MiB  {seconds:6.2f} s  "
                f"{seconds / rows / count * 1e9:5.2f} ns a pair  peak of the process "
                f"+{_peak_mb() - before:,.0f} MiB",
                flush=True,
            )


def clusters(mesh, restarts: int) -> None:
    """Each restart of ours against one of scikit-learn's: time and loss."""
    x, k = blobs(50_000, 384, 1000), 1000
    kmeans.kmeans(x[:5000], kmeans.Settings(k, 1, 0, _MEMORY_MB), mesh)  # both have run before
    rows = []
    for seed in range(restarts):
        start = time.perf_counter()
        ours = kmeans.kmeans(x, kmeans.Settings(k, 1, seed, _MEMORY_MB), mesh)
        middle = time.perf_counter()
        peer = KMeans(k, n_init=1, random_state=seed).fit(x)
        end = time.perf_counter()
        start, middle = middle - start, end - middle
        rows.append((start, middle, float(ours.loss[0]), float(peer.inertia_)))
        for name, seconds, passes, loss in (
            ("ours", start, ours.passes[0], ours.loss[0]),
            ("scikit-learn", middle, peer.n_iter_, peer.inertia_),
        ):
            print(
                f"{seed} {name:14}{seconds:6.1f} s {passes:4} passes  loss {loss:.0f}", flush=True
            )
    own, others, loss, inertia = map(np.array, zip(*rows, strict=True))
    print(f"a restart, median of ratios: {np.median(own / others):.2f} of scikit-learn's time")
    print(f"lowest loss: {loss.min() / inertia.min():.5f} of scikit-learn's lowest")
    start = time.perf_counter()
    small = kmeans.kmeans(x, kmeans.Settings(k, 1, 0, _MEMORY_MB, batch_size=4096), mesh)
    print(f"mini-batches: {time.perf_counter() - start:.1f} s, loss {small.loss[0] / loss[0]:.4f}")


def operations() -> None:
    """What one device of 1, 2, 4 and 8 multiplies and adds in a pass of k-means."""
    x, k = blobs(8192, 64, 100), 100
    for count in (1, 2, 4, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:count])
        with jax.set_mesh(mesh):
            rows = kmeans.place(x, mesh, kmeans.layout(np.arange(len(x)), count, 64))
            start = jax.numpy.asarray(x[:k])[None]
            # The cost of a loop's body is counted once: a device's tiles, times that.
            cost = jax.jit(kmeans._pass).lower(rows, start).compile().cost_analysis()
            tiles = rows.x.shape[0] // count
            print(f"{count} devices: {tiles} tiles each, {cost['flops'] * tiles:.3g} operations")


def probes(mesh) -> None:
    """Ten learning rates at once against one; on augmented images, and on features at hand."""
    lrs, classes = np.linspace(0.1, 0.01, 10), 1000
    model = vit.ViT(*vit.VARIANTS["B"], 16)
    images = np.random.default_rng(0).normal(size=(32, 224, 224, 3)).astype(np.float32)
    params = model.init(jax.random.key(0), images[:1])["params"]
    encode = features.encoder(model, params, "cls")
    labels = np.arange(32, dtype=np.int32) % classes
    test = features.Features(blobs(64, 768, 10), np.zeros(64, np.int32), np.arange(64))

    def augmented(rates):
        batches = ((encode(images), labels) for _ in range(2))
        return probe.fit(batches, probe.Schedule(rates, 1, 2, 0), {"test": test}, classes, mesh)

    one, ten = partial(augmented, lrs[:1]), partial(augmented, lrs)
    told(in_turns({"augmented, one probe": one, "augmented, ten": ten}, 5))
    rows = 20_000
    for classes, width in ((10, 192), (10, 768), (100, 768)):
        own = np.arange(rows, dtype=np.int32) % classes
        train = features.Features(blobs(rows, width, classes), own, np.arange(rows))

        def cached(rates, train=train, classes=classes):
            batches = probe.cached_batches(train, 1024, 0, mesh)
            schedule = probe.Schedule(rates, 3, rows // 1024, 0)
            return probe.fit(batches, schedule, {"test": train}, classes, mesh)

        def apart(cached=cached):
            return [cached(lrs[i : i + 1]) for i in range(len(lrs))]

        name = f"cached, {classes} classes x {width}"
        told(in_turns({f"{name}, ten runs": apart, f"{name}, at once": partial(cached, lrs)}, 5))


def main(name: str, restarts: str = "10") -> None:
    if name == "operations":
        operations()
        return
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        if name == "kmeans":
            clusters(mesh, int(restarts))
        else:
            {"knn": nearest_neighbours, "grid": grid, "probe": probes}[name](mesh)


if __name__ == "__main__":
    main(*sys.argv[1:])
