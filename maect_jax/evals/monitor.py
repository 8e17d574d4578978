"""k-NN on held-out images while an encoder is trained: labels serve this curve and nothing else."""

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from maect_jax.data import sources, subsets
from maect_jax.data.bad_images import BadImages
from maect_jax.evals import features, knn, runner
from maect_jax.models import vit
from maect_jax.run.folder import Run
from maect_jax.stages.base import Stage
from maect_jax.stages.state import TrainState

MEASURED = ("knn_accuracy", "neighbour_accuracy")
_K = 10
_MEMORY_MB = 256


def is_possible(config: ConfigDict, images: Mapping[str, sources.Source]) -> bool:
    """Whether the monitor is on, some images are held out, and all images have labels."""
    labelled = all(source.labelled for source in images.values())
    return bool(config.monitor.every) and "val" in images and labelled


class Monitor:
    """Measures the encoder of a state, of the stage that is trained, on at most
    `config.monitor.images` of each split, "train" and "val". All processes call it."""

    def __init__(self, run: Run, stage: type[Stage], images: Mapping[str, sources.Source]):
        config, size = run.config, run.config[stage.name].batch_size
        self._run, self._stage, self._extractions = run, stage, {}
        for split, source in images.items():
            count = min(len(source), config.monitor.images)
            chosen = subsets.Subset(source, np.linspace(0, len(source) - 1, count).astype(int))
            bad = BadImages(chosen, sources.decoding(config), config.data.max_bad_fraction)
            self._extractions[split] = runner.Extraction(run, chosen, bad, batch_size=size)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Measures `knn_accuracy` (10 neighbours) and `neighbour_accuracy` (the nearest one)."""
        model = self._run.config.model
        params = self._stage.encoder_params({k: getattr(state, k) for k in self._stage.saved})
        encode = features.encoder(vit.from_config(model), params, model.pool)
        extractions = (self._extractions[split] for split in ("train", "val"))
        train, test = (features.collected(e.batches(encode)) for e in extractions)
        search = knn.Search(self._run.mesh, _MEMORY_MB)
        nearest, several = knn.classify(search, train, test, ks=(1, min(_K, len(train.x))))
        return dict(zip(MEASURED, (several["accuracy"], nearest["accuracy"]), strict=True))
