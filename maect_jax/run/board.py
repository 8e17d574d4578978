"""The lines of `metrics.jsonl` as TensorBoard's events, by an extra package."""

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from maect_jax.errors import UserError

_KEYS = ("stage", "step")  # of a line, which are no scalars


def available() -> Callable[[Path], object]:
    """What makes a writer for a folder: clu's where TensorFlow is installed, else tensorboardX's.

    A writer has `write_scalars(step, values)` and `close()`.

    Raises:
      UserError: neither is installed (TensorFlow must have its package tensorboard).
    """
    if all(importlib.util.find_spec(name) for name in ("tensorflow", "tensorboard")):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it has much to say
        from clu.metric_writers import SummaryWriter

        return lambda folder: SummaryWriter(str(folder))
    try:
        import tensorboardX
    except ImportError as error:
        raise UserError(
            "config.tensorboard=True: wants tensorboardX (pip install 'maect_jax[tensorboard]') or "
            "TensorFlow"
        ) from error

    class Writer(tensorboardX.SummaryWriter):
        def write_scalars(self, step, values):
            for name, value in values.items():
                self.add_scalar(name, value, step)

    return lambda folder: Writer(str(folder))


class Board:
    """Events of one stage.

    They are made anew from the lines that there are when a stage goes on, so that nothing of what
    is done again comes twice, and switched on late it shows the whole.
    """

    def __init__(self, folder: Path, lines: Iterable[dict]):
        make = available()
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = make(folder)
        for line in lines:
            self.write(line)

    def write(self, line: dict) -> None:
        """Writes the numbers of a line of `metrics.jsonl`."""
        values = {key: value for key, value in line.items() if key not in _KEYS}
        finite = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
        self._writer.write_scalars(line["step"], finite)

    def close(self) -> None:
        self._writer.close()
