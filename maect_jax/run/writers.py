"""The loggers of a run beside `metrics.jsonl`: TensorBoard, Weights & Biases and MLflow.

A new one is a subclass of `Writer` and a line in `WRITERS`.
"""

import enum
import hashlib
import importlib.util
import logging
import math
import os
import queue
import re
import secrets
import shutil
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from maect_jax import config as configs
from maect_jax import files
from maect_jax.errors import STATUS, PreemptedError, RunFailedError, UserError, shown
from maect_jax.run import jsonl

_PROJECT = "maect_jax"  # where wandb and mlflow list runs, unless their variables say otherwise
_WORKDIR = "workdir"  # the parameter that has the run's folder
_RESULTS = "eval"  # before the names of results, where others have their stage
_DURABLE = 30.0  # seconds after which wandb has written a row to its file: it does every 15
_LOGGER = logging.getLogger(__name__)


class Status(enum.IntEnum):
    """How a run has ended, with its exit status."""

    FINISHED = 0
    FAILED = STATUS[RunFailedError]
    PREEMPTED = STATUS[PreemptedError]


# Seconds that a new run waits for its loggers to start: several hosts wait less, as JAX ends those
# that wait for another.
_START, _START_OF_HOSTS = 120.0, 25.0
# Seconds that the end of a run waits for its loggers; hosts that fail end together (`main`).
_PATIENCE = {Status.FINISHED: 60.0, Status.FAILED: 15.0, Status.PREEMPTED: 15.0}


class Line(NamedTuple):
    """A line of `metrics.jsonl`."""

    stage: str
    step: int
    values: Mapping[str, float]  # those that are finite
    time: float  # in seconds since 1970, when it was written


class Writer:
    """A logger at work. One thread calls it; what it raises is a warning (`_Sender`).

    A run that resumes makes a new one, and gives it all lines of the steps that were done before.
    It must show a step once, however often a line comes. `loggers/<name>.json` in the run's folder
    is for what it needs to resume.
    """

    needs: ClassVar[Sequence[Sequence[str]]]  # modules: all those of one of these groups
    hint: ClassVar[str] = ""  # what to do if it cannot start
    where: str  # it writes, for people

    def __init__(self, config: ConfigDict, folder: Path):
        raise NotImplementedError

    def add(self, line: Line) -> None:
        raise NotImplementedError

    def add_results(self, results: Mapping[str, float]) -> None:
        """Takes the results of the evaluation, by `<row>/<column>`."""
        raise NotImplementedError

    def add_pictures(self, paths: Sequence[Path]) -> None:
        """Takes the pictures of the report."""
        raise NotImplementedError

    def close(self, status: Status) -> None:
        raise NotImplementedError


class TensorBoard(Writer):
    """Events in `tensorboard/<stage>`, made anew when a run resumes."""

    needs = (("tensorflow", "tensorboard"), ("tensorboardX",))

    def __init__(self, config: ConfigDict, folder: Path):
        self._folder, self._make = folder / "tensorboard", _event_writer()
        self._events: dict[str, Any] = {}
        self.where = str(self._folder)

    def _of(self, stage: str):
        if stage not in self._events:
            shutil.rmtree(self._folder / stage, ignore_errors=True)
            self._events[stage] = self._make(str(self._folder / stage))
        return self._events[stage]

    def add(self, line: Line) -> None:
        self._of(line.stage).write_scalars(line.step, line.values)

    def add_results(self, results: Mapping[str, float]) -> None:
        self._of(_RESULTS).write_scalars(0, results)

    def add_pictures(self, paths: Sequence[Path]) -> None:
        for path in paths:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._of(_RESULTS).write_images(0, {path.stem: pixels[None]})

    def close(self, status: Status) -> None:
        for events in self._events.values():
            events.close()


def _event_writer() -> type:
    """The class of a writer for a folder: clu's if TensorFlow and tensorboard are installed, else
    one of tensorboardX with the same methods."""
    if _are_installed(TensorBoard.needs[0]):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        from clu.metric_writers import SummaryWriter

        return SummaryWriter
    import tensorboardX

    class Events(tensorboardX.SummaryWriter):
        def write_scalars(self, step, values):
            for name, value in values.items():
                self.add_scalar(name, value, step)

        def write_images(self, step, images):
            for name, pixels in images.items():
                self.add_images(name, pixels, step, dataformats="NHWC")

    return Events


class _Kept(dict):
    """What a writer keeps in a file of the run's folder."""

    def __init__(self, folder: Path, name: str):
        self._path = folder / "loggers" / f"{name}.json"
        super().__init__(files.read_json(self._path))

    def note(self, **values) -> None:
        if not values.items() <= self.items():
            self.update(values)
            self._path.parent.mkdir(exist_ok=True)
            files.write_json(self._path, dict(self))


class Wandb(Writer):
    """A run of Weights & Biases, which has a row for each step, numbered across all stages.

    wandb takes rows in ascending order only. So a row that it has already is left out, and what is
    noted of an earlier step, as when a checkpoint is saved, is in the row of the latest.
    """

    needs = (("wandb",),)
    hint = "WANDB_MODE=offline needs no network and no account"

    def __init__(self, config: ConfigDict, folder: Path):
        import wandb

        self._kept = _Kept(folder, "wandb")
        run_id = self._kept.get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        defaults: dict[str, Any] = {
            "project": _PROJECT,
            "name": folder.resolve().name,
            "dir": str(folder),
        }
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            reinit="create_new",
            config={_WORKDIR: str(folder.resolve())} | config.to_dict(),
            settings=wandb.Settings(quiet=True, finish_timeout=_PATIENCE[Status.FINISHED]),
            **{k: v for k, v in defaults.items() if f"WANDB_{k.upper()}" not in os.environ},
        )
        self._kept.note(id=run_id)
        self._image = wandb.Image
        self._stage, self._before, self._row = "", 0, 0  # `_before`: rows of earlier stages
        # The first that is not there yet: only the server knows what it got.
        self._first = self._run.starting_step
        if self._run.offline:
            self._first = self._kept.get("row", -1) + 1
            pattern = Path(self._run.dir).parents[1] / "offline-run-*"
            self.where = f"offline; wandb sync {pattern}"
        else:
            self.where = self._run.url or "nowhere, as WANDB_MODE=disabled says"
        self._last_note = time.monotonic(), self._first - 1

    def add(self, line: Line) -> None:
        if line.stage != self._stage:
            self._stage, self._before = line.stage, self._row
            self._run.define_metric(f"{line.stage}/*", step_metric=f"{line.stage}/step")
        values = {f"{line.stage}/{name}": value for name, value in line.values.items()}
        if self._before + line.step > self._row:
            self._row = self._before + line.step
            values[f"{line.stage}/step"] = line.step
        if self._row >= self._first:
            self._run.log(values, step=self._row)
            then, row = self._last_note
            if time.monotonic() - then > _DURABLE:
                self._kept.note(row=row)
                self._last_note = time.monotonic(), self._row

    def add_results(self, results: Mapping[str, float]) -> None:
        self._run.summary.update({f"{_RESULTS}/{name}": x for name, x in results.items()})

    def add_pictures(self, paths: Sequence[Path]) -> None:
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
        if digest != self._kept.get("pictures"):
            images = {f"pictures/{path.stem}": self._image(str(path)) for path in paths}
            self._row = max(self._row, self._first)
            self._run.log(images, step=self._row)
            self._kept.note(pictures=digest)

    def close(self, status: Status) -> None:
        if status is Status.PREEMPTED:
            self._run.mark_preempting()
        self._run.finish(exit_code=int(status))
        self._kept.note(row=max(self._row, self._first - 1))


class MLflow(Writer):
    """A run of MLflow, with the step of the stage for each metric."""

    needs = (("mlflow",),)
    hint = "MLFLOW_TRACKING_URI=sqlite:///mlflow.db needs no network"
    _STATUS: ClassVar = {
        Status.FINISHED: "FINISHED", Status.FAILED: "FAILED", Status.PREEMPTED: "KILLED",
    }  # fmt: skip
    _MOST = 100  # parameters in a request

    def __init__(self, config: ConfigDict, folder: Path):
        import mlflow
        from mlflow.entities import Metric, Param
        from mlflow.tracking.context.registry import resolve_tags

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # not how it makes a data base
        self._client, self._metric, kept = mlflow.MlflowClient(), Metric, _Kept(folder, "mlflow")
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
        where = _without_password(mlflow.get_tracking_uri())
        run = self._find(kept.get("id"))
        if run is None:
            if "id" in kept:
                _LOGGER.warning("mlflow: %s has no run %s; a new one begins", where, kept["id"])
            name, tags = folder.resolve().name, resolve_tags()
            run = self._client.create_run(experiment.experiment_id, run_name=name, tags=tags)
            kept.note(id=run.info.run_id)
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        # MLflow does not let a parameter change.
        values = {_WORKDIR: folder.resolve()} | configs.flat(config)
        new = values.keys() - run.data.params.keys()
        parameters = [Param(key, str(values[key])) for key in new]
        for first in range(0, len(parameters), self._MOST):
            self._client.log_batch(self._id, params=parameters[first : first + self._MOST])
        self._results = run.data.metrics
        self._steps: dict[str, set[int]] = defaultdict(set)
        for name in run.data.metrics:
            points = self._client.get_metric_history(self._id, name)
            self._steps[name] = {point.step for point in points}
        self.where = f"run {self._id} of experiment {experiment.name} in {where}"

    def _find(self, run_id: str | None):
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        try:
            run = self._client.get_run(run_id) if run_id else None
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return None
        return run if run and run.info.lifecycle_stage == "active" else None

    def _log(self, values: Mapping[str, float], step: int, seconds: float) -> None:
        # With the same time, a point that is sent again is the same.
        milliseconds = int(1000 * seconds)
        metrics = [self._metric(name, x, milliseconds, step) for name, x in values.items()]
        if metrics:
            self._client.log_batch(self._id, metrics=metrics)

    def add(self, line: Line) -> None:
        named = {f"{line.stage}/{key}": value for key, value in line.values.items()}
        new = {name: x for name, x in named.items() if line.step not in self._steps[name]}
        self._log(new, line.step, line.time)
        for name in new:
            self._steps[name].add(line.step)

    def add_results(self, results: Mapping[str, float]) -> None:
        named = {f"{_RESULTS}/{name}": value for name, value in results.items()}
        new = {name: x for name, x in named.items() if self._results.get(name) != x}
        self._log(new, 0, time.time())

    def add_pictures(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._client.log_artifact(self._id, str(path), "pictures")

    def close(self, status: Status) -> None:
        self._client.set_terminated(self._id, self._STATUS[status])


WRITERS: dict[str, type[Writer]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}


class _Sender:
    """Calls a writer in a thread of its own: training neither waits for it nor ends with it.

    A call that fails is a warning, and is made again before each later one, so that what an outage
    kept back comes when it is over, in order. With `wait`, it waits until `make` has made the
    writer, and raises what that raises, or `TimeoutError`.
    """

    def __init__(self, name: str, make: Callable[[], Writer], wait: bool):
        self._name, self._make = name, make
        self._calls: queue.SimpleQueue[Callable[[Any], None] | Status] = queue.SimpleQueue()
        self._waiting: deque[Callable[[Any], None]] = deque()
        self._writer: Writer | None = None
        self._failed = self._closed = False
        if wait:
            _in_time(self._start, _START if jax.process_count() == 1 else _START_OF_HOSTS)
        else:
            self.call(lambda _: self._start())
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _start(self) -> None:
        self._writer = self._make()
        tqdm.write(f"{self._name}: {self._writer.where}")  # beside a progress bar

    def call(self, call: Callable[[Any], None]) -> None:
        """Makes a call with the writer, soon."""
        self._calls.put(call)

    def close(self, status: Status) -> None:
        self._calls.put(status)

    def wait(self, seconds: float) -> None:
        """Waits for the end, after `close`."""
        self._thread.join(seconds)
        if self._waiting or not self._closed:
            _LOGGER.warning(
                "%s: the end of this run is not written; the same command writes it", self._name
            )
            self._failed = True  # one warning is enough

    def _work(self) -> None:
        while not isinstance(call := self._calls.get(), Status):
            self._waiting.append(call)
            self._make_calls()
        status = call
        self._make_calls()
        if self._writer:
            self._closed = self._is_made(lambda writer: writer.close(status))

    def _make_calls(self) -> None:
        """Makes the calls that wait, in order, up to one that fails."""
        while self._waiting and self._is_made(self._waiting[0]):
            self._waiting.popleft()
        if self._failed and not self._waiting:
            _LOGGER.warning("%s: is written again, with what was kept back", self._name)
            self._failed = False

    def _is_made(self, call: Callable[[Any], None]) -> bool:
        try:
            call(self._writer)
        except Exception as error:  # whatever goes wrong in a library or a network
            if not self._failed:
                _LOGGER.warning(
                    "%s: cannot be written, and is tried again at each line (%s); metrics.jsonl "
                    "has every line", self._name, _reason(error),
                )  # fmt: skip
            self._failed = True
            return False
        return True


def _in_time(call: Callable[[], None], seconds: float) -> None:
    """Makes a call. Raises what it raises, or `TimeoutError` if it takes longer."""
    ended: Future[None] = Future()

    def work():
        try:
            call()
            ended.set_result(None)
        except Exception as error:
            ended.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        ended.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(f"{error}" or f"no answer within {seconds:.0f} seconds") from error


def _without_password(text: str) -> str:
    return re.sub("//[^/@ ]*@", "//", text)


def _reason(error: Exception) -> str:
    reason = _without_password(" ".join(str(error).split())).rstrip(".")
    return shown(f"{type(error).__name__}: {reason}")


class Writers(NamedTuple):
    """All loggers of a run; processes other than the first have none. For any thread."""

    folder: Path = Path()  # of the run
    senders: tuple[_Sender, ...] = ()

    def _call(self, call: Callable[[Writer], None]) -> None:
        for sender in self.senders:
            sender.call(call)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Takes a line of `metrics.jsonl`, with `stage` and `step`."""
        scalars = {k: v for k, v in entry.items() if k not in ("stage", "step")}
        finite = {k: v for k, v in scalars.items() if v is not None and math.isfinite(v)}
        line = Line(entry["stage"], entry["step"], finite, time.time())
        self._call(lambda writer: writer.add(line))

    def catch_up(self, stage: str, done: int) -> None:
        """Takes the lines of a stage up to a step from `metrics.jsonl`: a logger may not have all
        of them. Called before the stage goes on, also if it has ended."""
        for entry in jsonl.read(self.folder / "metrics.jsonl") if self.senders else ():
            if entry["stage"] == stage and entry["step"] <= done:
                self.add(entry)

    def add_results(self, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Takes the results of the evaluation, by row and column."""
        results = {
            # In letters that all loggers take.
            re.sub(r"[^\w./ -]", "", f"{row}/{column}".replace("%", "percent")): value
            for row, values in rows.items()
            for column, value in values.items()
        }
        if results:
            self._call(lambda writer: writer.add_results(results))

    def add_pictures(self) -> None:
        """Takes the pictures of the report."""
        if paths := sorted((self.folder / "pictures").glob("*.png")):
            self._call(lambda writer: writer.add_pictures(paths))


NO_WRITERS = Writers()


def _are_installed(modules: Sequence[str]) -> bool:
    # A folder of that name, as wandb makes one, is found as well, but has no file.
    specs = map(importlib.util.find_spec, modules)
    return all(spec and spec.origin for spec in specs)


def check(config: ConfigDict) -> None:
    """Raises `UserError` if a logger's package is not installed."""
    for name in config.loggers:
        needs = WRITERS[name].needs
        if not any(map(_are_installed, needs)):
            raise UserError(
                f"config.loggers={config.loggers!r}: {name} needs the package {needs[-1][0]}: "
                f"pip install 'maect_jax[{name}]'"
            )


@contextmanager
def opened(config: ConfigDict, folder: Path) -> Iterator[Writers]:
    """Starts the loggers that a config names, on process 0, and ends them with the run. Raises
    `UserError` if one cannot be imported, or cannot start and the run is new; when a run resumes,
    that is a warning."""
    is_new, senders, status = not (folder / "metrics.jsonl").exists(), [], Status.FAILED
    names = dict.fromkeys(config.loggers) if jax.process_index() == 0 else ()
    try:
        for name in names:
            kind = WRITERS[name]
            try:
                # Here, as two threads that import at once may disturb each other.
                for module in next(filter(_are_installed, kind.needs)):
                    importlib.import_module(module)
                senders.append(_Sender(name, partial(kind, config, folder), wait=is_new))
            except Exception as error:
                what = "; ".join(filter(None, (_reason(error), kind.hint)))
                raise UserError(
                    f"config.loggers={config.loggers!r}: {name} cannot start: {what}"
                ) from error
        yield Writers(folder, tuple(senders))
        status = Status.FINISHED
    except (PreemptedError, KeyboardInterrupt):
        status = Status.PREEMPTED
        raise
    finally:
        for sender in senders:
            sender.close(status)
        end = time.monotonic() + _PATIENCE[status]
        for sender in senders:
            sender.wait(max(0.0, end - time.monotonic()))
