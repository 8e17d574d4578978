"""Images that cannot be read: they are named, and too many end the run."""

import logging

import numpy as np

from maect_jax.data import decode
from maect_jax.data.sources import Source
from maect_jax.errors import BadImageError, RunFailedError

_LOGGER = logging.getLogger(__name__)
_LISTED = 20


class Damage:
    """Counts the images of a source that this process could not read, and names each once.

    Args:
      source: the images.
      channels: of the model.
      allowed: the share of all images that may be bad.
    """

    def __init__(self, source: Source, channels: int, allowed: float):
        self._source, self._channels, self._allowed = source, channels, allowed
        self._bad: dict[int, str] = {}

    def take(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch without its field `bad`, whose records are counted and named in the log.

        Raises:
          RunFailedError: more images are bad than are allowed; the text lists them.
        """
        batch = dict(batch)
        for record in set(batch.pop("bad").tolist()) - {-1, *self._bad}:
            self._bad[record] = f"{self._source.name(record)}: {self._why(record)}"
            _LOGGER.warning("left out, as it cannot be read: %s", self._bad[record])
        count, records = len(self._bad), len(self._source)
        if count > self._allowed * records:
            listed = "; ".join(list(self._bad.values())[:_LISTED])
            more = f"; and {count - _LISTED} more" if count > _LISTED else ""
            raise RunFailedError(
                f"{count} of {records:,} images cannot be read, more than the share of "
                f"config.data.max_bad_fraction={self._allowed}: {listed}{more}"
            )
        return batch

    def _why(self, record: int) -> str:
        try:
            decode.pixels(self._source[record][0], self._channels)
        except (BadImageError, OSError) as error:
            return str(error)
        return "it could be read a moment later"
