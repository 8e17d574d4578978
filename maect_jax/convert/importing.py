"""From files of weights to what a run saves: its kind, its config, its variables.

The tensors get the names of `names` first. Their shapes give the config of the network, and the
abstract variables of that network say which tensors there must be, and of which shapes.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from maect_jax import errors
from maect_jax.convert import names, tensors
from maect_jax.convert.names import CLASSIFIER, DECODER, ENCODER, HEAD, Parts
from maect_jax.convert.tensors import Content, Stored
from maect_jax.errors import UserError
from maect_jax.models import mae, nnclr, positions, vit
from maect_jax.stages import SAVED

Shapes = dict[str, tuple[int, ...]]  # of tensors
LN_EPS = 1e-6  # MAE's, MAE-CT's and timm's
_DECODER_HEADS = {512: 16}  # by width: MAE's
_HEAD_SIZES = {
    "projector_hidden": "projector.0.weight",
    "projector_out": "projector.6.weight",
    "predictor_hidden": "predictor.0.weight",
    "queue_size": "queue",
}
_TARGET = "target_projector.0.weight"  # a head of stage ct has a target
_WHOLE_NUMBERS = ("queue_id", "queue_y", "queue_ptr")


def _sides(value) -> tuple[int, int]:
    """(height, width) of an image size: one side or two, or JSON."""
    sides = json.loads(value) if isinstance(value, str) else value
    height, width = sides if isinstance(sides, list) else (sides, sides)
    if type(height) is not int or type(width) is not int:
        raise ValueError
    return height, width


# What may be written beside the tensors, by key: how it is read, and what it must be.
_METADATA = {
    "num_attention_heads": (errors.positive(int), "a number above 0"),
    "decoder_num_attention_heads": (errors.positive(int), "a number above 0"),
    "layer_norm_eps": (errors.positive(float), "a number above 0"),
    "image_size": (_sides, "one side or two, in pixels"),
    "hidden_act": ({"gelu": "gelu"}.__getitem__, "'gelu'"),  # no tensor says
    "global_pool": ({"": None, "token": "cls", "avg": "mean"}.__getitem__, "'token' or 'avg'"),
}


@dataclasses.dataclass(frozen=True)
class Overrides:
    """What the user says about a model, which comes before what the files say. `None`: nothing."""

    heads: int | None = None
    decoder_heads: int | None = None
    ln_eps: float | None = None
    image_size: tuple[int, int] | None = None
    pool: str | None = None
    dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class Imported:
    """Files of weights, recognised and checked but not yet read.

    Attributes:
      files: whose names each has, by their paths.
      kind: the stage that a run with such variables has saved, a key of `SAVED`.
      config: of such a run: `model`, `data` where the normalisation is known, the sizes of a head.
      described: for people, a line each.
      parts: the tensors.
      grid: (rows, columns) of patches that their positions are for.
    """

    files: Mapping[Path, str]
    kind: str
    config: ConfigDict
    described: tuple[str, ...]
    parts: Parts
    grid: tuple[int, int]

    def read(self) -> dict:
        """The variables, NumPy arrays: the fields `saved` and `exported` of the stage's class."""
        model = self.config.model
        grids = self.grid, positions.grid(model.image_size, model.patch_size)
        encoder = names.encoder_from_torch(self.parts[ENCODER], self.grid)
        fields = SAVED[self.kind].with_encoder(positions.fitted(encoder, *grids))
        more = {}
        if DECODER in self.parts:
            decoder = names.decoder_from_torch(self.parts[DECODER], self.grid)
            more = {"params": {"decoder": positions.fitted(decoder, *grids)}}
        elif HEAD in self.parts:
            more = names.head_from_torch(self.parts[HEAD])
        elif CLASSIFIER in self.parts:
            more = names.variables_from_torch(self.parts[CLASSIFIER], CLASSIFIER)
        both = {field: fields[field] | more[field] for field in fields.keys() & more.keys()}
        return fields | more | both

    def origin(self) -> list[dict]:
        """Where the weights are from: each file with its layout and its SHA-256."""
        return [
            {"file": path.name, "layout": layout, "sha256": tensors.sha256(path)}
            for path, layout in self.files.items()
        ]


def is_file(init_from: str) -> bool:
    """Whether `init_from` names files of weights, and not a run."""
    paths = paths_of(init_from)
    if len(paths) == 1 and paths[0].is_dir():
        return not (paths[0] / "checkpoints").exists() and bool(tensors.weights_in(paths[0]))
    return len(paths) > 1 or any(path.is_file() for path in paths)


def paths_of(text: str) -> tuple[Path, ...]:
    """The paths in `ENCODER` or `ENCODER,HEAD`."""
    if Path(text).exists():
        return (Path(text),)
    return tuple(Path(part) for part in text.split(",") if part)


def recognised(files: Sequence[Path], overrides: Overrides | None = None) -> Imported:
    """Recognises a model by the names and shapes of the tensors in its files.

    Args:
      files: one with an encoder, and optionally one with what was trained on it: a contrastive
        head or a linear probe.
      overrides: what the user says about the model.

    Raises:
      UserError: a file does not exist, is damaged or of no kind that can be read; a tensor is
        missing, unexpected or of a wrong shape; or the files do not say what a model needs.
    """
    contents = [tensors.read(path) for path in files]
    sorted_files = [names.sort(content.tensors, str(content.path)) for content in contents]
    parts: Parts = {}
    for content, one in zip(contents, sorted_files, strict=True):
        if twice := set(parts) & set(one.parts):
            raise UserError(f"{content.path}: another {min(twice)}; one file of each is allowed")
        parts |= one.parts
    if ENCODER not in parts:
        raise UserError(
            f"{files[0]}: holds {sorted_files[0].layout}, and no encoder; name the encoder with "
            f"it, ENCODER,{files[0].name}"
        )
    main = next(i for i, one in enumerate(sorted_files) if ENCODER in one.parts)
    config, grid = _Builder(contents[main], parts, overrides or Overrides()).build()
    return Imported(
        files={path: one.layout for path, one in zip(files, sorted_files, strict=True)},
        kind=config.stages[0],
        config=config,
        described=tuple(_described(contents, sorted_files, config, grid)),
        parts=parts,
        grid=grid,
    )


class _Builder:
    """Makes the config of a model from its tensors, what is beside them, and the overrides."""

    def __init__(self, content: Content, parts: Parts, overrides: Overrides):
        self.content, self.parts, self.overrides = content, parts, overrides
        first = {
            "num_attention_heads": overrides.heads,
            "decoder_num_attention_heads": overrides.decoder_heads,
            "layer_norm_eps": overrides.ln_eps,
        }
        stated = {**content.config, **{key: x for key, x in first.items() if x is not None}}
        self.stated = {"global_pool": None}
        for key, (read, allowed) in _METADATA.items():
            if key == "global_pool" and overrides.pool:
                continue
            try:
                self.stated[key] = None if stated.get(key) is None else read(stated[key])
            except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
                raise self.error(f"{key} is {stated[key]!r}, must be {allowed}") from error

    def error(self, message: str) -> UserError:
        return UserError(f"{self.content.path}: {message}")

    def tensor(self, part: str, name: str, axes: int) -> Stored:
        """A tensor that must be there. Its exact shape is compared later."""
        if name not in self.parts[part]:
            raise self.error(f"the {part}'s tensor {name!r} is missing")
        x = self.parts[part][name]
        if len(x.shape) != axes or not min(x.shape):
            raise self.error(f"{x.names[0]!r} has shape {x.shape}, must have {axes} axes")
        return x

    def build(self) -> tuple[ConfigDict, tuple[int, int]]:
        """The config, and the patch grid (rows, columns) of the positions in the files."""
        beside = sorted(set(self.parts) - {ENCODER})
        if len(beside) > 1:
            raise self.error(f"holds {' and '.join(beside)}; only one of them is allowed")
        model, grid = self.model()
        patch, width = model.patch_size, vit.size_of(model).width
        images = np.zeros((1, grid[0] * patch, grid[1] * patch, model.channels))
        encoder = _zeros(vit.from_config(model), images)["params"]
        shapes = {ENCODER: _shapes(names.encoder_to_torch(encoder, patch))}
        shapes[ENCODER]["pos_embed"] = self.position_shape(ENCODER, grid, width)
        kind = "encoder"
        section: dict = {}
        if DECODER in beside:
            kind, section, shapes[DECODER] = self.decoder(model, grid)
        elif HEAD in beside:
            kind, section, shapes[HEAD] = self.head(width)
        elif CLASSIFIER in beside:
            kind, section, shapes[CLASSIFIER] = self.classifier(width)
        self.compare(shapes)
        config = {
            "name": self.content.path.stem,
            "stages": (kind,),
            "model": model,
            "data": self.normalisation(model.channels),
            kind: section,
        }
        return ConfigDict(config), grid

    def model(self) -> tuple[ConfigDict, tuple[int, int]]:
        """The `model` section, and the patch grid of the positions in the file."""
        weight = self.tensor(ENCODER, "patch_embed.proj.weight", axes=4)
        width, channels, patch, across = weight.shape
        if patch != across:
            raise self.error(f"{weight.names[0]!r} has shape {weight.shape}: not a square patch")
        variant = next((name for name, size in vit.VARIANTS.items() if size.width == width), None)
        heads, ln_eps = self.stated["num_attention_heads"], self.stated["layer_norm_eps"]
        if variant:
            heads, ln_eps = heads or vit.VARIANTS[variant].heads, ln_eps or LN_EPS
        if heads is None or ln_eps is None:
            asked = [f"--{key}" for key, x in (("heads", heads), ("ln_eps", ln_eps)) if x is None]
            widths, flags = [size.width for size in vit.VARIANTS.values()], " and ".join(asked)
            raise self.error(f"its width {width} is none of {widths}: import it with {flags}")
        size = vit.Size(width, names.depth(self.parts[ENCODER]), heads)
        beside = dict(hidden_size=width, num_hidden_layers=size.depth)
        for key, value in (beside | dict(patch_size=patch, num_channels=channels)).items():
            if (stated := self.content.config.get(key, value)) != value:
                raise self.error(f"{key} is {stated!r}, must be {value} as in the tensors")
        variant, grid = variant or "B", self.grid(patch)
        usual = vit.VARIANTS[variant]._asdict()
        section = {
            "variant": variant,
            **{key: None if x == usual[key] else x for key, x in size._asdict().items()},
            "patch_size": patch,
            "image_size": self.overrides.image_size or (grid[0] * patch, grid[1] * patch),
            "channels": channels,
            "pool": self.overrides.pool or self.pool(grid, width),
            "ln_eps": ln_eps,
            "dtype": self.overrides.dtype or "bfloat16",
            "attention": "auto",
        }
        config = ConfigDict({"model": section})
        try:
            vit.check(config)
        except UserError as error:
            raise self.error(str(error)) from error
        return config.model, grid

    def grid(self, patch: int) -> tuple[int, int]:
        """The patch grid (rows, columns) of the position embedding in the file."""
        position = self.tensor(ENCODER, "pos_embed", axes=3)
        counts = (position.shape[1] - 1, position.shape[1])  # the class token may have a row
        squares = [(math.isqrt(count),) * 2 for count in counts]
        sizes = self.stated["image_size"], self.overrides.image_size
        stated, asked = (size and positions.grid(size, patch) for size in sizes)
        # Of several, MAE's embedding decides; most others have a row for the class token.
        possible = [
            grid
            for grid in (stated, squares[0], asked, squares[1])
            if grid and math.prod(grid) in counts and min(grid) > 0
        ]
        if not possible:
            wrong = f"{position.names[0]!r} has shape {position.shape}, not that of a square image"
            raise self.error(f"{wrong}; import it with the --image_size that it was made for")
        return next((g for g in possible if _is_fixed(self.parts[ENCODER], g)), possible[0])

    def pool(self, grid: tuple[int, int], width: int) -> str:
        """The feature, where the user does not name one."""
        if "fc_norm.weight" in [name for x in self.parts[ENCODER].values() for name in x.names]:
            return "fc_norm"
        if CLASSIFIER in self.parts or self.stated["global_pool"]:
            return self.stated["global_pool"] or "cls"
        # Of an MAE of ViT-B the paper takes the patches' mean, of the others the class token.
        is_base = width == vit.VARIANTS["B"].width
        return "mean" if is_base and _is_fixed(self.parts[ENCODER], grid) else "cls"

    def normalisation(self, channels: int) -> dict[str, tuple[float, ...]]:
        """`mean` and `std` of the channels of pixels from 0 to 1, where they are stated."""
        processor, timm = self.content.preprocessor, self.content.config.get("pretrained_cfg")
        timm = timm if isinstance(timm, Mapping) else {}
        stated = {key: processor.get(f"image_{key}", timm.get(key)) for key in ("mean", "std")}
        if processor.get("do_normalize") is False:
            stated = {"mean": [0.0] * channels, "std": [1.0] * channels}
        if None in stated.values():
            return {}
        for key, values in stated.items():
            fits = isinstance(values, list) and len(values) == channels
            if not fits or any(type(x) not in (int, float) or not math.isfinite(x) for x in values):
                raise self.error(f"{key} is {values!r}, must be {channels} numbers")
        return {key: tuple(map(float, values)) for key, values in stated.items()}

    # What is beside the encoder: its key of `SAVED`, its config section, the shapes of its tensors.

    def decoder(self, model: ConfigDict, grid: tuple[int, int]) -> tuple[str, dict, Shapes]:
        width = self.tensor(DECODER, "embed.weight", axes=2).shape[0]
        heads = self.stated["decoder_num_attention_heads"] or _DECODER_HEADS.get(width)
        if heads is None:
            raise self.error(f"a decoder of width {width}: import it with --decoder_heads")
        if width % heads or width % 4:
            raise self.error(f"its decoder's width {width} must be a multiple of 4 and {heads}")
        size = vit.Size(width, names.depth(self.parts[DECODER]), heads)
        module = mae.Decoder(*size, model.patch_size, model.channels, model.ln_eps)
        latent = np.zeros((1, 1, vit.size_of(model).width))
        params = _zeros(module, latent, np.zeros((1, math.prod(grid)), int), grid=grid)["params"]
        shapes = _shapes(names.decoder_to_torch(params))
        shapes["pos_embed"] = self.position_shape(DECODER, grid, width)
        position = self.parts[DECODER]["pos_embed"]
        if position.shape[1] > math.prod(grid) and np.asarray(position)[:, 0].any():
            name = position.names[0]
            raise self.error(f"{name!r} has a row for the class token that is not zero")
        return "mae", {"decoder": size._asdict()}, shapes

    def head(self, width: int) -> tuple[str, dict, Shapes]:
        sizes = {k: self.tensor(HEAD, name, axes=2).shape[0] for k, name in _HEAD_SIZES.items()}
        hidden, out, predictor_hidden, queue = sizes.values()
        projector = _zeros(nnclr.Projector(hidden, out), np.zeros((2, width)), train=True)
        predictor = _zeros(nnclr.Predictor(predictor_hidden, out), np.zeros((2, out)), train=True)
        state = {key: dict(projector=projector[key], predictor=predictor[key]) for key in projector}
        kind = "ct" if _TARGET in self.parts[HEAD] else "head"
        if kind == "ct":
            state["target"] = {"projector": projector["params"]}
        shapes = _shapes(names.head_to_torch(state))
        shapes |= {"queue": (queue, out), "queue_id": (queue,), "queue_y": (queue,)}
        return kind, sizes, shapes | {"queue_ptr": (1,)}

    def classifier(self, width: int) -> tuple[str, dict, Shapes]:
        classes = self.tensor(CLASSIFIER, "classifier.weight", axes=2).shape[0]
        shapes = {"classifier.weight": (classes, width), "classifier.bias": (classes,)}
        running = self.parts[CLASSIFIER].get("classifier.running_var")
        if running is None:
            return "finetune", {}, shapes
        shapes |= {f"classifier.running_{key}": (width,) for key in ("mean", "var")}
        bn_eps = 1e-6 if running.names[0].startswith("head.") else 1e-5  # MAE's, the authors'
        return "probe", {"bn_eps": bn_eps}, shapes

    def position_shape(self, part: str, grid: tuple[int, int], width: int) -> tuple[int, ...]:
        rows, patches = self.tensor(part, "pos_embed", axes=3).shape[1], math.prod(grid)
        return (1, min(max(rows, patches), patches + 1), width)  # the class token may have a row

    def compare(self, shapes: Mapping[str, Shapes]) -> None:
        """Raises `UserError` for a tensor that is missing or unexpected, or of a wrong shape."""
        for part, expected in shapes.items():
            if missing := sorted(set(expected) - set(self.parts[part])):
                more = f" and {len(missing) - 1} more" if missing[1:] else ""
                raise self.error(f"the {part}'s tensor {missing[0]!r} is missing{more}")
            for name, x in self.parts[part].items():
                label = " + ".join(x.names)
                if name not in expected:
                    raise self.error(f"no place in the {part} for {label!r}")
                if x.shape != expected[name]:
                    raise self.error(f"{label!r} has shape {x.shape}, must be {expected[name]}")
                if not x.floating and name not in _WHOLE_NUMBERS:
                    raise self.error(f"{label!r} must hold floats of 16, 32 or 64 bits")


def _zeros(network: nn.Module, *inputs: np.ndarray, **settings) -> dict:
    """The variables of a network, as zeros that take no memory."""
    init = partial(network.init, **settings)
    abstract = jax.eval_shape(init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), abstract)


def _shapes(arrays: Mapping[str, np.ndarray]) -> Shapes:
    return {name: x.shape for name, x in arrays.items()}


def _is_fixed(encoder: Mapping[str, Stored], grid: tuple[int, int]) -> bool:
    """Whether an encoder's positions are MAE's fixed ones of a grid, bit by bit."""
    stored = encoder["pos_embed"]
    if not stored.floating or stored.shape[2] % 4:
        return False
    rows = np.asarray(stored)[0, -math.prod(grid) :]
    return np.array_equal(rows, positions.sincos(grid, stored.shape[2]))


def _described(contents, sorted_files, config: ConfigDict, grid) -> Iterator[str]:
    """Lines for people: the files, the model, how each tensor is used, which are not and why.

    Weight and bias, and those of all blocks, share a line.
    """
    for content, one in zip(contents, sorted_files, strict=True):
        yield f"{content.path}: {one.layout} names, {content.container}"
    parts = {part: x for one in sorted_files for part, x in one.parts.items()}
    ignored = {name: why for one in sorted_files for name, why in one.ignored.items()}
    model, size = config.model, vit.size_of(config.model)
    fixed = "the fixed sine-cosine ones" if _is_fixed(parts[ENCODER], grid) else "learned, frozen"
    resized = positions.grid(model.image_size, model.patch_size) != grid
    how = f", resized (bicubic) from {grid[0]} x {grid[1]} patches" if resized else ""
    if parts[ENCODER]["pos_embed"].shape[1] > math.prod(grid):
        how += "; the class token's is added to it"
    known = "from the folder" if config.data else "unknown; config.data.mean and .std apply"
    used = [(part, name, x) for part, named in parts.items() for name, x in named.items()]
    total = len(ignored) + len({name for *_, x in used for name in x.names})
    yield f"""\
kind       {config.stages[0]}: {" + ".join(sorted(parts, key=ENCODER.__ne__))}
encoder    width {size.width}, depth {size.depth}, heads {size.heads}, patch {model.patch_size}, \
LayerNorm eps {model.ln_eps:g}, feature {model.pool}
images     {model.image_size[0]} x {model.image_size[1]} x {model.channels}
positions  {fixed}{how}
mean, std  {known}
tensors    {total}, used as"""
    rows: dict[str, dict[str, None]] = {}
    for part, name, x in used:
        leaf = names.split(name)[2]
        leaf = leaf if all(theirs.endswith(leaf) for theirs in x.names) else ""
        theirs = " + ".join(theirs.removesuffix(leaf) for theirs in x.names)
        ours = f"{part} {name.removesuffix(leaf)}".replace("classifier classifier", "classifier")
        row = re.sub(r"\.\d+\b", ".*", f"  {theirs} -> {ours}")
        rows.setdefault(row, {})[leaf.removeprefix(".")] = None
    for row, leaves in rows.items():
        yield f"{row} ({', '.join(leaves)})" if any(leaves) else row
    for name, reason in ignored.items():
        yield f"  {name}: ignored, it {reason}"
