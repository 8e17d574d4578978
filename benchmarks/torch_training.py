"""The three stages in plain PyTorch, for benchmarks: what a step of the authors' code computes.

The networks, losses, groups and schedule are those of `tests/helpers/torch_peer`; of the package
nothing but the settings of a config is used. A step takes two normalised views of each image,
`[B, 2, C, H, W]`, and the images' numbers `[B]`, updates everything that training does, and returns
the loss.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from ml_collections import ConfigDict
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from maect_jax.models import vit
from tests.helpers import torch_peer

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Groups = Mapping[str, list[float]]  # parameter -> [factor of the learning rate, weight decay]
Part = tuple[nn.Module, Groups, float]  # what is trained, and its base learning rate


def initialise(module: nn.Module) -> nn.Module:
    """Weights as in MAE: Xavier-uniform, also those of the patch embedding as a linear layer, whose
    bias stays as PyTorch draws it; biases 0; tokens with a deviation of 0.02."""
    for name, p in module.named_parameters():
        if name.endswith("_token"):
            nn.init.normal_(p, std=0.02)
        elif p.ndim > 1:
            nn.init.xavier_uniform_(p.data.flatten(1))
        elif name.endswith("bias") and not name.startswith("patch_embed"):
            nn.init.zeros_(p)
    return module


class Trainer:
    """An encoder and what its stages hand on, for the settings of a config and a number of images;
    on a device, in bf16 (autocast) and compiled if `fast`, else in fp32 and eager."""

    def __init__(self, config: ConfigDict, images: int, device: str = "cpu", fast: bool = False):
        model, size = config.model, vit.size_of(config.model)
        self.config, self.images, self.device, self.fast = config, images, device, fast
        self.grid = tuple(side // model.patch_size for side in model.image_size)
        encoder = torch_peer.Encoder(self.grid, model.patch_size, *size, model.channels)
        self.encoder = initialise(encoder).to(device)
        self.average = self.encoder  # of stage 3, its result
        self.head: Head | None = None  # of stage 2
        self.updates: Updates

    def ready(self, module: nn.Module) -> Callable:
        """A module to call. Its blocks are compiled, once for all: in seconds, not in minutes."""
        if self.fast:
            for block in module.get_submodule("blocks").children():
                block.compile()
        return module

    def autocast(self):
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16) if self.fast else contextlib.nullcontext()

    def pooled(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, 0] if self.config.model.pool == "cls" else tokens[:, 1:].mean(1)

    def optimise(self, stage: str, **parts: Part) -> "Updates":
        """AdamW for the parts of a stage."""
        section = self.config[stage]
        per_epoch = self.images // section.batch_size
        steps = section.epochs * per_epoch
        if "warmup_epochs" in section:
            warmup = section.warmup_epochs * per_epoch
        else:  # rounded down, but not where the product is a whole number and its last bit lacks
            warmup = math.floor(section.warmup_fraction * steps + 1e-6)
        alike: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
        for part, (module, groups, base_lr) in parts.items():
            for name, (scale, decay) in groups.items():
                peak = scale * base_lr * section.batch_size * 2 / 256
                named = f"{part}.{name}", module.get_parameter(name)
                alike.setdefault((peak, decay), []).append(named)
        self.updates = Updates(alike, steps, warmup, fused=True if self.fast else None)
        return self.updates


class Updates:
    """The updates of a stage: AdamW of named parameters by their peak learning rate and weight
    decay, and the schedule."""

    def __init__(self, groups: Mapping, steps: int, warmup: int, fused: bool | None):
        listed = [
            {"params": params, "peak": peak, "weight_decay": decay}
            for (peak, decay), params in groups.items()
        ]
        self.optimiser = torch.optim.AdamW(listed, betas=(0.9, 0.95), fused=fused)
        self.steps, self.warmup, self.done = steps, warmup, 0

    def set_rates(self) -> None:
        """Sets the learning rates of the next update."""
        factor = torch_peer.schedule(self.done, self.steps, self.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = factor * group["peak"]

    def __call__(self, loss: torch.Tensor) -> torch.Tensor:
        self.set_rates()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.done += 1
        return loss.detach()


def mae(trainer: Trainer) -> Step:
    """Steps of stage 1."""
    config, grid = trainer.config.mae, trainer.grid
    model, patch, device = trainer.config.model, trainer.config.model.patch_size, trainer.device
    shape = config.decoder.width, config.decoder.depth, config.decoder.heads
    pixels, width = model.channels * patch**2, vit.size_of(model).width
    decoder = initialise(torch_peer.Decoder(grid, pixels, width, *shape)).to(device)

    def part(module: nn.Module) -> Part:
        return module, torch_peer.flat_groups(module, config.weight_decay), config.base_lr

    update = trainer.optimise("mae", encoder=part(trainer.encoder), decoder=part(decoder))
    encode, decode = trainer.ready(trainer.encoder), trainer.ready(decoder)

    def step(views: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        images = views.flatten(0, 1)
        noise = torch.rand(len(images), grid[0] * grid[1], device=images.device)
        keep, restore, mask = torch_peer.random_mask(noise, config.mask_ratio)
        with trainer.autocast():
            prediction = decode(encode(images, keep), restore)
        return update(torch_peer.reconstruction(prediction.float(), images, mask, patch))

    return step


class Head(torch_peer.Head):
    """Projector and predictor, and the queue of past projections with their images' numbers."""

    def __init__(self, width: int, config: ConfigDict):
        sizes = config.projector_hidden, config.predictor_hidden, config.projector_out
        super().__init__(width, *sizes, nn.ReLU)
        self.register_buffer("queue", normalize(torch.randn(config.queue_size, sizes[-1])))
        self.register_buffer("ids", torch.full((config.queue_size,), -1))
        self.place = 0

    @torch.no_grad()
    def neighbours(self, rows: torch.Tensor, own: torch.Tensor, top_k: int) -> torch.Tensor:
        """Of each row one of the nearest in the queue that are of other images."""
        cosines = (rows @ self.queue.T).masked_fill(self.ids == own[:, None], -2)
        nearest = cosines.topk(top_k, dim=1).indices
        chosen = torch.randint(top_k, (len(rows), 1), device=rows.device)
        return self.queue[nearest.gather(1, chosen)[:, 0]]

    @torch.no_grad()
    def push(self, rows: torch.Tensor, own: torch.Tensor) -> None:
        place = (self.place + torch.arange(len(own), device=own.device)) % len(self.ids)
        self.queue[place], self.ids[place] = rows, own
        self.place = (self.place + len(own)) % len(self.ids)


def contrast(trainer: Trainer, stage: str) -> Step:
    """Steps of stage 2 (`head`), or of stage 3 (`ct`), which takes the head over."""
    config, device, model = trainer.config[stage], trainer.device, trainer.encoder
    tuned = stage == "ct"
    if trainer.head is None:
        trainer.head = Head(vit.size_of(trainer.config.model).width, config).to(device)
    head = trainer.head
    parts: dict[str, Part] = {}
    if tuned:
        frozen = config.frozen_blocks
        frozen = len(model.blocks) // 2 if frozen is None else frozen
        decays = config.layer_decay, config.weight_decay
        groups = torch_peer.encoder_groups(model, frozen, *decays)
        parts["encoder"] = model, groups, config.base_lr
        head.start_target()
        trainer.average = copy.deepcopy(model).requires_grad_(False)
    else:
        model.requires_grad_(False)
    own = "head_" if tuned else ""
    groups = torch_peer.flat_groups(head, config[f"{own}weight_decay"])
    parts["head"] = head, groups, config[f"{own}base_lr"]
    update = trainer.optimise(stage, **parts)
    encode, average = trainer.ready(model), trainer.average

    def step(views: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        with trainer.autocast():
            with torch.set_grad_enabled(tuned):
                tokens = encode(views.transpose(0, 1).flatten(0, 1))
                features = trainer.pooled(tokens).chunk(2)
            projected = [head.projector(x) for x in features]
            predicted = [head.predictor(z) for z in projected]
            with torch.no_grad():
                rows = [head.target_projector(x) for x in features] if tuned else projected
        rows = [normalize(z.detach().float()) for z in rows]
        predicted = [normalize(x.float()) for x in predicted]
        found = [head.neighbours(z, own, config.top_k) for z in rows]
        logits = [found[view] @ predicted[1 - view].T / config.temperature for view in (0, 1)]
        labels = torch.arange(len(own), device=device)
        loss = update((cross_entropy(logits[0], labels) + cross_entropy(logits[1], labels)) / 2)
        if tuned:
            with torch.no_grad():
                for mean, new, factor in (
                    (head.target_projector, head.projector, config.target_factor),
                    (average, model, config.ema_decay),
                ):
                    pairs = [*mean.parameters()], [*new.parameters()]
                    torch._foreach_lerp_(*pairs, 1 - factor)
        head.push(rows[0], own)
        return loss

    return step


STEPS: dict[str, Callable[[Trainer], Step]] = {
    "mae": mae,
    "head": lambda trainer: contrast(trainer, "head"),
    "ct": lambda trainer: contrast(trainer, "ct"),
}


def write(encoder: nn.Module, path: Path, heads: int) -> None:
    """Writes an encoder with timm's names, whole or not at all, and what no tensor tells."""
    about = {"num_attention_heads": str(heads), "layer_norm_eps": str(encoder.norm.eps)}
    draft = path.with_suffix(".tmp")
    save_file(encoder.state_dict(), draft, metadata=about)
    draft.replace(path)
