"""Training on a CPU against plain PyTorch: crops a second of each stage, both sides in one run.

    python -m benchmarks.cpu_training [mae head ct] [--steps=20] [--rounds=5] [--dtype=bfloat16]

Needs torch and torchvision. Both read the same folder of small PNG files (the packaged images, 28
pixels, RGB), make two random crops of each, and do the same work a step in fp32: masks, heads, the
search for neighbours, averages, AdamW. The peer is eager PyTorch as in `tests/helpers/torch_peer`.
The sides take turns; medians of the rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import torch
from absl import flags
from ml_collections import ConfigDict
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from benchmarks import torch_training
from configs import common
from maect_jax import main as command
from maect_jax import sharding, train
from maect_jax.data import arrays, sources
from maect_jax.stages import STAGES
from maect_jax.stages.state import create_state, state_shardings
from maect_jax.stages.step import jitted_step

IMAGES, SIDE = 4096, 28
BEFORE = 5  # steps before the first measured one


def config_of(folder: str, dtype: str = "float32") -> ConfigDict:
    """The stages at the sizes of this benchmark."""
    config = common.base("cpu_training", "Ti", patch_size=7)
    config.remat = "none"  # as PyTorch
    config.model.update(width=128, depth=6, heads=4, image_size=(SIDE, SIDE), dtype=dtype)
    config.data.update(source="folder", path=folder, short_side=SIDE, workers=os.cpu_count())
    head = dict(queue_size=4096, projector_hidden=256, projector_out=64, predictor_hidden=512)
    decoder = common.add_mae(config, batch_size=256).decoder
    decoder.update(width=64, depth=2, heads=4)
    common.add_head(config, batch_size=256).update(head)
    common.add_ct(config, batch_size=256, frozen_blocks=3).update(head)
    for stage in config.stages:
        config[stage].epochs = 10**4
    return config.lock()


def ours(config: ConfigDict, stage: str) -> Iterator[None]:
    """Steps of this package, from images to the new state."""
    images, kind = sources.make(config.data, "train", config.model.channels), STAGES[stage]
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        made = kind.for_images(config, images)
        stream = train.batches(config, kind, images, made.steps, mesh)
        state = create_state(made, jax.random.key(0), {}, mesh)
        step = jitted_step(made, state_shardings(state))
        for batch in stream:
            batch.pop("bad")
            state, metrics = step(state, sharding.put_batch(batch, mesh))
            jax.block_until_ready(metrics)
            yield


class Pictures(datasets.ImageFolder):
    """The images of a folder, without their classes."""

    def __init__(self, folder: str):
        super().__init__(f"{folder}/train")

    def __getitem__(self, index: int) -> Image.Image:
        return super().__getitem__(index)[0]


class Views(torch.utils.data.Dataset):
    """Two views of each image, random crops whose colours may change, and its number."""

    def __init__(self, pictures: Sequence[Image.Image], config: ConfigDict, stage: str):
        size, section = config.model.image_size, config[stage]
        bicubic, colours = v2.InterpolationMode.BICUBIC, section.photometric
        strengths = colours.brightness, colours.contrast, colours.saturation, colours.hue
        self.pictures, self.views = pictures, []
        for probability in colours.jitter:
            jitter = [v2.RandomApply([v2.ColorJitter(*strengths)], probability)]
            self.views.append(v2.Compose([
                v2.RandomResizedCrop(size, section.crop_scale, interpolation=bicubic),
                v2.RandomHorizontalFlip(), *(jitter if probability else []), v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(config.data.mean, config.data.std),
            ]))  # fmt: skip

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = self.pictures[index]
        return torch.stack([view(picture) for view in self.views]), index


def peer(trainer: torch_training.Trainer, stage: str, pictures: Sequence[Image.Image]) -> Iterator:
    """Steps of eager PyTorch, from images to the new weights, for as many epochs as the stage has.
    Yields the losses."""
    step = torch_training.STEPS[stage](trainer)
    section = trainer.config[stage]
    options = dict(
        shuffle=True, drop_last=True, num_workers=os.cpu_count(), persistent_workers=True
    )
    images = Views(pictures, trainer.config, stage)
    loader = torch.utils.data.DataLoader(images, section.batch_size, **options)
    for _ in range(section.epochs):
        for views, own in loader:
            yield step(views, own)


def rate(stream: Iterator, images: int, steps: int) -> float:
    """Images a second, of so many a step."""
    start = time.perf_counter()
    for _ in range(steps):
        next(stream)
    return images * steps / (time.perf_counter() - start)


def rates(streams: Mapping[str, Iterator], images: int, steps: int, rounds: int) -> dict:
    """The median images a second of each stream; they take turns."""
    found: dict[str, list[float]] = {side: [] for side in streams}
    for stream in streams.values():
        rate(stream, images, BEFORE)
    for _ in range(rounds):
        for side, stream in streams.items():
            rate(stream, images, 2)  # what is read ahead while the other side runs
            found[side].append(rate(stream, images, steps))
    return {side: statistics.median(values) for side, values in found.items()}


def write_images(folder: Path) -> None:
    source = arrays.fashion_mnist("train")
    (folder / "train").mkdir()
    (folder / "train" / "all").mkdir()
    for i in range(IMAGES):
        picture = Image.fromarray(source.images[i, ..., 0]).convert("RGB")
        picture.save(folder / "train" / "all" / f"{i}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=[*torch_training.STEPS])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", help="of our activations; the peer's is fp32")
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # grain has some
    command.keep_memory()
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name))
        config, pictures = config_of(name, arguments.dtype), Pictures(name)
        for stage in arguments.stages:
            trainer = torch_training.Trainer(config, IMAGES)
            streams = {"maect_jax": ours(config, stage), "PyTorch": peer(trainer, stage, pictures)}
            crops = 2 * config[stage].batch_size
            mine, theirs = rates(streams, crops, arguments.steps, arguments.rounds).values()
            print(f"{stage:5}{mine:7.0f} / {theirs:.0f} crops/s, {mine / theirs:.2f}", flush=True)


if __name__ == "__main__":
    main()
