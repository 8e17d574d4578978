"""All that is inside the jitted step. A new stage is a new file and a line in `STAGES`."""

from maect_jax.stages.base import ImportedEncoder, ImportedProbe, Saved, Stage
from maect_jax.stages.finetune import Finetune
from maect_jax.stages.mae import MAE
from maect_jax.stages.nnclr import ContrastiveTuning, Head
from maect_jax.stages.refiner import Refine, RefineHead

# By name, in the order in which a config runs them.
STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (MAE, Head, ContrastiveTuning, RefineHead, Refine, Finetune)
}
# All that a run may hold: what is trained here, and what is only imported.
SAVED: dict[str, type[Saved]] = STAGES | {
    kind.name: kind for kind in (ImportedEncoder, ImportedProbe)
}
