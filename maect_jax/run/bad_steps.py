"""Steps whose loss or gradient is not finite: written down, and the end of the run or skipped."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from maect_jax import sharding
from maect_jax.errors import RunFailedError
from maect_jax.run import jsonl

POLICIES = ("stop", "skip")
_LOGGER = logging.getLogger(__name__)


class BadSteps:
    """Keeps `bad_steps.jsonl`: a line for each bad step with its metrics and images.

    Such a step has changed nothing (`stages.step`).

    Args:
      path: of the file.
      stage: its name.
      done: steps that were done before, when a stage goes on.
      policy: one of `POLICIES`.
      limit: how many steps of a stage are skipped, at most.
      name: of an image by its record number.
    """

    def __init__(
        self, path: Path, stage: str, done: int, policy: str, limit: int, name: Callable[[int], str]
    ):
        self._path, self._stage, self._policy, self._limit = path, stage, policy, limit
        self._name, self._shown = name, jax.process_index() == 0
        # Those past `done` will be done again.
        before = [e for e in jsonl.read(path) if e["stage"] == stage and e["step"] <= done]
        self._count = len(before)
        if self._shown and path.exists():
            jsonl.truncate(path, stage, done)

    def take(self, step: int, values: dict[str, float], index: jax.Array) -> None:
        """Notes a bad step; every process must call it.

        Args:
          step: its number.
          values: its metrics.
          index: record numbers of its batch, int32 `[B]`.

        Raises:
          RunFailedError: by the policy, or as there were too many.
        """
        records = np.asarray(sharding.to_host(index)).tolist()
        if self._shown:
            told = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
            images = [self._name(record) for record in records]
            entry = {"stage": self._stage, "step": step, **told, "index": records, "images": images}
            lines = jsonl.Writer(self._path)
            lines.add(entry)
            lines.sync()  # a checkpoint past it counts on it
            lines.close()
        self._count += 1
        what = (
            f"stage {self._stage}, step {step}: the loss ({values['loss']:g}) or a gradient "
            f"(norm {values['grad_norm']:g}) is not finite; {self._path} names its images"
        )
        if self._policy == "stop":
            raise RunFailedError(f"{what}; config.nan_policy=skip would leave such steps out")
        if self._count > self._limit:
            raise RunFailedError(f"{what}; more than config.nan_limit={self._limit} were skipped")
        if self._shown:
            _LOGGER.warning("%s; skipped (%d of at most %d)", what, self._count, self._limit)
