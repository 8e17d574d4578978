"""The linear classifier that an encoder comes with."""

import numpy as np


def fold_batch_norm(parts: dict, bn_eps: float) -> tuple[np.ndarray, np.ndarray]:
    """A linear classifier's kernel fp32 `[D, C]` and bias `[C]`, with the batch normalisation of a
    probe folded into them.

    Args:
      parts: `params` and, of a probe, `batch_stats` of the classifier, NumPy arrays.
      bn_eps: of a probe's batch normalisation.
    """
    kernel, bias = (np.asarray(parts["params"][key], np.float64) for key in ("kernel", "bias"))
    if "batch_stats" in parts:
        mean, var = (np.asarray(parts["batch_stats"][key], np.float64) for key in ("mean", "var"))
        kernel = kernel / np.sqrt(var + bn_eps)[:, None]
        bias = bias - mean @ kernel
    return kernel.astype(np.float32), bias.astype(np.float32)
