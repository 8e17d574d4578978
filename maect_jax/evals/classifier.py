"""The linear classifier that an encoder comes with: a probe's, or that of fine-tuning."""

import numpy as np

from maect_jax import sharding
from maect_jax.evals.base import Protocol, Result, Row
from maect_jax.evals.features import in_parts
from maect_jax.run.lineage import Saved


def fold_batch_norm(parts: dict, bn_eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Folds the batch normalisation of a probe, if there is one, into its linear classifier. The
    parts are its `params` and `batch_stats`. Returns kernel fp32 `[D, C]` and bias `[C]`."""
    kernel, bias = (np.asarray(parts["params"][key], np.float64) for key in ("kernel", "bias"))
    if "batch_stats" in parts:
        mean, var = (np.asarray(parts["batch_stats"][key], np.float64) for key in ("mean", "var"))
        kernel = kernel / np.sqrt(var + bn_eps)[:, None]
        bias = bias - mean @ kernel
    return kernel.astype(np.float32), bias.astype(np.float32)


def linear_classifier(saved: Saved, parts: dict) -> tuple[np.ndarray, np.ndarray] | None:
    """The classifier of a stage that is saved, of whose fields `parts` are: kernel fp32 `[D, C]`
    and bias `[C]` on the model's feature; None if it has none."""
    fields = [key for key in ("params", "batch_stats") if "classifier" in parts.get(key, {})]
    if not fields:
        return None
    heads = {key: parts[key]["classifier"] for key in fields}
    eps = saved.config[saved.stage].get("bn_eps", 0.0)
    return fold_batch_norm(sharding.to_host(heads), eps)


def accuracies(ranked: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`top1` and `top5` of ranked classes `[N, K]`, the most likely first, K at most 5."""
    hits = ranked == labels[:, None]
    return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(1).mean())}


class Classifier(Protocol):
    """The accuracy of the classifier that the encoder comes with."""

    name = "classifier"
    needs_classifier = True

    def skip_reason(self, row: Row) -> str:
        assert row.classifier is not None
        reason, known = super().skip_reason(row), len(row.classifier[1])
        if reason or known == row.classes:
            return reason
        return f"the classifier knows {known} classes, the labels {row.classes}"

    def run(self, row: Row) -> Result:
        assert row.classifier is not None
        test, (kernel, bias) = row.features["val"], row.classifier
        scores = (x @ kernel + bias for x in in_parts(test.x))
        ranked = [np.argsort(-x, axis=1, kind="stable")[:, :5] for x in scores]
        metrics = accuracies(np.concatenate(ranked), test.labels)
        return Result({**metrics, "classes": len(bias), "images": len(test.labels)})
