"""Projector and predictor of NNCLR (Dwibedi et al., 2021) with MAE-CT's sizes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def _dense(width: int, dtype: Any, name: str) -> nn.Dense:
    """A layer without bias; weights as in PyTorch's Linear, uniform in +-1/sqrt(fan_in)."""
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return nn.Dense(width, use_bias=False, dtype=dtype, kernel_init=init, name=name)


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


class Projector(nn.Module):
    """Linear-BN-ReLU, Linear-BN-ReLU, Linear-BN: features `[B, D] -> [B, out]` fp32."""

    hidden: int = 2048
    out: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i, width in enumerate((self.hidden, self.hidden, self.out), start=1):
            x = _dense(width, self.dtype, f"fc{i}")(x)
            x = BatchNorm(name=f"bn{i}")(x, train)
            x = nn.relu(x) if i < 3 else x
        return x


class Predictor(nn.Module):
    """Linear-BN-ReLU, Linear: projections `[B, out] -> [B, out]` fp32."""

    hidden: int = 4096
    out: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = _dense(self.hidden, self.dtype, "fc1")(x)
        x = nn.relu(BatchNorm(name="bn1")(x, train))
        return _dense(self.out, self.dtype, "fc2")(x).astype(jnp.float32)
