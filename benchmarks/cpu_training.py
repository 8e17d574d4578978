"""Training on a CPU against plain PyTorch: crops a second of each stage, both sides in one run.

    python -m benchmarks.cpu_training [mae head ct] [--steps=20] [--rounds=5] [--dtype=bfloat16]

Needs torch and torchvision. Both read the same folder of small PNG files (the packaged images, 28
pixels, RGB), make two random crops of each, and do the same work a step in fp32: masks, heads, the
search for neighbours, averages, AdamW. The peer is eager PyTorch as in `tests/helpers/torch_peer`.
The sides take turns; medians of the rounds.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
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

IMAGES = 4096
SIZES = torch_training.Sizes(
    batch=256, image=28, patch=7, width=128, depth=6, heads=4, decoder=(64, 2, 4), projector=256,
    out=64, predictor=512, queue=4096,
)  # fmt: skip
BEFORE = 5  # steps before the first measured one


def config_of(stage: str, folder: str, dtype: str = "float32") -> ConfigDict:
    """The config of a stage at the sizes of this benchmark."""
    config = common.base("cpu_training", "Ti", patch_size=SIZES.patch)
    config.stages = (stage,)
    config.remat = "none"  # as PyTorch
    config.model.update(
        width=SIZES.width,
        depth=SIZES.depth,
        heads=SIZES.heads,
        image_size=(SIZES.image,) * 2,
        dtype=dtype,
    )
    config.data.update(source="folder", path=folder, short_side=SIZES.image, workers=os.cpu_count())
    head = dict(
        queue_size=SIZES.queue,
        projector_hidden=SIZES.projector,
        projector_out=SIZES.out,
        predictor_hidden=SIZES.predictor,
    )
    if stage == "mae":
        common.add_mae(config, batch_size=SIZES.batch).decoder.update(
            dict(zip(("width", "depth", "heads"), SIZES.decoder, strict=True))
        )
    elif stage == "head":
        common.add_head(config, batch_size=SIZES.batch).update(head)
    else:
        common.add_ct(config, batch_size=SIZES.batch, frozen_blocks=SIZES.depth // 2).update(head)
    config[stage].epochs = 10**4
    return config.lock()


def ours(name: str, folder: str, dtype: str = "float32") -> Iterator[None]:
    """Steps of this package, from files to the new state."""
    config = config_of(name, folder, dtype)
    images, kind = sources.make(config.data, "train", 3), STAGES[name]
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        stage = kind.for_images(config, images)
        stream = train.batches(config, kind, images, stage.steps, mesh)
        state = create_state(stage, jax.random.key(0), {}, mesh)
        step = jitted_step(stage, state_shardings(state))
        for batch in stream:
            batch.pop("bad")
            state, metrics = step(state, sharding.put_batch(batch, mesh))
            jax.block_until_ready(metrics)
            yield


class Views:
    """Two views of an image, and its number."""

    def __init__(self, scale: tuple[float, float]):
        crop = v2.RandomResizedCrop(SIZES.image, scale, interpolation=v2.InterpolationMode.BICUBIC)
        self.view = v2.Compose([
            crop, v2.RandomHorizontalFlip(), v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ])  # fmt: skip

    def __call__(self, image):
        return torch.stack([self.view(image), self.view(image)])


class Numbered(datasets.ImageFolder):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], index


def batches(folder: str, scale: tuple[float, float]) -> Iterator:
    images = Numbered(f"{folder}/train", Views(scale))
    options = dict(
        shuffle=True, drop_last=True, num_workers=os.cpu_count(), persistent_workers=True
    )
    loader = torch.utils.data.DataLoader(images, SIZES.batch, **options)
    for _ in itertools.count():
        yield from loader


def peer(stage: str, folder: str) -> Iterator[None]:
    """Steps of eager PyTorch, from files to the new weights."""
    step = torch_training.STEPS[stage](torch_training.Trainer(SIZES))
    for views, own in batches(folder, (0.2, 1.0) if stage == "mae" else (0.08, 1.0)):
        step(views, own)
        yield


def rate(stream: Iterator[None], steps: int) -> float:
    """Crops a second."""
    start = time.perf_counter()
    for _ in range(steps):
        next(stream)
    return 2 * SIZES.batch * steps / (time.perf_counter() - start)


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
        for stage in arguments.stages:
            streams = {
                "maect_jax": ours(stage, name, arguments.dtype),
                "PyTorch": peer(stage, name),
            }
            rates: dict[str, list[float]] = {side: [] for side in streams}
            for stream in streams.values():
                rate(stream, BEFORE)
            for _ in range(arguments.rounds):
                for side, stream in streams.items():
                    rate(stream, 2)  # what is read ahead while the other side runs
                    rates[side].append(rate(stream, arguments.steps))
            ours_, theirs = (statistics.median(rates[side]) for side in streams)
            print(f"{stage:5}{ours_:7.0f} / {theirs:.0f} crops/s, {ours_ / theirs:.2f}", flush=True)


if __name__ == "__main__":
    main()
