"""Global batches from a source, through grain.

The order is a pure function of the seed (a tuple: the run's, and the stage's number): step s
takes the next `batch_size` records of its epoch's permutation, and each process reads the rows
of that batch that its devices hold. An image's randomness derives from (seed, epoch, record) alone,
so the same crops come out on any number of hosts, workers or threads, and after any restart.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import lru_cache

import grain
import numpy as np

from maect_jax.data import decode, transforms
from maect_jax.data.arrays import Arrays
from maect_jax.data.sources import Source
from maect_jax.errors import BadImageError, RunFailedError

_AHEAD = 4  # batches made ahead of the step
_TRIED = 100  # images in a row, for one that can be read


def _stream(dataset: grain.MapDataset, rows: int, workers: int):
    """Batches of `rows` examples, made ahead in `workers` processes, or in threads for 0."""
    dataset = dataset.batch(rows)
    if not workers:
        return iter(dataset.to_iter_dataset(grain.ReadOptions(_AHEAD, _AHEAD)))
    processes = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(processes))


def _processes(source: Source, workers: int) -> int:
    """None for images that are in memory: each process would hold them all."""
    return 0 if isinstance(source, Arrays) else workers


@lru_cache(maxsize=4)
def _permutation(seed: tuple[int, ...], epoch: int, records: int) -> np.ndarray:
    return np.random.default_rng((*seed, epoch)).permutation(records)


@dataclasses.dataclass(frozen=True)
class Order:
    """The (epoch, record) of every row that a process reads, in order of reading."""

    records: int
    batch_size: int
    steps: int
    seed: tuple[int, ...]
    rows: Sequence[int]  # of each global batch, those that this process reads

    def __len__(self) -> int:
        return self.steps * len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, int]:
        step, row = divmod(int(index), len(self.rows))
        epoch, step = divmod(step, self.records // self.batch_size)
        place = step * self.batch_size + self.rows[row]
        return epoch, int(_permutation(self.seed, epoch, self.records)[place])


def _readable(source: Source, record: int, channels: int) -> tuple[np.ndarray, int, int]:
    """The pixels and the label of a record, or of the next one that can be read, and which it is.

    Raises:
      RunFailedError: so many in a row cannot be read that something else must be wrong.
    """
    for later in range(_TRIED):
        found = (record + later) % len(source)
        try:
            image, label = source[found]
            return decode.pixels(image, channels), label, found
        except (BadImageError, OSError) as error:
            reason = error
    raise RunFailedError(
        f"{_TRIED} images in a row cannot be read, the last one {source.name(found)}: {reason}"
    )


@dataclasses.dataclass(frozen=True)
class TrainRecord:
    """Turns (epoch, record) into one training example with `len(scales)` views.

    Images of one shape travel whole, with the boxes to cut (the device cuts them, see
    `augment.views`); others are cut here. Fields: `image`, `index`, `label`, `seed`, and `box`
    and `flip` for whole images; `bad` is the record where it could not be read and the next one
    stands for it, else -1 (see `damage`).
    """

    source: Source
    channels: int
    size: tuple[int, int]
    scales: tuple[tuple[float, float], ...]
    seed: tuple[int, ...]

    def __call__(self, where: tuple[int, int]) -> dict[str, np.ndarray]:
        epoch, record = where
        rng = np.random.default_rng((*self.seed, epoch, record))
        image, label, found = _readable(self.source, record, self.channels)
        boxes = [transforms.random_crop_box(rng, image.shape[:2], s) for s in self.scales]
        flips = rng.random(len(boxes)) < 0.5
        example = {
            "index": np.int32(found),
            "label": np.int32(label),
            "seed": rng.integers(2**32, size=2, dtype=np.uint32),
            "bad": np.int32(-1 if found == record else record),
        }
        if self.source.shape is not None:
            return example | {"image": image, "box": np.int32(boxes), "flip": flips}
        views = [transforms.crop_resize(image, box, self.size) for box in boxes]
        views = [v[:, ::-1] if flip else v for v, flip in zip(views, flips, strict=True)]
        return example | {"image": np.stack(views)}


def train_batches(order: Order, make_example: TrainRecord, workers: int):
    """An iterator over this process's part of each global batch, as dicts of stacked arrays.

    Its `get_state()` (plain JSON) and `set_state()` hold the position. With `workers` > 0 the
    examples are made in that many processes, else in threads.
    """
    dataset = grain.MapDataset.source(order).map(make_example)
    return _stream(dataset, len(order.rows), _processes(make_example.source, workers))


@dataclasses.dataclass(frozen=True)
class EvalRecord:
    """Turns a record number into its centre crop; numbers past the end give padding.

    Fields: `image`, `label`, `index`, `valid`, and `bad` as in training: an image that cannot be
    read is black and not valid.
    """

    source: Source
    channels: int
    size: tuple[int, int]
    short_side: int

    def __call__(self, record: int) -> dict[str, np.ndarray]:
        crop, label, bad = np.zeros((*self.size, self.channels), np.uint8), -1, -1
        if record < len(self.source):
            try:
                image, label = self.source[record]
                pixels = decode.pixels(image, self.channels)
                crop = transforms.centre_crop(pixels, self.short_side, self.size)
            except (BadImageError, OSError):
                bad = record
        valid = record < len(self.source) and bad < 0
        numbers = {"label": label, "index": record, "bad": bad}
        numbers = {key: np.int32(value) for key, value in numbers.items()}
        return {"image": crop, **numbers, "valid": np.bool_(valid)}


def eval_batches(
    make_example: EvalRecord, batch_size: int, workers: int, rows: Sequence[int]
) -> Iterator[dict[str, np.ndarray]]:
    """Every image once, in order, in this process's `rows` of each global batch.

    The last batch is filled up to `batch_size` with rows whose `valid` is false.
    """
    steps = -(-len(make_example.source) // batch_size)
    records = np.arange(steps * batch_size).reshape(steps, batch_size)[:, rows]
    dataset = grain.MapDataset.source(records.ravel()).map(make_example)
    return _stream(dataset, len(rows), _processes(make_example.source, workers))
