"""Projector and predictor of NNCLR (Dwibedi et al., 2021), as in MAE-CT or in MIM-Refiner."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# The weights of PyTorch's Linear, uniform in +-1/sqrt(fan_in).
torch_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class BatchNorm(nn.Module):
    """Batch normalisation over axis 0 in fp32, as in PyTorch.

    Its running variance is unbiased, as in the authors' heads; Flax's is biased. Under `jax.jit`
    the statistics are those of the global batch, however it is sharded. A batch of one row, which
    PyTorch refuses in training, has variance 0: its output is the bias.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, D] -> [B, D]` fp32; batch statistics in training, running ones otherwise."""
        x = x.astype(jnp.float32)
        batch, width = x.shape
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (width,))
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        if train:
            mean = x.mean(0)
            var = jnp.square(x - mean).mean(0)
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                unbiased = var * batch / max(batch - 1, 1)
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    running.value = self.momentum * running.value + (1 - self.momentum) * new
        else:
            mean, var = running_mean.value, running_var.value
        return (x - mean) * jax.lax.rsqrt(var + self.epsilon) * scale + bias


class _MLP(nn.Module):
    """Linear layers without bias, each followed by BatchNorm and an activation; fp32 results."""

    hidden: int
    out: int
    dtype: Any = jnp.float32
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    kernel_init: Callable = torch_init

    def dense(self, width: int, name: str) -> nn.Dense:
        settings = dict(use_bias=False, dtype=self.dtype, kernel_init=self.kernel_init)
        return nn.Dense(width, **settings, name=name)


class Projector(_MLP):
    """Linear-BN-ReLU, Linear-BN-ReLU, Linear-BN: features `[B, D] -> [B, out]` fp32."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i, width in enumerate((self.hidden, self.hidden, self.out), start=1):
            x = self.dense(width, f"fc{i}")(x)
            x = BatchNorm(name=f"bn{i}")(x, train)
            x = self.activation(x) if i < 3 else x
        return x


class Predictor(_MLP):
    """Linear-BN-ReLU, Linear, and with `last_norm` BN: projections `[B, out] -> [B, out]` fp32."""

    last_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.dense(self.hidden, "fc1")(x)
        x = self.activation(BatchNorm(name="bn1")(x, train))
        x = self.dense(self.out, "fc2")(x).astype(jnp.float32)
        return BatchNorm(name="bn2")(x, train) if self.last_norm else x
