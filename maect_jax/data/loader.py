"""Global batches from a source, through grain.

The order is a pure function of the seed (a tuple: the run's, and the stage's number): step s
takes the next `batch_size` records of its epoch's permutation, and each process reads the rows
of that batch that its devices hold. An image's randomness derives from (seed, epoch, record) alone,
so the same crops come out on any number of hosts, workers or threads, and after any restart.
"""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import grain
import numpy as np

from maect_jax.data import decode, transforms
from maect_jax.data.arrays import Arrays
from maect_jax.data.randaugment import randaugment
from maect_jax.data.sources import Source
from maect_jax.data.subsets import Subset
from maect_jax.errors import BadImageError, RunFailedError

_AHEAD = 4  # batches made ahead of the step
_TRIED = 100  # images in a row, for one that can be read


def _stream(dataset: grain.MapDataset, rows: int, workers: int):
    """Batches of `rows` examples, made ahead in `workers` processes, or in threads for 0."""
    dataset = dataset.batch(rows)
    if not workers:
        return iter(dataset.to_iter_dataset(grain.ReadOptions(_AHEAD, _AHEAD)))
    # Batches that are under way at the end are in shared memory, which Python's own process frees
    # then, with a warning to whoever looks at the terminal.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    processes = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
    return iter(
        dataset.to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(processes, _init_worker)
    )


def _init_worker(*_) -> None:
    """Leaves SIGTERM and SIGINT to the main process, which a terminal or a scheduler signals as
    well, and which still wants batches; and ends with it, however that ends."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def follow(main):
        main.join()
        os._exit(1)

    if main := multiprocessing.parent_process():
        threading.Thread(target=follow, args=[main], daemon=True).start()


def _in_memory(source: Source) -> bool:
    """Whether the images are in memory: each worker process would hold all of them."""
    return isinstance(source.source if isinstance(source, Subset) else source, Arrays)


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
        epoch, records = self.of_step(step)
        return epoch, int(records[row])

    def of_step(self, step: int) -> tuple[int, np.ndarray]:
        """The epoch of a step, and the records that this process reads in it."""
        epoch, step = divmod(step, self.records // self.batch_size)
        places = step * self.batch_size + np.asarray(self.rows)
        return epoch, _permutation(self.seed, epoch, self.records)[places]


def _readable(source: Source, record: int, make: Callable) -> tuple[np.ndarray, int, int]:
    """`make(image)` and the label of a record, or of the next that can be read, and which it is.

    Raises:
      RunFailedError: so many in a row cannot be read that something else must be wrong.
    """
    for later in range(_TRIED):
        found = (record + later) % len(source)
        try:
            image, label = source[found]
            return make(image), label, found
        except (BadImageError, OSError) as error:
            reason = error
    raise RunFailedError(
        f"{_TRIED} images in a row cannot be read, the last one {source.name(found)}: {reason}"
    )


@lru_cache(maxsize=4)
def _epoch_seed(seed: tuple[int, ...], epoch: int) -> int:
    return int(np.random.SeedSequence((*seed, epoch)).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class TrainRecord:
    """Turns (epoch, record) into one training example with `len(scales)` views.

    Images of one shape travel whole, for the device to cut (`augment.views`); others are cut here.
    Fields: `image`, `index`, `label`, `seed`; `bad` is the record where it could not be read and
    the next one stands for it, else -1 (see `damage`). With `scaled_jpeg`, JPEG files of which the
    crops need fewer pixels than there are come smaller out of the decoder.
    """

    source: Source
    channels: int
    size: tuple[int, int]
    scales: tuple[tuple[float, float], ...]
    seed: tuple[int, ...]
    scaled_jpeg: bool = False

    def __call__(self, where: tuple[int, int]) -> dict[str, np.ndarray]:
        epoch, record = where
        image, label, found = _readable(self.source, record, partial(self._make, where))
        numbers = {"index": found, "label": label, "bad": -1 if found == record else record}
        seed = np.array([_epoch_seed(self.seed, epoch), record], np.uint32)
        return {"image": image, "seed": seed, **{k: np.int32(v) for k, v in numbers.items()}}

    @property
    def whole(self) -> bool:
        """Whether images travel whole."""
        return self.source.shape is not None

    def _make(self, where: tuple[int, int], image) -> np.ndarray:
        if self.whole:
            return decode.pixels(image, self.channels)
        return self._views(np.random.default_rng((*self.seed, *where)), image)

    def _views(self, rng: np.random.Generator, image) -> np.ndarray:
        if not self.scaled_jpeg:
            image = decode.pixels(image, self.channels)
        shape = decode.shape(image)  # before the image is decoded, where it may come out smaller
        boxes = [transforms.random_crop_box(rng, shape, s) for s in self.scales]
        flips = rng.random(len(boxes)) < 0.5
        image = decode.pixels(image, self.channels, transforms.smallest_scale(boxes, self.size))
        views = [transforms.crop_resize_shrunk(image, shape, box, self.size) for box in boxes]
        return np.stack([v[:, ::-1] if flip else v for v, flip in zip(views, flips, strict=True)])


@dataclasses.dataclass(frozen=True)
class FinetuneRecord(TrainRecord):
    """`TrainRecord` for fine-tuning: every image is cut here, also one of those of one shape, as
    RandAugment, which works on the crop, needs Pillow.

    `mean` is the data set's, in [0, 1], for RandAugment to fill in; `None` for no RandAugment.
    """

    mean: tuple[float, ...] | None = None

    @property
    def whole(self) -> bool:
        """Never."""
        return False

    def _views(self, rng: np.random.Generator, image) -> np.ndarray:
        views = super()._views(rng, image)
        if self.mean is None:
            return views
        return np.stack([randaugment(rng, view, self.mean) for view in views])


@dataclasses.dataclass(frozen=True)
class ArrayBatch:
    """Turns a step into what `TrainRecord` makes of its records, at once, of images in memory."""

    order: Order
    source: Arrays
    seed: tuple[int, ...]

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        epoch, records = self.order.of_step(step)
        epoch_seed = np.full_like(records, _epoch_seed(self.seed, epoch))
        return {
            "image": self.source.images[records],
            "seed": np.stack([epoch_seed, records], axis=1).astype(np.uint32),
            "index": records.astype(np.int32),
            "label": self.source.labels[records].astype(np.int32),
            "bad": np.full(len(records), -1, np.int32),
        }


def train_batches(order: Order, make_example: TrainRecord, workers: int):
    """An iterator over this process's part of each global batch, as dicts of stacked arrays.

    Its `get_state()` (plain JSON) and `set_state()` hold the position. With `workers` > 0 the
    examples are made in that many processes, else in threads; those of images that are in memory
    in threads, or in one where they travel whole.
    """
    source = make_example.source
    if isinstance(source, Arrays) and make_example.whole:
        batch = ArrayBatch(order, source, make_example.seed)
        dataset = grain.MapDataset.range(order.steps).map(batch)
        return iter(dataset.to_iter_dataset(grain.ReadOptions(1, _AHEAD)))
    dataset = grain.MapDataset.source(order).map(make_example)
    return _stream(dataset, len(order.rows), 0 if _in_memory(source) else workers)


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
    make_example: EvalRecord,
    batch_size: int,
    workers: int,
    rows: Sequence[int],
    first: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Every image once, in order, in this process's `rows` of each global batch, from batch number
    `first` on.

    The last batch is filled up to `batch_size` with rows whose `valid` is false.
    """
    steps = -(-len(make_example.source) // batch_size)
    records = np.arange(steps * batch_size).reshape(steps, batch_size)[first:, rows]
    dataset = grain.MapDataset.source(records.ravel()).map(make_example)
    return _stream(dataset, len(rows), 0 if _in_memory(make_example.source) else workers)
