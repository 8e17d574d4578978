"""Images that cannot be read: the log names them, and too many end the run."""

import logging

import jax
import numpy as np

from maect_jax import sharding
from maect_jax.data import decode
from maect_jax.data.base import Source
from maect_jax.data.decode import Decoding
from maect_jax.errors import BadImageError, RunFailedError

_LOGGER = logging.getLogger(__name__)
_MAX_LISTED = 20


class BadImages:
    """Counts the images of a source that could not be read on any host, and names each once.

    At most the fraction `allowed` of all images may be bad. A resumed run starts from zero: files
    may have been repaired.
    """

    def __init__(self, source: Source, decoding: Decoding, allowed: float):
        self._source, self._decoding, self._allowed = source, decoding, allowed
        self._bad: set[int] = set()
        self._named: dict[int, str] = {}

    def collect(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Counts the records in the field `bad` of a batch; returns the batch without it."""
        batch = dict(batch)
        self._bad |= set(batch.pop("bad").tolist()) - {-1}
        return batch

    def check(self) -> None:
        """Logs the bad images since the last call, unless the error lists them. All hosts must
        call it.

        Raises:
          RunFailedError: on all hosts, if more images are bad than allowed; the text lists them.
        """
        self._bad = sharding.gather_set(self._bad)
        new = sorted(self._bad - self._named.keys())
        for record in new:
            try:
                decode.pixels(self._source[record][0], self._decoding)
                reason = "it could be read a moment later"
            except (BadImageError, OSError) as error:
                reason = str(error)
            self._named[record] = f"{self._source.name(record)}: {reason}"
        count, records = len(self._named), len(self._source)
        if count > self._allowed * records:
            listed = "; ".join(list(self._named.values())[:_MAX_LISTED])
            more = f"; and {count - _MAX_LISTED} more" if count > _MAX_LISTED else ""
            raise RunFailedError(
                f"{count} of {records:,} images cannot be read so far, more than the fraction "
                f"config.data.max_bad_fraction={self._allowed}: {listed}{more}; "
                "repair them or raise it"
            )
        if jax.process_index() == 0:
            for record in new:
                _LOGGER.warning("skipping an unreadable image: %s", self._named[record])
