"""MAE-CT in JAX: masked autoencoders, tuned by nearest-neighbour contrastive learning."""

__version__ = "0.1.0"
