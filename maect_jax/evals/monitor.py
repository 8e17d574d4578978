"""k-NN on held-out images while an encoder is trained: labels serve this curve and nothing else."""

from collections.abc import Mapping

import numpy as np

from maect_jax.data import bad_images, sources, subsets
from maect_jax.evals import features, knn, runner
from maect_jax.models import vit
from maect_jax.run.folder import Run
from maect_jax.stages.base import Stage
from maect_jax.stages.state import TrainState

MEASURED = ("knn_accuracy", "neighbour_accuracy")
_K = 10
_MEMORY_MB = 256


def is_possible(config, images: Mapping[str, sources.Source]) -> bool:
    """Whether anything can be measured: the monitor is on, and there are held-out images, and all
    images have labels."""
    labelled = all(source.labelled for source in images.values())
    return bool(config.monitor.every) and "val" in images and labelled


class Monitor:
    """Measures the encoder of a state. Every process must call it.

    Args:
      run: config, folder and mesh.
      stage: that is trained.
      images: by split, "train" and "val"; `config.monitor.images` of either are taken, at most.
    """

    def __init__(self, run: Run, stage: type[Stage], images: Mapping[str, sources.Source]):
        self._run, self._stage, self._images = run, stage, {}
        for split, source in images.items():
            count = min(len(source), run.config.monitor.images)
            records = np.linspace(0, len(source) - 1, count).astype(int)
            chosen = subsets.Subset(source, records)
            config = run.config
            bad = bad_images.BadImages(chosen, config.model.channels, config.data.max_bad_fraction)
            self._images[split] = chosen, bad

    def __call__(self, state: TrainState) -> dict[str, float]:
        """`knn_accuracy`, of 10 neighbours, and `neighbour_accuracy`, of the nearest alone, by
        cosine among the training images."""
        config, mesh, stage = self._run.config, self._run.mesh, self._stage
        parts = {key: getattr(state, key) for key in stage.saved}
        encode = features.encoder(
            vit.from_config(config.model), stage.encoder_params(parts), config.model.pool
        )
        found = {}
        for split, (source, bad) in self._images.items():
            size = config[stage.name].batch_size
            batches = runner.extracted(config, encode, source, bad, size, mesh)
            found[split] = features.collected(batches)
        ks = (1, min(_K, len(found["train"][0])))
        nearest, several = knn.knn(*found["train"], *found["val"], ks, mesh, _MEMORY_MB)
        return dict(zip(MEASURED, (several["accuracy"], nearest["accuracy"]), strict=True))
