"""Images that cannot be read: they are named, and too many end the run."""

import logging

import jax
import numpy as np

from maect_jax import sharding
from maect_jax.data import decode
from maect_jax.data.sources import Source
from maect_jax.errors import BadImageError, RunFailedError

_LOGGER = logging.getLogger(__name__)
_LISTED = 20


class BadImages:
    """Counts the images of a source that could not be read, on any host, and names each once.

    A run that goes on counts anew: files may have been mended since.

    Args:
      source: the images.
      channels: of the model.
      allowed: the share of all images that may be bad.
    """

    def __init__(self, source: Source, channels: int, allowed: float):
        self._source, self._channels, self._allowed = source, channels, allowed
        self._bad: set[int] = set()
        self._named: dict[int, str] = {}

    def collect(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch without its field `bad`, whose records are counted."""
        batch = dict(batch)
        self._bad |= set(batch.pop("bad").tolist()) - {-1}
        return batch

    def check(self) -> None:
        """Names in the log what was found since it was last called; all hosts must call it.

        Raises:
          RunFailedError: on all hosts, more images are bad than are allowed; the text lists them.
        """
        self._bad = sharding.gather_set(self._bad)
        for record in sorted(self._bad - self._named.keys()):
            self._named[record] = f"{self._source.name(record)}: {self._why(record)}"
            if jax.process_index() == 0:
                _LOGGER.warning("left out, as it cannot be read: %s", self._named[record])
        count, records = len(self._named), len(self._source)
        if count > self._allowed * records:
            listed = "; ".join(list(self._named.values())[:_LISTED])
            more = f"; and {count - _LISTED} more" if count > _LISTED else ""
            raise RunFailedError(
                f"{count} of {records:,} images cannot be read so far, more than the share of "
                f"config.data.max_bad_fraction={self._allowed}: {listed}{more}"
            )

    def _why(self, record: int) -> str:
        try:
            decode.pixels(self._source[record][0], self._channels)
        except (BadImageError, OSError) as error:
            return str(error)
        return "it could be read a moment later"
