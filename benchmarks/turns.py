"""Times streams of batches in turns."""

import statistics
import time
from collections.abc import Iterator

ROUNDS, BUFFERED = 5, 8


def compare(sides: dict[str, Iterator], images: int, batches: int) -> None:
    """Prints each stream's images/s, the median of five rounds, and the first one's speed-up.

    In each round the buffered batches of a stream are read first, then the timed ones.

    Args:
      sides: endless streams by name.
      images: per batch.
      batches: timed per round.
    """
    rates = {name: [] for name in sides}
    for round_ in range(ROUNDS + 1):  # the first one is for start-up and compilation
        for name, stream in sides.items():
            for _ in range(BUFFERED):
                next(stream)
            start = time.perf_counter()
            for _ in range(batches):
                next(stream)
            if round_:
                rates[name].append(batches * images / (time.perf_counter() - start))
            time.sleep(2)  # until its buffers are full, so that it does not run during the next
    medians = {name: statistics.median(values) for name, values in rates.items()}
    first, fastest = next(iter(medians.items()))
    for name, rate in medians.items():
        print(f"{name:15}{rate:8.0f} images/s   {first} is {fastest / rate:.2f} times as fast")
