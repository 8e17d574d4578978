"""MAE-CT in JAX: masked autoencoders, tuned by nearest-neighbour contrastive learning."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maect_jax.clusters import load_clusters
    from maect_jax.encoder import load_encoder

__version__ = "0.2.0"
__all__ = ["load_clusters", "load_encoder"]


def __getattr__(name: str) -> object:
    """What is exported, imported when it is asked for: the commands set up JAX before it is
    there."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"maect_jax.{name.removeprefix('load_')}")
    return getattr(module, name)
