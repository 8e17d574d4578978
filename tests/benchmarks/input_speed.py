"""The host's part of the input: files to two views of 224 pixels, against torchvision's DataLoader.

    python -m tests.benchmarks.input_speed FOLDER [WORKERS]

FOLDER holds `train/<class>/*.jpg`; needs torch and torchvision. All sides read the same files in as
many worker processes (2) and give batches of uint8 views. They take turns: each fills its buffers,
drains them, and is then timed over three epochs. Figures are images/s, medians of five rounds.
"""

import statistics
import sys
import time

import numpy as np
import torch
from absl import flags
from torchvision import datasets
from torchvision.transforms import v2

from maect_jax.data import loader
from maect_jax.data.folder import Folder

BATCH, SIZE, SCALE, ROUNDS, BUFFERED, TIMED = 32, (224, 224), (0.08, 1.0), 5, 8, 45


def ours(folder: str, workers: int):
    """This package's loader."""
    source = Folder(f"{folder}/train")
    make = loader.TrainRecord(source, 3, SIZE, (SCALE, SCALE), (0, 0))
    order = loader.Order(len(source), BATCH, 10**6, (0, 0), range(BATCH))
    return loader.train_batches(order, make, workers)


def _views(folder: str, workers: int, transform):
    found = datasets.ImageFolder(f"{folder}/train", transform)
    options = dict(shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True)
    batches = torch.utils.data.DataLoader(found, BATCH, **options)
    while True:
        yield from batches


def _one() -> v2.Transform:
    crop = v2.RandomResizedCrop(SIZE, SCALE, interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])


class _Two:
    """Two views of one decoded image."""

    def __init__(self):
        self.view = _one()

    def __call__(self, image):
        return torch.stack([self.view(image), self.view(image)])


def one_decode(folder: str, workers: int):
    """torchvision, two views of each decoded image."""
    return _views(folder, workers, _Two())


def decode_a_view(folder: str, workers: int):
    """torchvision as it is usually called, for twice the images: each is decoded for one view."""
    single = _views(folder, workers, _one())
    while True:
        yield next(single), next(single)


def main(folder: str, workers: int) -> None:
    sides = {make.__name__: make(folder, workers) for make in (ours, one_decode, decode_a_view)}
    rates = {name: [] for name in sides}
    for round_ in range(ROUNDS + 1):  # in the first one the workers start
        for name, batches in sides.items():
            for _ in range(BUFFERED):
                next(batches)
            start = time.perf_counter()
            for _ in range(TIMED):
                next(batches)
            if round_:
                rates[name].append(TIMED * BATCH / (time.perf_counter() - start))
            time.sleep(2)  # until its buffers are full, lest it work in another's time
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(f"{workers} worker processes, numpy {np.__version__}, torch {torch.__version__}")
    for name, rate in medians.items():
        print(f"{name:15}{rate:8.0f} images/s   ours is {medians['ours'] / rate:.2f} times as fast")


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # grain's worker processes read them
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2)
