"""Streams of batches that are timed in turns."""

import statistics
import time
from collections.abc import Iterator

ROUNDS, BUFFERED = 5, 8


def compare(sides: dict[str, Iterator], images: int, batches: int) -> None:
    """Prints each side's images/s, the median of five rounds, and how much faster the first one is.

    In a round each side is drained of what it has made ahead, and then timed.

    Args:
      sides: endless streams by name.
      images: in a batch.
      batches: that are timed in a round.
    """
    rates = {name: [] for name in sides}
    for round_ in range(ROUNDS + 1):  # in the first one things start and compile
        for name, stream in sides.items():
            for _ in range(BUFFERED):
                next(stream)
            start = time.perf_counter()
            for _ in range(batches):
                next(stream)
            if round_:
                rates[name].append(batches * images / (time.perf_counter() - start))
            time.sleep(2)  # until its buffers are full, lest it work in another's time
    medians = {name: statistics.median(found) for name, found in rates.items()}
    first, fastest = next(iter(medians.items()))
    for name, rate in medians.items():
        print(f"{name:15}{rate:8.0f} images/s   {first} is {fastest / rate:.2f} times as fast")
