"""What a run says while it trains: `metrics.jsonl`, TensorBoard and a progress bar."""

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from tqdm import tqdm

from maect_jax.run import jsonl
from maect_jax.run.bad_steps import BadSteps
from maect_jax.run.board import Board


class Log:
    """Takes each step's metrics as device arrays and reads them one step late.

    So the device never waits for the host. `metrics.jsonl` gets one JSON object a line for the
    first step, every `every` steps and the last one: `stage`, `step`, scalars, `images_per_second`
    and `input_wait`, the share of the time in which the host waited for images, both since the line
    before, and `seconds`, all the time that the stage has taken, compiling included. A step that
    was not finite has null in it.

    Args:
      path: of metrics.jsonl.
      stage: its name.
      steps: of the whole stage.
      done: steps that were done before, when a stage goes on.
      batch_size: images a step.
      every: steps between two lines.
      shown: whether this process writes and draws at all (one of all processes does).
      bad_steps: takes those that were not finite.
      board: a folder for TensorBoard, `None` for none.
    """

    def __init__(
        self,
        path: Path,
        stage: str,
        steps: int,
        done: int,
        batch_size: int,
        every: int,
        shown: bool,
        bad_steps: BadSteps,
        board: Path | None = None,
    ):
        self._stage, self._steps, self._batch_size, self._every = stage, steps, batch_size, every
        self._bad_steps = bad_steps
        self._pending: tuple[int, dict, jax.Array] | None = None
        self._start = time.monotonic()
        self._clock = (self._start, done)
        self._waited = 0.0
        self._file = self._board = None
        self._writing = threading.Lock()  # a checkpoint tells of itself from its own thread
        if shown:
            before = jsonl.forget(path, stage, done)
            self._start -= max((entry.get("seconds", 0.0) for entry in before), default=0.0)
            self._file = jsonl.Lines(path)
            self._board = Board(board, before) if board else None
        self._bar = tqdm(
            total=steps * batch_size,
            initial=done * batch_size,
            desc=f"{stage:>4}",
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

    def tells(self, step: int) -> bool:
        """Whether a step gets a line in `metrics.jsonl`."""
        return step == 1 or step % self._every == 0 or step == self._steps

    def add(self, step: int, scalars: dict[str, jax.Array], index: jax.Array) -> int:
        """Remembers this step's metrics and the record numbers of its images, and reads those of
        the step before (`flush`)."""
        vote = self.flush()
        self._pending = (step, scalars, index)
        return vote

    def flush(self) -> int:
        """Waits for the step that is remembered, and writes its metrics.

        Returns:
          Its `vote`; 0 where nothing is remembered.

        Raises:
          RunFailedError: the step was bad (`bad_steps`).
        """
        if self._pending is None:
            return 0
        (step, scalars, index), self._pending = self._pending, None
        values = {key: float(value) for key, value in jax.device_get(scalars).items()}
        finite, vote = values.pop("finite"), int(values.pop("vote"))
        if not finite:
            self._bad_steps.take(step, values, index)
        self._bar.update(self._batch_size)
        shown = {k: f"{values[k]:.3f}" for k in ("loss", "nn_accuracy") if k in values}
        self._bar.set_postfix(shown, refresh=False)
        if self._file and self.tells(step):
            (then, before), now = self._clock, time.monotonic()
            self._clock = (now, step)
            passed = max(now - then, 1e-9)
            rate = (step - before) * self._batch_size / passed
            times = {"images_per_second": rate, "input_wait": self._waited / passed}
            times["seconds"] = now - self._start
            self._waited = 0.0
            self._write({"stage": self._stage, "step": step, **values, **times})
        return vote

    def note(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of its own; may be called from any thread."""
        entry = {"stage": self._stage, "step": step, **values}
        self._write(entry | {"seconds": time.monotonic() - self._start})

    def leave_out(self, seconds: float) -> None:
        """Has some seconds, which were spent on something else, not count in the rates."""
        then, before = self._clock
        self._clock = (then + seconds, before)

    def _write(self, entry: dict) -> None:
        if self._file is None:
            return
        with self._writing:
            self._file.add(entry)
            if self._board:
                self._board.write(entry)

    def keep(self) -> None:
        """Has all lines outlast a power cut."""
        if self._file:
            self._file.keep()

    def close(self) -> None:
        self._bar.close()
        for open_one in filter(None, (self._file, self._board)):
            open_one.close()
