"""k-NN on held-out images while an encoder is trained: labels serve this curve and nothing else."""

import time
from collections.abc import Callable, Mapping

import numpy as np
from ml_collections import ConfigDict

from maect_jax.data import bad_images, sources, subsets
from maect_jax.evals import features, knn, runner
from maect_jax.stages import build
from maect_jax.stages.state import TrainState

MEASURED = ("knn_accuracy", "neighbour_accuracy")
_K = 10
_MEMORY_MB = 256


def measures(config: ConfigDict, images: Mapping[str, sources.Source]) -> bool:
    """Whether anything can be measured: it is not switched off, and there are held-out images, and
    all have labels."""
    labelled = all(source.labelled for source in images.values())
    return bool(config.monitor.every) and "val" in images and labelled


def monitor(
    config: ConfigDict, name: str, images: Mapping[str, sources.Source], mesh
) -> Callable[[TrainState], tuple[dict[str, float], float]] | None:
    """A function of a state that measures the encoder of stage `name`.

    It returns `knn_accuracy`, of 10 neighbours, and `neighbour_accuracy`, of the nearest alone, by
    cosine among training images (`config.monitor.images` of either kind, at most); and the seconds
    that it took. Every process must call it.

    `None` where there is nothing to measure: `measures` says so, or the stage does not change the
    encoder or has seen the labels.
    """
    if name not in ("mae", "ct") or not measures(config, images):
        return None
    chosen, broken = {}, {}
    for split, source in images.items():
        count = min(len(source), config.monitor.images)
        records = np.linspace(0, len(source) - 1, count).astype(int)
        chosen[split] = subsets.Subset(source, records)
        allowed = config.data.max_bad_fraction
        broken[split] = bad_images.Damage(chosen[split], config.model.channels, allowed)
    model, size = config.model, config[name].batch_size

    def measure(state: TrainState) -> tuple[dict[str, float], float]:
        start, found = time.monotonic(), {}
        parts = {key: getattr(state, key) for key in build.SAVED_PARTS[name]}
        params = build.evaluated_encoder(name, parts)
        encode = features.encoder(build.encoder(model), params, model.pool)
        for split, source in chosen.items():
            batches = runner.extracted(config, encode, source, broken[split], size, mesh)
            found[split] = features.collected(batches)
        ks = (1, min(_K, len(found["train"][0])))
        nearest, several = knn.knn(*found["train"], *found["val"], ks, mesh, _MEMORY_MB)
        accuracies = (several["accuracy"], nearest["accuracy"])
        return dict(zip(MEASURED, accuracies, strict=True)), time.monotonic() - start

    return measure
