"""MAE-CT in JAX: masked autoencoders, tuned by nearest-neighbour contrastive learning."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maect_jax.encoder import load_encoder

__version__ = "0.2.0"
__all__ = ["load_encoder"]


def __getattr__(name: str) -> object:
    """`load_encoder`, imported when it is asked for: the commands set up JAX before it is there."""
    if name != "load_encoder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maect_jax.encoder import load_encoder

    return load_encoder
