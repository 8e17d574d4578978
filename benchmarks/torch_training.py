"""The three stages in plain PyTorch, for benchmarks: what a step of the authors' code computes.

The networks are those of `tests/helpers/torch_peer`. A step takes two normalised views of each
image, `[B, 2, 3, H, W]`, and the images' numbers `[B]`, and updates everything that training does.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from tests.helpers import torch_peer

Step = Callable[[torch.Tensor, torch.Tensor], None]


class Sizes(NamedTuple):
    """Of a training: images, encoder, decoder `(width, depth, heads)`, head, queue."""

    batch: int
    image: int
    patch: int
    width: int
    depth: int
    heads: int
    decoder: tuple[int, int, int]
    projector: int
    out: int
    predictor: int
    queue: int
    top_k: int = 20
    temperature: float = 0.15
    momentum: float = 0.99  # of the target projector
    decay: float = 0.9999  # of the encoder's average
    mask_ratio: float = 0.75


class Trainer:
    """How both kinds of steps run: on a device, in bf16 (autocast) or fp32, compiled or eager."""

    def __init__(self, sizes: Sizes, device: str = "cpu", fast: bool = False):
        self.sizes, self.device, self.fast = sizes, device, fast
        grid = (sizes.image // sizes.patch,) * 2
        shape = sizes.patch, sizes.width, sizes.depth, sizes.heads
        self.grid, self.encoder = grid, torch_peer.Encoder(grid, *shape).to(device)

    def ready(self, module: nn.Module) -> Callable:
        """A module to call. Its blocks are compiled, once for all: in seconds, not in minutes."""
        if self.fast:
            for block in module.get_submodule("blocks").children():
                block.compile()
        return module

    def autocast(self):
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16) if self.fast else contextlib.nullcontext()

    def adamw(self, *modules: nn.Module) -> torch.optim.Optimizer:
        """AdamW with weight decay for what has two dimensions."""
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        fused = True if self.fast else None
        return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=fused)


def update(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def mae(trainer: Trainer) -> Step:
    """Steps of stage 1."""
    sizes, grid = trainer.sizes, trainer.grid
    patches, pixels, p = grid[0] * grid[1], 3 * sizes.patch**2, sizes.patch
    kept = int(patches * (1 - sizes.mask_ratio))
    decoder = torch_peer.Decoder(grid, pixels, sizes.width, *sizes.decoder).to(trainer.device)
    optimiser = trainer.adamw(trainer.encoder, decoder)
    encode, decode = trainer.ready(trainer.encoder), trainer.ready(decoder)

    def step(views: torch.Tensor, own: torch.Tensor) -> None:
        images = views.flatten(0, 1)
        order = torch.rand(len(images), patches, device=images.device).argsort(1)
        restore = order.argsort(1)
        mask = (restore >= kept).float()
        with trainer.autocast():
            prediction = decode(encode(images, order[:, :kept]), restore)
        target = images.view(-1, 3, grid[0], p, grid[1], p).permute(0, 2, 4, 3, 5, 1)
        target = target.flatten(3).flatten(1, 2)
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        errors = ((prediction.float() - target) ** 2).mean(-1)
        update(optimiser, (errors * mask).sum() / mask.sum())

    return step


def _head(sizes: Sizes) -> nn.ModuleDict:
    def layers(*widths):
        for i, pair in enumerate(itertools.pairwise(widths)):
            yield nn.Linear(*pair, bias=False)
            yield nn.BatchNorm1d(pair[1])
            if i < len(widths) - 2:
                yield nn.ReLU()

    projector = nn.Sequential(*layers(sizes.width, sizes.projector, sizes.projector, sizes.out))
    predictor = nn.Sequential(*list(layers(sizes.out, sizes.predictor, sizes.out))[:-1])
    return nn.ModuleDict({"projector": projector, "predictor": predictor})


def contrast(trainer: Trainer, tuned: bool) -> Step:
    """Steps of stage 2, or of stage 3 (`tuned`)."""
    sizes, device, model = trainer.sizes, trainer.device, trainer.encoder
    head = _head(sizes).to(device)
    frozen = (model.patch_embed, model.blocks[: sizes.depth // 2]) if tuned else (model,)
    for part in frozen:
        part.requires_grad_(False)
    model.cls_token.requires_grad_(False)
    target = copy.deepcopy(head["projector"]).requires_grad_(False)
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = trainer.adamw(model, head)
    encode = trainer.ready(model)
    queue = normalize(torch.randn(sizes.queue, sizes.out, device=device))
    ids = torch.full((sizes.queue,), -1, device=device)
    place = 0

    @torch.no_grad()
    def neighbours(rows: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        cosines = (rows @ queue.T).masked_fill(ids == own[:, None], -2)
        nearest = cosines.topk(sizes.top_k if tuned else 1, dim=1).indices
        chosen = torch.randint(nearest.shape[1], (len(rows), 1), device=device)
        return queue[nearest.gather(1, chosen)[:, 0]]

    def step(views: torch.Tensor, own: torch.Tensor) -> None:
        nonlocal place
        with trainer.autocast():
            with torch.set_grad_enabled(tuned):
                features = encode(views.transpose(0, 1).flatten(0, 1))[:, 0].chunk(2)
            projected = [head["projector"](x) for x in features]
            predicted = [head["predictor"](z) for z in projected]
            with torch.no_grad():
                rows = [target(x) for x in features] if tuned else projected
        rows = [normalize(z.detach().float()) for z in rows]
        predicted = [normalize(x.float()) for x in predicted]
        found = [neighbours(z, own) for z in rows]
        logits = [found[view] @ predicted[1 - view].T / sizes.temperature for view in (0, 1)]
        labels = torch.arange(len(own), device=device)
        update(optimiser, (cross_entropy(logits[0], labels) + cross_entropy(logits[1], labels)) / 2)
        with torch.no_grad():
            if tuned:
                for mean, new, factor in (
                    (target, head["projector"], sizes.momentum),
                    (average, model, sizes.decay),
                ):
                    pairs = [*mean.parameters()], [*new.parameters()]
                    torch._foreach_lerp_(*pairs, 1 - factor)
            queue[place : place + len(own)], ids[place : place + len(own)] = rows[0], own
            place = (place + len(own)) % sizes.queue

    return step


STEPS: dict[str, Callable[[Trainer], Step]] = {
    "mae": mae,
    "head": lambda trainer: contrast(trainer, tuned=False),
    "ct": lambda trainer: contrast(trainer, tuned=True),
}
