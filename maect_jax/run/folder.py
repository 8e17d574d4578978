"""A run's folder: whose it is, what may change when the run goes on, and one run at a time."""

import dataclasses
import logging
import os
import platform
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maect_jax import __version__, files
from maect_jax import config as configs
from maect_jax.errors import UserError
from maect_jax.run import checkpoints, lineage, lock

_LOGGER = logging.getLogger(__name__)
# Of the config, what may differ when a run goes on: how it runs and what it tells, not what it is.
# The mesh, the parts of a batch and what is computed twice change the rounding and no more.
_HARMLESS = (
    "log_level", "log_every", "tensorboard", "profile", "debug_nans", "nan_policy", "nan_limit",
    "checkpoint.", "monitor.", "mesh.", "encoder_microbatches", "remat", "data.workers",
    "data.max_bad_fraction", "eval.",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose folder is this process's.

    Attributes:
      config: of the run.
      folder: where everything that it leaves is.
      mesh: the device mesh, which is the current one.
      check_lock: raises `RunFailedError` where another process has taken the folder.
    """

    config: ConfigDict
    folder: Path
    mesh: Mesh
    check_lock: Callable[[], None]


@contextmanager
def claimed(workdir: Path, config: ConfigDict, before: lineage.Origin | None):
    """Makes a folder this run's, if it is new or was before; process 0 holds its lock.

    Writes the config, what the run runs on, and where its weights are from.

    Args:
      workdir: the run's folder; made if need be.
      config: of the run.
      before: where the first stage starts.

    Yields:
      A function that raises `RunFailedError` where another process has taken the folder.

    Raises:
      UserError: it holds another run, or one that is running; it cannot be written.
    """
    with ExitStack() as held:
        check = _nothing
        if jax.process_index() == 0:
            try:
                check = _claim(workdir, config, before, held)
            except OSError as error:
                raise UserError(f"--workdir={workdir}: cannot write there: {error}") from error
        yield check


def _nothing() -> None:
    """Of the hosts that hold no lock."""


def _claim(
    workdir: Path, config: ConfigDict, before: lineage.Origin | None, held: ExitStack
) -> Callable[[], None]:
    if workdir.parts[:1] and workdir.parts[0].endswith(":"):  # of gs://, s3://
        raise UserError(
            f"--workdir={workdir}: must be a folder; a bucket must be mounted as one (gcsfuse)"
        )
    path, environment = workdir / "config.json", _environment()
    workdir.mkdir(parents=True, exist_ok=True)
    check = held.enter_context(lock.held(workdir))
    if path.exists():
        differing = configs.differences(configs.read(path), config)
        if other := [line for line in differing if not line.startswith(_HARMLESS)]:
            raise UserError(
                f"--workdir={workdir}: holds another run ({'; '.join(other)}); name another "
                "folder, or remove that one"
            )
        changed = differing + configs.differences(
            ConfigDict(files.read_json(workdir / "environment.json")), ConfigDict(environment)
        )
        if changed:
            _LOGGER.warning("%s: goes on with a change: %s", workdir, "; ".join(changed))
    elif (workdir / checkpoints.FOLDER).exists():
        raise UserError(
            f"--workdir={workdir}: has checkpoints and no config.json, which says of what; put it "
            "back, or name another folder"
        )
    # The first may refuse, and then nothing is to be written.
    lineage.write_lineage(workdir, before.lineage() if before else [lineage.SCRATCH])
    files.write_json(workdir / "environment.json", environment)
    files.write_json(path, config.to_dict())
    return check


def _environment() -> dict:
    """What the run runs on."""
    return {
        "maect_jax": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "hosts": jax.process_count(),
        "cpu_cores": os.cpu_count(),
    }
