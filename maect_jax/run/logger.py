"""What a run says while it trains: `metrics.jsonl`, TensorBoard and a progress bar."""

import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from tqdm import tqdm

from maect_jax.run import jsonl
from maect_jax.run.bad_steps import BadSteps
from maect_jax.run.board import Board
from maect_jax.run.folder import Run
from maect_jax.run.preemption import Action
from maect_jax.stages.base import Stage


class Logger:
    """Takes each step's metrics as device arrays and reads them one step late.

    So the device never waits for the host. `metrics.jsonl` gets one JSON object a line for the
    first step, every `log_every` steps and the last one: `stage`, `step`, scalars,
    `images_per_second` and `input_wait`, the fraction of the time in which the host waited for
    images, both since the line before, and `seconds`, all the time that the stage has taken,
    compiling included. A step that was not finite has null in it.

    Args:
      run: config, folder and mesh.
      stage: that is trained.
      done: steps that were done before, when a stage resumes.
      image_name: of an image by its record number, for `bad_steps.jsonl`.
    """

    def __init__(self, run: Run, stage: Stage, done: int, image_name: Callable[[int], str]):
        config, folder = run.config, run.folder
        self._stage, self._steps, self._every = stage.name, stage.steps, config.log_every
        self._batch_size = config[stage.name].batch_size
        self._bad_steps = BadSteps(
            folder / "bad_steps.jsonl", stage.name, done, config.nan_policy, config.nan_limit,
            image_name,
        )  # fmt: skip
        self._pending: tuple[int, dict, jax.Array] | None = None
        self._start = time.monotonic()
        self._clock = (self._start, done)
        self._waited = 0.0
        self._file = self._board = None
        self._writing = threading.Lock()  # a checkpoint tells of itself from its own thread
        shown = jax.process_index() == 0
        if shown:
            before = jsonl.truncate(folder / "metrics.jsonl", stage.name, done)
            self._start -= max((entry.get("seconds", 0.0) for entry in before), default=0.0)
            self._file = jsonl.Writer(folder / "metrics.jsonl")
            if config.tensorboard:
                self._board = Board(folder / "tensorboard" / stage.name, before)
        self._bar = tqdm(
            total=self._steps * self._batch_size,
            initial=done * self._batch_size,
            desc=f"{stage.name:>4}",
            unit="img",
            unit_scale=True,
            disable=not shown,
            dynamic_ncols=True,
            # A log file needs a line now and then, a terminal a living bar.
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )

    def wait_for(self, stream: Iterator[dict]) -> dict:
        """The next batch of a stream; the time until it is there is counted."""
        start = time.monotonic()
        batch = next(stream)
        self._waited += time.monotonic() - start
        return batch

    def is_due(self, step: int) -> bool:
        """Whether a step gets a line in `metrics.jsonl`."""
        return step == 1 or step % self._every == 0 or step == self._steps

    def add(self, step: int, scalars: dict[str, jax.Array], index: jax.Array) -> Action:
        """Remembers this step's metrics and the record numbers of its images, and reads those of
        the step before (`flush`)."""
        action = self.flush()
        self._pending = (step, scalars, index)
        return action

    def flush(self) -> Action:
        """Waits for the step that is remembered, and writes its metrics.

        Returns:
          Its `action`, which all hosts agree on; CONTINUE if none is remembered.

        Raises:
          RunFailedError: the step was bad (`bad_steps`).
        """
        if self._pending is None:
            return Action.CONTINUE
        (step, scalars, index), self._pending = self._pending, None
        values = {key: float(value) for key, value in jax.device_get(scalars).items()}
        finite, action = values.pop("finite"), Action(int(values.pop("action")))
        if not finite:
            self._bad_steps.take(step, values, index)
        self._bar.update(self._batch_size)
        shown = {k: f"{values[k]:.3f}" for k in ("loss", "nn_accuracy") if k in values}
        self._bar.set_postfix(shown, refresh=False)
        if self._file and self.is_due(step):
            (then, before), now = self._clock, time.monotonic()
            self._clock = (now, step)
            passed = max(now - then, 1e-9)
            rate = (step - before) * self._batch_size / passed
            times = {"images_per_second": rate, "input_wait": self._waited / passed}
            times["seconds"] = now - self._start
            self._waited = 0.0
            self._write({"stage": self._stage, "step": step, **values, **times})
        return action

    def note(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of its own; may be called from any thread."""
        entry = {"stage": self._stage, "step": step, **values}
        self._write(entry | {"seconds": time.monotonic() - self._start})

    def time_apart(self, step: int, measure: Callable, state) -> dict[str, float]:
        """Writes a line of what `measure(state)` returns, whose time does not count in the rates."""
        start = time.monotonic()
        values = measure(state)
        self.note(step, values)
        then, before = self._clock
        self._clock = (then + time.monotonic() - start, before)
        return values

    def _write(self, entry: dict) -> None:
        if self._file is None:
            return
        with self._writing:
            self._file.add(entry)
            if self._board:
                self._board.write(entry)

    def sync(self) -> None:
        """Has all lines outlast a power cut."""
        if self._file:
            self._file.sync()

    def close(self) -> None:
        self._bar.close()
        for open_one in filter(None, (self._file, self._board)):
            open_one.close()
