"""The contrastive head of MAE-CT's authors, as `names` does for encoder and decoder.

The target's running statistics, which the authors copy from the projector, are not kept.
"""

import math
from collections.abc import Mapping

import numpy as np

from maect_jax.convert.names import NORM, Tensors, from_torch, named, to_torch
from maect_jax.errors import UserError
from maect_jax.stages import support_queue

_NO_BIAS = {"kernel": "weight"}
_RUNNING = {"mean": "running_mean", "var": "running_var"}
# Places in the authors' Sequential; between them are the activations.
_PLACES = {
    "projector": {"fc1": 0, "bn1": 1, "fc2": 3, "bn2": 4, "fc3": 6, "bn3": 7},
    "predictor": {"fc1": 0, "bn1": 1, "fc2": 3},
}


def _params(ours: str, theirs: str) -> dict[str, str]:
    names = {}
    for layer, place in _PLACES[ours.split("/")[1]].items():
        leaves = _NO_BIAS if layer.startswith("fc") else NORM
        names |= named(f"{ours}/{layer}", f"{theirs}.{place}", leaves)
    return names


def _stats(ours: str, theirs: str) -> dict[str, str]:
    names = {}
    for layer, place in _PLACES[ours.split("/")[1]].items():
        if layer.startswith("bn"):
            names |= named(f"{ours}/{layer}", f"{theirs}.{place}", _RUNNING)
    return names


_HEAD = (
    _params("params/projector", "projector")
    | _params("params/predictor", "predictor")
    | _stats("batch_stats/projector", "projector")
    | _stats("batch_stats/predictor", "predictor")
)
_TARGET = _params("target/projector", "target_projector")
# In the authors' code the target's running statistics are a copy of the online projector's.
_TARGET_STATS = _stats("batch_stats/projector", "target_projector")
_QUEUE = ("queue", "queue_id", "queue_y", "queue_ptr")


def head_from_torch(tensors: Tensors) -> dict:
    """The contrastive head of a state dict.

    Args:
      tensors: `projector.<i>.*`, `predictor.<i>.*`, and, where there are, `target_projector.*`
        (stage 3), `queue [Q, D]`, `queue_id [Q]`, `queue_y [Q]`, `queue_ptr [1]`. The target's
        running statistics are the projector's, and are left out.

    Returns:
      `params` and `batch_stats` of `projector` and `predictor`; `target` of `projector` and
      `queue` (a `support_queue.Queue`) where the state dict has them.

    Raises:
      UserError: a tensor is missing or has no place.
    """
    copies = set(_TARGET_STATS.values()) | set(_QUEUE)
    rest = {
        name: x
        for name, x in tensors.items()
        if name not in copies and not name.endswith("num_batches_tracked")
    }
    has_target = any(name.startswith("target_projector.") for name in rest)
    head = from_torch(rest, _HEAD | (_TARGET if has_target else {}), "head")
    if "queue" in tensors:
        head["queue"] = _queue_from_torch(tensors)
    return head


def _queue_from_torch(tensors: Tensors) -> support_queue.Queue:
    for name in _QUEUE:
        if name not in tensors:
            raise UserError(f"head: the tensor {name!r} is missing")
    rows, ids, labels, pointer = (np.asarray(tensors[name]) for name in _QUEUE)
    oldest = int(pointer.item())
    # Slots of the largest size whose borders the pointer respects; a stage makes batches of them.
    slot = math.gcd(len(rows), oldest)
    return support_queue.Queue(
        rows=rows.reshape(-1, slot, rows.shape[1]),
        ids=ids.reshape(-1, slot).astype(np.int32),
        labels=labels.reshape(-1, slot).astype(np.int32),
        slot=np.int32(oldest // slot % (len(rows) // slot)),
    )


def head_to_torch(parts: Mapping, queue_size: int | None = None) -> dict[str, np.ndarray]:
    """The inverse of `head_from_torch`.

    Args:
      parts: any of `params`, `batch_stats`, `target` and `queue`, as in a `TrainState`. Parts
        of the encoder are left out.
      queue_size: rows of the queue, by default all of its ring; the surplus is left out.
    """
    trees = {
        field: {m: tree for m, tree in parts[field].items() if m != "encoder"}
        for field in ("params", "batch_stats", "target")
        if parts.get(field)
    }
    tensors = to_torch(trees, _HEAD | _TARGET)
    if {"target", "batch_stats"} <= trees.keys():
        copies = {"batch_stats": {"projector": trees["batch_stats"]["projector"]}}
        tensors |= to_torch(copies, _TARGET_STATS)
    queue = parts.get("queue")
    if queue is not None:
        queue_size = queue_size or queue.ids.size
        oldest = int(queue.slot) * queue.ids.shape[1] % queue_size
        flat = support_queue.in_age_order(queue, queue_size)
        rows, ids, labels = (np.roll(np.asarray(x), oldest, axis=0) for x in flat)
        tensors |= {
            "queue": rows,
            "queue_id": ids.astype(np.int64),
            "queue_y": labels.astype(np.int64),
            "queue_ptr": np.array([oldest]),
        }
    return tensors
