"""Small images: arrays to two views in the step, against the same recipe on Pillow images.

    python -m benchmarks.device_views

Images of 32 pixels, batches of 256, MAE-CT_aug's recipe for both views; needs torch and
torchvision. Ours reads the arrays in a thread and does the rest on the device, as in a training
step: boxes, crops, flips, colours. torchvision's DataLoader makes the views one by one from Pillow
images, with one worker process per core.
"""

import os

import jax
import numpy as np
import torch
from absl import flags
from PIL import Image, ImageFilter
from torchvision.transforms import v2

from benchmarks import turns
from maect_jax import config as configs
from maect_jax import train
from maect_jax.data import arrays, augment
from maect_jax.stages import STAGES

BATCH, IMAGES = 256, 10_000
CONFIG = str(configs.FOLDER / "head_aug_vitb16.py")


def ours(pixels: np.ndarray):
    """This package's loader and its views on the device."""
    config = configs.load(CONFIG, ["model.image_size=(32, 32)", f"head.batch_size={BATCH}"])
    source = arrays.Arrays(pixels, np.zeros(len(pixels), np.int32), [])
    stage = STAGES["head"].from_config(config, len(source))
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"))
    make_views = jax.jit(lambda batch: augment.views(batch, stage.recipes[0]))
    for batch in train.batches(config, STAGES["head"], source, 10**6, mesh):
        del batch["bad"]
        yield jax.block_until_ready(make_views(batch))


class _Blur:
    """Pillow's Gaussian blur, with a random sigma."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2)))


def _view(blur: float, solarize: float) -> v2.Transform:
    return v2.Compose([
        v2.RandomResizedCrop(32, (0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        v2.RandomApply([_Blur()], blur),
        v2.RandomGrayscale(0.2),
        v2.RandomSolarize(128, solarize),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip


class _Images(torch.utils.data.Dataset):
    def __init__(self, pixels: np.ndarray):
        self.pixels, self.views = pixels, (_view(1.0, 0.0), _view(0.1, 0.2))

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        image = Image.fromarray(self.pixels[i])
        return torch.stack([view(image) for view in self.views])


def pillow(pixels: np.ndarray):
    """torchvision's transforms of Pillow images, one image after another."""
    options = dict(shuffle=True, drop_last=True, num_workers=os.cpu_count())
    batches = torch.utils.data.DataLoader(
        _Images(pixels), BATCH, persistent_workers=True, **options
    )
    while True:
        yield from batches


def main() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)
    sides = {make.__name__: make(pixels) for make in (ours, pillow)}
    print(f"{os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}")
    turns.compare(sides, BATCH, batches=30)


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    main()
