"""A profile of some steps, by jax.profiler, to be looked at in XProf."""

from collections.abc import Callable
from pathlib import Path

import jax


class Trace:
    """Traces the steps from the first to the last of `steps`, `()` for none, into a folder."""

    def __init__(self, steps: tuple[int, ...], folder: Path, stage: str):
        self._first, self._last = steps or (None, None)
        self._folder, self._stage, self._running = folder, stage, False

    def run(self, step: int, update: Callable, *arguments):
        """`update(*arguments)`, which is the step of that number."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation(self._stage, step_num=step):
            results = update(*arguments)
        if step == self._last:
            jax.block_until_ready(results)
            self.close()
        return results

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
