"""The host's part of the input: files to two views of 224 pixels, against torchvision's DataLoader.

    python -m benchmarks.input_speed FOLDER [--workers=2] [--width=2560]

FOLDER contains `train/<class>/*.jpg`; needs torch and torchvision. All sides read the same files in
the same number of worker processes and give batches of uint8 views (`turns`).
With a width the first 64 photographs are enlarged to it, and noise replaces the missing detail.
`scaled` is this package's loader with `config.data.scaled_jpeg`; its error is the mean difference
of its pixels from those of the whole JPEG. `one_view` and `evaluation`, one random crop and the
centre of an image, are this loader's, too, and so is `multi_crop`, which has ten more views of 96
pixels, as MIM-Refiner.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from absl import flags
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from benchmarks import turns
from maect_jax.data import loader, subsets
from maect_jax.data.decode import Decoding
from maect_jax.data.folder import Folder
from maect_jax.data.transforms import Crops

SIZE, SHORT_SIDE, SCALE = (224, 224), 256, (0.08, 1.0)
TWO = Crops(SIZE, SCALE, 2)
TEN_SMALL = Crops((96, 96), (0.05, 0.25), 10)
ENLARGED, NOISE = 64, 8.0


def ours(folder: str, workers: int, batch_size: int, crops=(TWO,), scaled_jpeg: bool = False):
    """This package's loader."""
    source = Folder(f"{folder}/train")
    make = loader.TrainRecord(source, Decoding(3), crops, (0, 0), scaled_jpeg)
    order = loader.Order(len(source), batch_size, 10**6, (0, 0), range(batch_size))
    return loader.train_batches(order, make, workers)


def scaled(folder: str, workers: int, batch_size: int):
    """The same, with JPEGs decoded at a smaller scale."""
    return ours(folder, workers, batch_size, scaled_jpeg=True)


def one_view(folder: str, workers: int, batch_size: int):
    """The same, with one view of each image."""
    return ours(folder, workers, batch_size, crops=(Crops(SIZE, SCALE, 1),))


def multi_crop(folder: str, workers: int, batch_size: int):
    """The same, with ten small views more."""
    return ours(folder, workers, batch_size, crops=(TWO, TEN_SMALL))


def evaluation(folder: str, workers: int, batch_size: int):
    """The centre of each image, again and again."""
    source = Folder(f"{folder}/train")
    source = subsets.Subset(source, np.resize(np.arange(len(source)), 10**6))
    make = loader.EvalRecord(source, Decoding(3), SIZE, SHORT_SIDE)
    return loader.eval_batches(make, batch_size, workers, np.arange(batch_size))


def _views(folder: str, workers: int, batch_size: int, transform):
    images = datasets.ImageFolder(f"{folder}/train", transform)
    options = dict(shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True)
    batches = torch.utils.data.DataLoader(images, batch_size, **options)
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


def one_decode(folder: str, workers: int, batch_size: int):
    """torchvision, two views of each decoded image."""
    return _views(folder, workers, batch_size, _Two())


def decode_a_view(folder: str, workers: int, batch_size: int):
    """torchvision as usual, decoding each image once per view."""
    single = _views(folder, workers, batch_size, _one())
    while True:
        yield next(single), next(single)


def enlarged(folder: str, width: int, into: str) -> str:
    """Writes some of the photographs into another folder, `width` pixels wide."""
    rng = np.random.default_rng(0)
    for path in sorted(Path(folder).glob("train/*/*.jpg"))[:ENLARGED]:
        picture = Image.open(path).convert("RGB")
        size = (width, width * picture.height // picture.width)
        pixels = np.asarray(picture.resize(size, Image.Resampling.LANCZOS), np.float32)
        pixels += rng.normal(0, NOISE, pixels.shape)
        target = Path(into) / "train" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(pixels.clip(0, 255))).save(target, quality=90)
    return into


def error(folder: str) -> float:
    """Mean absolute difference of the views of `scaled` from those of `ours`, out of 255."""
    pairs = zip(ours(folder, 0, 32), scaled(folder, 0, 32), strict=True)
    batches = (next(pairs) for _ in range(2))
    return np.mean([np.abs(a["image"].astype(int) - b["image"]).mean() for a, b in batches])


def main(folder: str, workers: int, batch_size: int, batches: int) -> None:
    makers = (ours, scaled, one_view, multi_crop, evaluation, one_decode, decode_a_view)
    sides = {make.__name__: make(folder, workers, batch_size) for make in makers}
    print(f"{workers} worker processes, numpy {np.__version__}, torch {torch.__version__}")
    turns.compare(sides, batch_size, batches)
    print(f"pixels of scaled: {error(folder):.2f} of 255 from ours")


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # grain's worker processes read them
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--width", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.width:
            larger = enlarged(arguments.folder, arguments.width, scratch)
            main(larger, arguments.workers, batch_size=8, batches=12)
        else:
            main(arguments.folder, arguments.workers, batch_size=32, batches=45)
