"""MAE and stage 3 of MAE-CT once more, in plain PyTorch: reference figures of any size.

Written from the papers, apart from the package: it shares no code with it. It writes `.npz` with
the arrays that `golden/README.md` explains, so that `parity_test.py` runs on other sizes than
those of the authors' figures. It computes in float64: what is measured against it is the package's
error alone.
"""

import copy
import itertools
import json
import math

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, normalize, scaled_dot_product_attention

LAYER_DECAY, WEIGHT_DECAY, HEAD_WEIGHT_DECAY = 0.65, 0.05, 1e-5


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](gelu(self.mlp["fc1"](self.norm2(x))))


def position(grid, width):
    """Fixed sine-cosine embedding `[1, N, D]`: half of the channels by column, half by row."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    halves = []
    for place in (columns, rows):
        angle = place.flatten()[:, None] / 10000 ** (torch.arange(width // 4) * 4 / width)
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, 1)[None]


class Encoder(nn.Module):
    def __init__(self, grid, patch_size, width, depth, heads, channels=3):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.register_buffer("pos_embed", position(grid, width))
        projection = nn.Conv2d(channels, width, patch_size, patch_size)
        self.patch_embed = nn.ModuleDict({"proj": projection})
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images, keep=None):
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed
        if keep is not None:
            x = x[torch.arange(len(x))[:, None], keep]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.norm(self.blocks(x))


class Decoder(nn.Module):
    def __init__(self, grid, pixels, encoded, width, depth, heads):
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(1, 1, width))
        self.register_buffer("pos_embed", position(grid, width))
        self.embed, self.pred = nn.Linear(encoded, width), nn.Linear(width, pixels)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, latent, restore):
        x = self.embed(latent)
        hidden = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], 1)[torch.arange(len(x))[:, None], restore]
        x = torch.cat([x[:, :1], patches + self.pos_embed], 1)
        return self.pred(self.norm(self.blocks(x))[:, 1:])


class Gate(nn.ReLU):
    """A ReLU that refuses what fp32 may round to either side of zero (4e-8 was seen): then
    gradients cannot be compared, and the case needs another seed."""

    def forward(self, x):
        assert x.abs().min() > 1e-6, "a ReLU's input is too near zero: take another seed"
        return super().forward(x)


class Head(nn.Module):
    def __init__(self, width, projector, predictor, out, activation=Gate):
        super().__init__()

        def layers(*widths):
            for i, pair in enumerate(itertools.pairwise(widths)):
                yield nn.Linear(*pair, bias=False)
                yield nn.BatchNorm1d(pair[1])
                if i < len(widths) - 2:
                    yield activation()

        self.projector = nn.Sequential(*layers(width, projector, projector, out))
        self.predictor = nn.Sequential(*list(layers(out, predictor, out))[:-1])

    def start_target(self):
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)


def perturbed(module):
    """No bias zero and no scale one, lest a forgotten one go unseen."""
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn_like(p)
    return module.double()


def arrays(prefix, tensors):
    """As NumPy arrays, what is float in fp32."""
    plain = ((name, x.detach().clone()) for name, x in tensors)
    plain = ((name, x.float() if x.is_floating_point() else x) for name, x in plain)
    return {f"{prefix}/{name}": x.numpy() for name, x in plain}


def grads(prefix, module):
    named = ((name, p.grad) for name, p in module.named_parameters() if p.grad is not None)
    return arrays(prefix, named)


def pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def encoder_of(meta):
    grid = tuple(side // meta["patch_size"] for side in pair(meta["image_size"]))
    sizes = (meta[key] for key in ("patch_size", "width", "depth", "heads"))
    return perturbed(Encoder(grid, *sizes)), grid


def random_mask(noise, ratio):
    """The patches to keep `[B, K]`, those with the smallest of `noise [B, N]`; the place of each in
    the order "kept, then removed"; and 1.0 for what is removed, else 0.0."""
    order = noise.argsort(1)
    restore, kept = order.argsort(1), int(order.shape[1] * (1 - ratio))
    return order[:, :kept], restore, (restore >= kept).to(noise.dtype)


def reconstruction(prediction, images, mask, patch_size):
    """Mean squared error of the normalised pixels of masked patches."""
    b, c, height, width = images.shape
    p, rows, columns = patch_size, height // patch_size, width // patch_size
    target = images.view(b, c, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
    target = target.flatten(3).flatten(1, 2)
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    errors = ((prediction - (target - mean) / (var + 1e-6).sqrt()) ** 2).mean(-1)
    return (errors * mask).sum() / mask.sum()


def mae(path, seed, **meta):
    """Writes one case of kind "mae"."""
    torch.manual_seed(seed)
    encoder, grid = encoder_of(meta)
    p, b = meta["patch_size"], meta["batch"]
    sizes = (meta[f"dec_{key}"] for key in ("width", "depth", "heads"))
    decoder = perturbed(Decoder(grid, 3 * p * p, meta["width"], *sizes))
    images = torch.randn(b, 3, *pair(meta["image_size"])).double()
    noise = torch.rand(b, *grid)
    keep, restore, mask = random_mask(noise.flatten(1).double(), meta["mask_ratio"])
    latent = encoder(images, keep)
    prediction = decoder(latent, restore)
    loss = reconstruction(prediction, images, mask, p)
    loss.backward()
    figures = arrays(
        "",
        dict(
            images=images,
            noise=noise,
            latent=latent,
            mask=mask,
            ids_restore=restore,
            prediction=prediction,
            loss=loss,
            tokens_unmasked=encoder(images),
        ).items(),
    )
    np.savez(
        path,
        meta=json.dumps({"kind": "mae", **meta}),
        **{name[1:]: x for name, x in figures.items()},
        **arrays("encoder", encoder.state_dict().items()),
        **arrays("decoder", decoder.state_dict().items()),
        **grads("grad/encoder", encoder),
        **grads("grad/decoder", decoder),
    )


def encoder_groups(encoder, frozen, layer_decay=LAYER_DECAY, weight_decay=WEIGHT_DECAY):
    """Name -> [factor of the learning rate, weight decay] of what is trained; freezes the rest."""
    depth, found = len(encoder.blocks), {}
    for name, p in encoder.named_parameters():
        block = int(name.split(".")[1]) if name.startswith("blocks") else -1
        last = name.startswith("norm")
        p.requires_grad_(last or not frozen or block >= frozen)
        if p.requires_grad:
            scale = 1.0 if last else layer_decay ** (depth - block)
            found[name] = [scale, weight_decay if p.ndim > 1 else 0.0]
    return found


def flat_groups(module, weight_decay=HEAD_WEIGHT_DECAY):
    """The same for a module that is trained at one learning rate."""
    trained = (pair for pair in module.named_parameters() if pair[1].requires_grad)
    return {name: [1.0, weight_decay if p.ndim > 1 else 0.0] for name, p in trained}


def schedule(step, total, warmup):
    """Factor of the learning rate: linear warm-up, then half a cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def learning_rates(meta):
    """`[step][encoder, head]`."""
    total = meta["total_steps"]
    warmup = total * meta["warmup_percent"] // 100
    peaks = [meta[f"{part}_lr"] * 2 * meta["batch"] / 256 for part in ("encoder", "head")]
    return [[peak * schedule(s, total, warmup) for peak in peaks] for s in range(total)]


def forward(encoder, head, queue, images, own, meta):
    """What stage 3 computes on two views `[2, B, 3, H, W]` of the images with indices `own`."""
    tokens = encoder(images.flatten(0, 1))
    pooled = tokens[:, 0] if meta["pooling"] == "class_token" else tokens[:, 1:].mean(1)
    features = pooled.chunk(2)
    predicted = [head.predictor(head.projector(x)) for x in features]
    with torch.no_grad():
        projected = [normalize(head.target_projector(x)) for x in features]
    excluded = queue["queue_id"] == own[:, None]
    nearest = [(z @ queue["queue"].T).masked_fill(excluded, -2).argmax(1) for z in projected]

    def direction(view):
        cosines = queue["queue"][nearest[view]] @ normalize(predicted[1 - view]).T
        return cross_entropy(cosines / meta["temperature"], torch.arange(len(own)))

    loss = (direction(0) + direction(1)) / 2
    return tokens, predicted, projected, nearest, loss


def ct(path, seed, **meta):
    """Writes one case of kind "ct": `steps` updates of stage 3 with the nearest neighbour."""
    torch.manual_seed(seed)
    encoder, _ = encoder_of(meta)
    hidden = (meta[key] for key in ("proj_hidden", "pred_hidden", "output_dim"))
    head = perturbed(Head(meta["width"], *hidden))
    head.start_target()
    size, batch = meta["queue_size"], meta["batch"]
    queue = dict(
        queue=normalize(torch.randn(size, meta["output_dim"])).double(),
        queue_id=torch.randperm(2 * size)[:size],
        queue_y=torch.randint(5, (size,)),
        queue_ptr=torch.tensor([meta["queue_ptr"]]),
    )
    figures = arrays("init/encoder", encoder.state_dict().items())
    figures |= arrays("init/head", (head.state_dict() | queue).items())
    meta["encoder_groups"] = encoder_groups(encoder, meta["frozen_blocks"])
    meta["head_groups"] = flat_groups(head)
    meta["base_lr_per_step"] = learning_rates(meta)
    parts = [("encoder", encoder), ("head", head)]
    groups = [
        {
            "params": [module.get_parameter(name)],
            "part": i,
            "scale": scale,
            "weight_decay": decay,
        }
        for i, (part, module) in enumerate(parts)
        for name, (scale, decay) in meta[f"{part}_groups"].items()
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    # The same images in every step, so that the row of an image itself would be the nearest; each
    # of a colour of its own, so that the features of a batch differ.
    image = torch.randn(batch, 3, *pair(meta["image_size"])) + 2 * torch.randn(batch, 3, 1, 1)
    own, classes = torch.randperm(2 * size)[:batch], torch.randint(5, (batch,))
    for s in range(meta["steps"]):
        images = (image + 0.5 * torch.randn(2, *image.shape)).double()
        got = forward(encoder, head, queue, images, own, meta)
        tokens, predicted, projected, nearest, loss = got
        optimiser.zero_grad()
        loss.backward()
        now = dict(images=images, ids=own, labels=classes, tokens=tokens, loss=loss)
        for name, both in (("projected", projected), ("predicted", predicted), ("nn", nearest)):
            now |= {f"{name}{view}": both[view] for view in (0, 1)}
        now["nn_accuracy"] = (queue["queue_y"][nearest[0]] == classes).double().mean()
        figures |= arrays(f"step{s}", now.items())
        for part, module in parts:
            figures |= grads(f"step{s}/grad/{part}", module)
        for group in optimiser.param_groups:
            group["lr"] = meta["base_lr_per_step"][s][group["part"]] * group["scale"]
        optimiser.step()
        with torch.no_grad():
            for name, mean in head.target_projector.named_parameters():
                mean.lerp_(head.projector.get_parameter(name), 1 - meta["target_factor"])
            for name, running in head.target_projector.named_buffers():
                running.copy_(head.projector.get_buffer(name))
        place = (int(queue["queue_ptr"]) + torch.arange(batch)) % size
        for name, new in (("queue", projected[0]), ("queue_id", own), ("queue_y", classes)):
            queue[name][place] = new
        queue["queue_ptr"] = (queue["queue_ptr"] + batch) % size
        figures |= arrays(f"step{s}/after/encoder", encoder.state_dict().items())
        figures |= arrays(f"step{s}/after/head", head.state_dict().items())
    figures |= arrays(f"step{s}/after/head", queue.items())
    np.savez(path, meta=json.dumps({"kind": "ct", **meta}), **figures)
