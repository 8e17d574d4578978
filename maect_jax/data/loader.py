"""Global batches from a source, through grain.

The order is a pure function of the seed (a tuple: the run's, and the stage's number): each step
takes the next `batch_size` records of its epoch's permutation, and each process reads the rows
of that batch that its devices hold. An image's randomness derives from (seed, epoch, record) alone,
so the same crops come out on any number of hosts, workers or threads, and after any restart.
"""

import logging
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
from etils import epy

from maect_jax.data import decode, transforms
from maect_jax.data.arrays import Arrays
from maect_jax.data.base import Source
from maect_jax.data.decode import Decoding
from maect_jax.data.randaugment import randaugment
from maect_jax.data.transforms import FIELDS, Crops, Shape
from maect_jax.errors import BadImageError, RunFailedError

with epy.lazy_imports():  # when it is first used
    import grain

AUTO = -1  # as many workers as the cores and the work warrant
_BUFFERED = 4  # batches made ahead of the step
_IMAGES_PER_WORKER = 1000  # with fewer, a process takes longer to start than it saves
# Batches of a worker in shared memory: one that it makes, one in its queue, and as many on this
# side.
_SHARED_BATCHES = 4
_NUM_FIELDS = 6  # of a batch, at most
_SHM, _PAGE = Path("/dev/shm"), 4096  # shared memory; bytes that its smallest array takes
_EXIT_CODE = re.compile(r"Worker process was terminated unexpectedly with exit code (-?\d+)")
_MAX_TRIES = 100  # records in a row, to find a readable image
_LOGGER = logging.getLogger(__name__)


@lru_cache(maxsize=4)
def _permutation(seed: tuple[int, ...], epoch: int, records: int) -> np.ndarray:
    return np.random.default_rng((*seed, epoch)).permutation(records)


@lru_cache(maxsize=4)
def _epoch_seed(seed: tuple[int, ...], epoch: int) -> int:
    return int(np.random.SeedSequence((*seed, epoch)).generate_state(1)[0])


@dataclass(frozen=True)
class Order:
    """The (epoch, record) of every row that a process reads, in order of reading."""

    records: int
    batch_size: int
    steps: int
    seed: tuple[int, ...]
    rows: np.ndarray  # of each global batch, those that this process reads
    done: int = 0  # steps of an earlier call, whose batches are left out

    def __len__(self) -> int:
        return (self.steps - self.done) * len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, int]:
        step, row = divmod(int(index), len(self.rows))
        epoch, records = self.of_step(self.done + step)
        return epoch, int(records[row])

    def of_step(self, step: int) -> tuple[int, np.ndarray]:
        """The epoch of a step, and the records that this process reads in it."""
        epoch, step = divmod(step, self.records // self.batch_size)
        ranks = step * self.batch_size + np.asarray(self.rows)
        return epoch, _permutation(self.seed, epoch, self.records)[ranks]


@dataclass(frozen=True)
class TrainRecord:
    """Turns (epoch, record) into one training example.

    Images of one shape are passed on whole, in `image`, for the device to cut (`augment.views`);
    others are cut here: `FIELDS`, uint8 `[V, H, W, C]`, have the crops of each size. Further
    fields: `index`, `label`, `seed`; and `bad`, -1 unless the record could not be read and the next
    readable one takes its place (see `BadImages`).
    """

    source: Source
    decoding: Decoding
    crops: tuple[Crops, ...]  # at most as many sizes as `FIELDS`
    seed: tuple[int, ...]
    scaled_jpeg: bool = False  # decodes JPEG files no larger than the crops need

    @property
    def whole(self) -> bool:
        """Whether images are passed on whole."""
        return self.source.shape is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels of an example."""
        if self.whole and self.source.shape:
            return math.prod(self.source.shape)
        pixels = sum(crops.count * math.prod(crops.size) for crops in self.crops)
        return pixels * self.decoding.channels

    def __call__(self, key: tuple[int, int]) -> dict[str, np.ndarray | np.generic]:
        epoch, record = key
        for tries in range(_MAX_TRIES):
            index = (record + tries) % len(self.source)
            try:
                content, label = self.source[index]
                if self.whole:
                    images = {"image": decode.pixels(content, self.decoding)}
                else:
                    images = self._views(np.random.default_rng((*self.seed, *key)), content)
                break
            except (BadImageError, OSError) as error:
                reason = error
        else:
            raise RunFailedError(
                f"{_MAX_TRIES} images in a row cannot be read, the last one "
                f"{self.source.name(index)}: {reason}"
            )
        numbers = {"index": index, "label": label, "bad": -1 if index == record else record}
        seed = np.array([_epoch_seed(self.seed, epoch), record], np.uint32)
        return {**images, "seed": seed, **{k: np.int32(v) for k, v in numbers.items()}}

    def _views(self, rng: np.random.Generator, image) -> dict[str, np.ndarray]:
        if not self.scaled_jpeg:
            image = decode.pixels(image, self.decoding)
        # Of the whole image, which may be decoded smaller.
        shape = decode.shape(image, self.decoding)
        each = [crops for crops in self.crops for _ in range(crops.count)]
        boxes = [transforms.random_crop_box(rng, shape, crops.scale) for crops in each]
        flips, sizes = rng.random(len(boxes)) < 0.5, [crops.size for crops in each]
        image = decode.pixels(image, self.decoding, transforms.min_scale(boxes, sizes))

        def view(box, size, flip):
            crop = transforms.crop_resize(image, box, size, shape)
            return transforms.mirrored(crop) if flip else crop

        views = map(view, boxes, sizes, flips)
        return {
            field: np.stack([*islice(views, crops.count)])
            for field, crops in zip(FIELDS, self.crops, strict=False)
        }


@dataclass(frozen=True)
class FinetuneRecord(TrainRecord):
    """`TrainRecord` for fine-tuning: RandAugment works on crops, so every image is cut here."""

    mean: tuple[float, ...] | None = None  # the fill colour, in [0, 1]; None for no RandAugment
    whole = False

    def _views(self, rng: np.random.Generator, image) -> dict[str, np.ndarray]:
        views = super()._views(rng, image)
        if self.mean is None:
            return views
        return {
            field: np.stack([randaugment(rng, view, self.mean) for view in of_size])
            for field, of_size in views.items()
        }


@dataclass(frozen=True)
class EvalRecord:
    """Turns a record number into its centre crop; numbers past the end give padding.

    Fields: `image`, `label`, `index`, `valid`, and `bad` as in training: an image that cannot be
    read is black and not valid.
    """

    source: Source
    decoding: Decoding
    size: Shape
    short_side: int

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels of an example."""
        return math.prod(self.size) * self.decoding.channels

    def __call__(self, record: int) -> dict[str, np.ndarray | np.generic]:
        crop, label, bad = np.zeros((*self.size, self.decoding.channels), np.uint8), -1, -1
        exists = record < len(self.source)
        try:
            if exists:
                image, label = self.source[record]
                pixels = decode.pixels(image, self.decoding)
                crop = transforms.centre_crop(pixels, self.short_side, self.size)
        except (BadImageError, OSError):
            bad = record
        numbers = {"label": np.int32(label), "index": np.int32(record), "bad": np.int32(bad)}
        return {"image": crop, **numbers, "valid": np.bool_(exists and bad < 0)}


Batches = Iterator[dict[str, np.ndarray]]  # of stacked arrays, by field; has `close()`


def train_batches(order: Order, make_example: TrainRecord, workers: int) -> Batches:
    """Yields this process's part of each global batch.

    The examples are made in so many processes, in threads if `workers` is 0 (`num_workers` for
    `AUTO`); those of images in memory always in threads, or, if they are passed on whole, in one
    thread that makes a batch at a time.
    """
    source = make_example.source
    if not (isinstance(source, Arrays) and make_example.whole):
        return _stream(order, make_example, len(order.rows), workers)

    def batch(step: int) -> dict[str, np.ndarray]:
        epoch, records = order.of_step(step)
        epoch_seed = np.full_like(records, _epoch_seed(make_example.seed, epoch))
        return {
            "image": source.images[records],
            "seed": np.stack([epoch_seed, records], axis=1).astype(np.uint32),
            "index": records.astype(np.int32),
            "label": source.labels[records].astype(np.int32),
            "bad": np.full(len(records), -1, np.int32),
        }

    dataset = grain.MapDataset.range(order.done, order.steps).map(batch)
    return _closing(dataset.to_iter_dataset(grain.ReadOptions(1, _BUFFERED)))


def eval_batches(
    make_example: EvalRecord, batch_size: int, workers: int, rows: np.ndarray, first: int = 0
) -> Batches:
    """Yields every image once, in order, in this process's `rows` of each global batch, from batch
    number `first` on. The last batch is padded to `batch_size` with rows whose `valid` is false.
    """
    steps = -(-len(make_example.source) // batch_size)
    records = np.arange(steps * batch_size).reshape(steps, batch_size)[first:, rows]
    return _stream(records.ravel(), make_example, len(rows), workers)


def _batch(
    keys: Order | np.ndarray, make: Callable[..., dict], rows: int, number: int
) -> dict[str, np.ndarray]:
    """The examples of the keys of a batch, `rows` of them, stacked by field."""
    examples = [make(keys[i]) for i in range(number * rows, (number + 1) * rows)]
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _stream(
    keys: Order | np.ndarray, make: TrainRecord | EvalRecord, rows: int, workers: int
) -> Batches:
    """Yields the examples of some keys, in batches of `rows`, made ahead."""
    # A batch at a time: grain's own work for each image would take a fifth of that of small ones.
    dataset = grain.MapDataset.range(len(keys) // rows).map(partial(_batch, keys, make, rows))
    if make.source.in_memory:
        workers = 0
    if workers == AUTO:
        workers = num_workers(len(keys))
    if workers:
        workers = _that_fit(workers, batch_bytes=rows * make.nbytes)
    if not workers:
        return _closing(dataset.to_iter_dataset(grain.ReadOptions(_BUFFERED, _BUFFERED)))
    # Python's resource tracker frees the shared memory of unread batches at the end, with a warning
    # on the terminal.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    _start_resource_tracker()
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
    ahead = dataset.to_iter_dataset(grain.ReadOptions(1, 1))
    return _closing(ahead.mp_prefetch(options, _init_worker))


def _start_resource_tracker() -> None:
    """Starts Python's process that frees shared memory deaf to SIGHUP, as it is to SIGINT and
    SIGTERM: a terminal sends it to all processes, and batches are still to be made."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set signals
        return
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    resource_tracker.ensure_running()
    signal.signal(signal.SIGHUP, handler)


def _closing(dataset) -> Batches:
    """Yields the elements of a dataset of grain, and ends its workers at the end. Raises
    `RunFailedError` if a worker was killed."""
    stream = iter(dataset)
    try:
        yield from stream
    except RuntimeError as error:
        if not (killed := _EXIT_CODE.search(str(error))):
            raise
        raise RunFailedError(_reason(int(killed[1]))) from error
    finally:
        stream.close()


def _reason(code: int) -> str:
    """What the exit code of a worker that was killed means, and what to do."""
    how = f"a worker process that reads images has ended with exit code {code}"
    threads = "config.data.workers=0 reads in threads of the main process"
    if code == -signal.SIGBUS:
        return f"{how}: {_SHM} is full. In a container, set --shm-size=8g; {threads}"
    if code == -signal.SIGKILL:
        return f"{how}: it was killed, as where memory runs out. Set fewer config.data.workers"
    return f"{how}. {threads}"


def num_workers(images: int) -> int:
    """The number of worker processes, 0 for threads, that so many images warrant here.

    One core is left to the main process. A single worker is no faster than threads, since decoding
    and resizing leave Python to other threads.
    """
    workers = min(cores() - 1, images // _IMAGES_PER_WORKER)
    return workers if workers > 1 else 0


def cores() -> int:
    """The cores that this process may use: by its affinity, and by the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("0::/")[2].strip()
        path = Path("/sys/fs/cgroup", group, "cpu.max")
        quota, period = map(int, path.read_text(encoding="utf-8").split())
    except (OSError, ValueError):  # no such groups; "max", no quota
        return cores
    return min(cores, max(1, quota // period))


def _that_fit(workers: int, batch_bytes: int) -> int:
    """The most of `workers` processes whose batches fit into the free shared memory, 0 for threads.

    A worker that fills it is killed. Docker gives a container 64 MB. Fewer than were asked for are
    at least two (`num_workers`).
    """
    if sys.platform != "linux":
        return workers
    needed = _SHARED_BATCHES * (batch_bytes + _NUM_FIELDS * _PAGE)
    try:
        memory = os.statvfs(_SHM)
        free = memory.f_bavail * memory.f_frsize if os.access(_SHM, os.W_OK) else 0
    except OSError:
        free = 0
    fitting = min(workers, free // needed)
    if fitting < workers:
        fitting = fitting if fitting > 1 else 0
        _say_shared_memory(workers, fitting)
    return fitting


@lru_cache(maxsize=1)  # an evaluation has a stream for each row and split
def _say_shared_memory(workers: int, fitting: int) -> None:
    instead = f"{fitting} of them" if fitting else "threads"
    _LOGGER.warning(
        "%s has too little free for the batches of %d workers: %s read the images. In a container, "
        "--shm-size gives it more.", _SHM, workers, instead,
    )  # fmt: skip


def _init_worker(*_) -> None:
    """Ignores the signals that a terminal or a scheduler sends to all processes while the main one
    still needs batches; exits when the main process ends, however it ends."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def follow(main):
        main.join()
        os._exit(1)

    if main := multiprocessing.parent_process():
        threading.Thread(target=follow, args=[main], daemon=True).start()
