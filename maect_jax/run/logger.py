"""What a run writes while it trains: `metrics.jsonl`, `bad_steps.jsonl`, a progress bar and a
profile; its loggers get the lines of `metrics.jsonl`, too."""

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import jax
import numpy as np
from tqdm import tqdm

from maect_jax import sharding
from maect_jax.errors import RunFailedError
from maect_jax.run import jsonl
from maect_jax.run.folder import Run
from maect_jax.run.preemption import Action
from maect_jax.stages.base import Stage

NAN_POLICIES = ("stop", "skip")
_LOGGER = logging.getLogger(__name__)


class Logger:
    """Takes each step's metrics as device arrays and reads them one step late, so that the device
    never waits for the host.

    `metrics.jsonl` gets one JSON object a line for the first step, every `log_every` steps and the
    last one: `stage`, `step`, scalars (null if not finite), `images_per_second` and `input_wait`,
    the fraction of the time that the host waited for images, both since the line before, and
    `seconds`, all the time that the stage has taken, compiling included. `bad_steps.jsonl` gets a
    line for each step whose loss or gradient is not finite, with its metrics and its images; such
    a step has changed nothing (`stages.step`). When a stage resumes, lines later than the steps
    that were `done` are dropped. `image_name` gives the name of an image by its record number.
    """

    def __init__(self, run: Run, stage: Stage, done: int, image_name: Callable[[int], str]):
        self._config, self._folder = run.config, run.folder
        self._stage, self._steps, self._image_name = stage.name, stage.steps, image_name
        self._batch_size = run.config[stage.name].batch_size
        self._is_main = jax.process_index() == 0
        self._pending: tuple[int, dict, jax.Array] | None = None
        self._start = time.monotonic()
        self._last_line = (self._start, done)
        self._waited = 0.0
        self._lines: jsonl.Writer | None = None
        self._writers = run.writers
        self._writing = threading.Lock()  # checkpoints write from a thread of their own
        self._trace = ExitStack()
        self._bad_steps = run.folder / "bad_steps.jsonl"
        if self._is_main:
            jsonl.truncate(self._bad_steps, stage.name, done)
            before = jsonl.truncate(run.folder / "metrics.jsonl", stage.name, done)
            self._start -= max((entry.get("seconds", 0.0) for entry in before), default=0.0)
            self._lines = jsonl.Writer(run.folder / "metrics.jsonl")
        bad = jsonl.read(self._bad_steps)
        self._skipped = sum(e["stage"] == stage.name and e["step"] <= done for e in bad)
        interval = 0.5 if sys.stderr.isatty() else 30  # a log file needs few lines
        self._bar = tqdm(
            total=self._steps * self._batch_size, initial=done * self._batch_size, unit="img",
            unit_scale=True, desc=f"{stage.name:>4}", disable=not self._is_main,
            dynamic_ncols=True, mininterval=interval,
        )  # fmt: skip

    def wait_for(self, stream: Iterator[dict]) -> dict:
        """The next batch of a stream; the time that it takes is counted."""
        start = time.monotonic()
        batch = next(stream)
        self._waited += time.monotonic() - start
        return batch

    def profiled(self, step: int, update: Callable, *arguments):
        """`update(*arguments)`, traced into `profile/<stage>` if `config.profile` has the step."""
        first, last = self._config.profile or (None, None)
        if step == first:
            path = self._folder / "profile" / self._stage
            self._trace.enter_context(jax.profiler.trace(path))
        with jax.profiler.StepTraceAnnotation(self._stage, step_num=step):
            results = update(*arguments)
        if step == last:
            jax.block_until_ready(results)
            self._trace.close()
        return results

    def has_line(self, step: int) -> bool:
        """Whether a step gets a line in `metrics.jsonl`."""
        return step == 1 or step % self._config.log_every == 0 or step == self._steps

    def add(self, step: int, scalars: dict[str, jax.Array], index: jax.Array) -> Action:
        """Remembers this step's metrics and the record numbers of its images (int32 `[B]`), and
        reads those of the step before (`flush`)."""
        action = self.flush()
        self._pending = (step, scalars, index)
        return action

    def flush(self) -> Action:
        """Waits for the remembered step and writes its metrics. Every process must call it.

        Returns:
          Its `action`, the same on all hosts; CONTINUE if no step is remembered.

        Raises:
          RunFailedError: the step was not finite, and `config.nan_policy` or `nan_limit` says so.
        """
        if self._pending is None:
            return Action.CONTINUE
        (step, scalars, index), self._pending = self._pending, None
        values = {key: float(value) for key, value in jax.device_get(scalars).items()}
        finite, action = values.pop("finite"), Action(int(values.pop("action")))
        if not finite:
            self._add_bad_step(step, values, index)
        self._bar.update(self._batch_size)
        brief = {k: f"{values[k]:.3f}" for k in ("loss", "nn_accuracy") if k in values}
        self._bar.set_postfix(brief, refresh=False)
        if self._is_main and self.has_line(step):
            (then, before), now = self._last_line, time.monotonic()
            passed = max(now - then, 1e-9)
            rate = (step - before) * self._batch_size / passed
            values |= {"images_per_second": rate, "input_wait": self._waited / passed}
            self._last_line, self._waited = (now, step), 0.0
            self.note(step, values)
        return action

    def _add_bad_step(self, step: int, values: dict[str, float], index: jax.Array) -> None:
        records = np.asarray(sharding.to_host(index)).tolist()
        if self._is_main:
            texts = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
            images = [self._image_name(record) for record in records]
            entry = {"stage": self._stage, "step": step, **texts, "index": records}
            with closing(jsonl.Writer(self._bad_steps)) as lines:
                lines.add(entry | {"images": images})
                lines.sync()  # a later checkpoint counts on it
        self._skipped += 1
        limit = self._config.nan_limit
        message = (
            f"stage {self._stage}, step {step}: the loss ({values['loss']:g}) or a gradient "
            f"(norm {values['grad_norm']:g}) is not finite. {self._bad_steps} lists its images."
        )
        if self._config.nan_policy == "stop":
            raise RunFailedError(f"{message} To skip such steps, set config.nan_policy=skip.")
        if self._skipped > limit:
            raise RunFailedError(f"{message} More than config.nan_limit={limit} were skipped.")
        if self._is_main:
            _LOGGER.warning("%s Skipped (%d of at most %d).", message, self._skipped, limit)

    def note(self, step: int, values: dict[str, float]) -> None:
        """Writes a line; may be called from any thread."""
        if self._lines:
            line = {"stage": self._stage, "step": step, **values}
            line["seconds"] = time.monotonic() - self._start
            with self._writing:
                self._lines.add(line)
                self._writers.add(line)

    def time_apart(self, step: int, measure: Callable, state) -> dict[str, float]:
        """Writes a line of what `measure(state)` returns; its time does not count in the rates."""
        start = time.monotonic()
        values = measure(state)
        self.note(step, values)
        then, before = self._last_line
        self._last_line = (then + time.monotonic() - start, before)
        return values

    def sync(self) -> None:
        """Makes all lines outlast a power cut."""
        if self._lines:
            self._lines.sync()

    def close(self) -> None:
        self._trace.close()
        self._bar.close()
        if self._lines:
            self._lines.close()
