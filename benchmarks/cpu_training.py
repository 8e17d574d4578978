"""Training on a CPU against plain PyTorch: crops a second of each stage, both sides in one run.

    python -m benchmarks.cpu_training [mae head ct] [--steps=20] [--rounds=5]

Needs torch and torchvision. Both read the same folder of small PNG files (the packaged images, 28
pixels, RGB), make two random crops of each, and do the same work a step in fp32: masks, heads, the
search for neighbours, averages, AdamW. The peer is eager PyTorch as in `tests/helpers/torch_peer`.
The sides take turns; medians of the rounds.
"""

import argparse
import copy
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
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torchvision import datasets
from torchvision.transforms import v2

from configs import common
from maect_jax import sharding, train
from maect_jax.data import arrays, sources
from maect_jax.stages import STAGES
from maect_jax.stages.state import create_state, state_shardings
from maect_jax.stages.step import jitted_step
from tests.helpers import torch_peer

IMAGES, BATCH, QUEUE, TOP_K, TEMPERATURE = 4096, 256, 4096, 20, 0.15
SIZE, WIDTH, DEPTH, HEADS, PATCH = 28, 128, 6, 4, 7
DECODER = dict(width=64, depth=2, heads=4)
HIDDEN, OUT, PREDICTOR, MOMENTUM, DECAY = 256, 64, 512, 0.99, 0.9999
BEFORE = 5  # steps before the first measured one


def config_of(stage: str, folder: str) -> ConfigDict:
    """The config of a stage at the sizes of this benchmark."""
    config = common.base("cpu_training", "Ti", patch_size=PATCH)
    config.stages = (stage,)
    config.model.update(
        width=WIDTH, depth=DEPTH, heads=HEADS, image_size=(SIZE, SIZE), dtype="float32"
    )
    config.data.update(source="folder", path=folder, short_side=SIZE)
    head = dict(
        queue_size=QUEUE, projector_hidden=HIDDEN, projector_out=OUT, predictor_hidden=PREDICTOR
    )
    if stage == "mae":
        common.add_mae(config, batch_size=BATCH).decoder.update(DECODER)
    elif stage == "head":
        common.add_head(config, batch_size=BATCH).update(head)
    else:
        common.add_ct(config, batch_size=BATCH, frozen_blocks=DEPTH // 2).update(head)
    config[stage].epochs = 10**4
    return config.lock()


def ours(name: str, folder: str) -> Iterator[None]:
    """Steps of this package, from files to the new state."""
    config = config_of(name, folder)
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
        crop = v2.RandomResizedCrop(SIZE, scale, interpolation=v2.InterpolationMode.BICUBIC)
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
    loader = torch.utils.data.DataLoader(images, BATCH, **options)
    for _ in itertools.count():
        yield from loader


def encoder() -> torch_peer.Encoder:
    return torch_peer.Encoder((SIZE // PATCH,) * 2, PATCH, WIDTH, DEPTH, HEADS)


def adamw(*modules: nn.Module) -> torch.optim.Optimizer:
    """With and without weight decay."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))


def update(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    loss.item()


def torch_mae(folder: str) -> Iterator[None]:
    """Stage 1 in PyTorch."""
    patches, pixels = (SIZE // PATCH) ** 2, 3 * PATCH**2
    model, kept = encoder(), patches // 4
    sizes = DECODER["width"], DECODER["depth"], DECODER["heads"]
    decoder = torch_peer.Decoder((SIZE // PATCH,) * 2, pixels, WIDTH, *sizes)
    optimiser = adamw(model, decoder)
    for views, _ in batches(folder, (0.2, 1.0)):
        images = views.flatten(0, 1)
        order = torch.rand(len(images), patches).argsort(1)
        restore = order.argsort(1)
        mask = (restore >= kept).float()
        prediction = decoder(model(images, order[:, :kept]), restore)
        side = SIZE // PATCH
        target = images.view(-1, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 3, 5, 1)
        target = target.flatten(3).flatten(1, 2)
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        errors = ((prediction - (target - mean) / (variance + 1e-6).sqrt()) ** 2).mean(-1)
        update(optimiser, (errors * mask).sum() / mask.sum())
        yield


def head_of() -> nn.Module:
    def layers(*widths):
        for i, pair in enumerate(itertools.pairwise(widths)):
            yield nn.Linear(*pair, bias=False)
            yield nn.BatchNorm1d(pair[1])
            if i < len(widths) - 2:
                yield nn.ReLU()

    projector = nn.Sequential(*layers(WIDTH, HIDDEN, HIDDEN, OUT))
    predictor = nn.Sequential(*list(layers(OUT, PREDICTOR, OUT))[:-1])
    return nn.ModuleDict({"projector": projector, "predictor": predictor})


def torch_contrast(folder: str, tuned: bool) -> Iterator[None]:
    """Stage 2, or stage 3 (`tuned`), in PyTorch."""
    model, head = encoder(), head_of()
    if tuned:
        for part in (model.patch_embed, model.blocks[: DEPTH // 2]):
            part.requires_grad_(False)
        model.cls_token.requires_grad_(False)
    else:
        model.requires_grad_(False)
    target = copy.deepcopy(head["projector"]).requires_grad_(False)
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = adamw(model, head)
    queue, ids = normalize(torch.randn(QUEUE, OUT)), torch.full((QUEUE,), -1)
    place = 0
    for views, own in batches(folder, (0.08, 1.0)):
        with torch.set_grad_enabled(tuned):
            features = model(views.transpose(0, 1).flatten(0, 1))[:, 0].chunk(2)
        projected = [head["projector"](x) for x in features]
        predicted = [normalize(head["predictor"](z)) for z in projected]
        with torch.no_grad():
            rows = [target(x) for x in features] if tuned else projected
            rows = [normalize(z.detach()) for z in rows]
            found, excluded = [], ids == own[:, None]
            for z in rows:
                cosines = (z @ queue.T).masked_fill(excluded, -2)
                nearest = cosines.topk(TOP_K if tuned else 1, dim=1).indices
                chosen = torch.randint(nearest.shape[1], (BATCH, 1))
                found.append(queue[nearest.gather(1, chosen)[:, 0]])
        logits = [found[view] @ predicted[1 - view].T / TEMPERATURE for view in (0, 1)]
        labels = torch.arange(BATCH)
        update(optimiser, sum(cross_entropy(x, labels) for x in logits) / 2)
        with torch.no_grad():
            if tuned:
                averages = (target, head["projector"], MOMENTUM), (average, model, DECAY)
                for mean, new, factor in averages:
                    for m, p in zip(mean.parameters(), new.parameters(), strict=True):
                        m.lerp_(p, 1 - factor)
            queue[place : place + BATCH], ids[place : place + BATCH] = rows[0], own
            place = (place + BATCH) % QUEUE
        yield


SIDES = {
    "mae": torch_mae,
    "head": lambda folder: torch_contrast(folder, tuned=False),
    "ct": lambda folder: torch_contrast(folder, tuned=True),
}


def rate(stream: Iterator[None], steps: int) -> float:
    """Crops a second."""
    start = time.perf_counter()
    for _ in range(steps):
        next(stream)
    return 2 * BATCH * steps / (time.perf_counter() - start)


def write_images(folder: Path) -> None:
    source = arrays.fashion_mnist("train")
    (folder / "train").mkdir()
    (folder / "train" / "all").mkdir()
    for i in range(IMAGES):
        picture = Image.fromarray(source.images[i, ..., 0]).convert("RGB")
        picture.save(folder / "train" / "all" / f"{i}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=[*SIDES])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # grain has some
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name))
        for stage in arguments.stages:
            streams = {"maect_jax": ours(stage, name), "PyTorch": SIDES[stage](name)}
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
