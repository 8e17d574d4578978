"""What a run says while it trains: `metrics.jsonl` and a progress bar."""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from tqdm import tqdm

from maect_jax import files
from maect_jax.errors import RunFailedError


def read(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; nothing where there is none."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # A last line without its end was torn by a power cut.
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _forget(path: Path, stage: str, step: int) -> float:
    """Drops the lines of `stage` past `step`: what is done again must not be told twice.

    Returns the seconds that the stage has taken up to what is left of it.
    """
    kept = [entry for entry in read(path) if entry["stage"] != stage or entry["step"] <= step]
    files.write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return max((entry["seconds"] for entry in kept if entry["stage"] == stage), default=0.0)


class Log:
    """Takes each step's metrics as device arrays and reads them one step late.

    So the device never waits for the host. `metrics.jsonl` gets one JSON object a line for the
    first step, every `every` steps and the last one: `stage`, `step`, scalars, `images_per_second`
    and `input_wait`, the share of the time in which the host waited for images, both since the line
    before, and `seconds`, all the time that the stage has taken, compiling included.

    Args:
      path: of metrics.jsonl.
      stage: its name.
      steps: of the whole stage.
      done: steps that were done before, when a stage goes on.
      batch_size: images a step.
      every: steps between two lines.
      shown: whether this process writes and draws at all (one of all processes does).
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
    ):
        self._stage, self._steps, self._batch_size, self._every = stage, steps, batch_size, every
        self._pending: tuple[int, dict] | None = None
        self._start = time.monotonic()
        self._clock = (self._start, done)
        self._waited = 0.0
        self._file = None
        if shown:
            self._start -= _forget(path, stage, done)
            self._file = path.open("a", buffering=1)
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

    def add(self, step: int, scalars: dict[str, jax.Array]) -> None:
        """Remembers this step's metrics and reads those of the step before.

        Raises:
          RunFailedError: a step was not finite.
        """
        self.flush()
        self._pending = (step, scalars)

    def flush(self) -> None:
        """Reads what is remembered; waits for that step to end. Raises as `add` does."""
        if self._pending is None:
            return
        (step, scalars), self._pending = self._pending, None
        values = {key: float(value) for key, value in jax.device_get(scalars).items()}
        if not values.pop("finite"):
            raise RunFailedError(
                f"stage {self._stage}, step {step}: the loss ({values['loss']}) or a gradient is "
                "not finite; nothing was saved after the last checkpoint"
            )
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
            entry = {"stage": self._stage, "step": step, **values, **times}
            self._file.write(json.dumps({k: _rounded(v) for k, v in entry.items()}) + "\n")

    def note(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Writes a line of its own with what was measured after a step, in so many seconds, which
        do not count in the rates."""
        then, before = self._clock
        self._clock = (then + seconds, before)
        if self._file:
            entry = {"stage": self._stage, "step": step, **values}
            entry["seconds"] = time.monotonic() - self._start
            self._file.write(json.dumps({k: _rounded(v) for k, v in entry.items()}) + "\n")

    def close(self) -> None:
        self._bar.close()
        if self._file:
            self._file.close()


def _rounded(value):
    """Seven significant digits, all that a float32 has."""
    return float(f"{value:.7g}") if isinstance(value, float) and math.isfinite(value) else value
