"""From files of weights to what a run saves: its kind, its config, its variables.

The tensors get the names of `names` first. Their shapes give the config of the network, and the
abstract variables of that network say which tensors there must be, and of which shapes.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from maect_jax.convert import names, tensors
from maect_jax.convert.names import CLASSIFIER, DECODER, ENCODER, HEAD, Parts
from maect_jax.convert.tensors import Content, Stored
from maect_jax.errors import UserError
from maect_jax.models import mae, nnclr, positions, vit
from maect_jax.stages import SAVED

LN_EPS = 1e-6  # MAE's, MAE-CT's and timm's
_DECODER_HEADS = {512: 16}  # by width: MAE's
_POOLS = {"": None, "token": "cls", "avg": "mean"}  # by timm's names
_HEAD_SIZES = {
    "projector_hidden": "projector.0.weight",
    "projector_out": "projector.6.weight",
    "predictor_hidden": "predictor.0.weight",
    "queue_size": "queue",
}
_WHOLE_NUMBERS = ("queue_id", "queue_y", "queue_ptr")


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
      files: their paths.
      kind: the stage that a run with such variables has saved, a key of `SAVED`.
      config: of such a run: `model`, `data` where the normalisation is known, the sizes of a head.
      described: for people, a line each.
    """

    files: tuple[Path, ...]
    kind: str
    config: ConfigDict
    described: tuple[str, ...]
    _layouts: tuple[str, ...]
    _parts: Parts
    _grid: tuple[int, int]

    def read(self) -> dict:
        """The variables, NumPy arrays: the fields `saved` and `exported` of the stage's class."""
        model, parts = self.config.model, self._parts
        fit = partial(
            positions.fitted,
            old=self._grid,
            new=positions.grid(model.image_size, model.patch_size),
        )
        encoder = fit(names.encoder_from_torch(parts[ENCODER], self._grid))
        fields = SAVED[self.kind].with_encoder(encoder)
        more = {}
        if DECODER in parts:
            decoder = fit(names.decoder_from_torch(parts[DECODER], self._grid))
            more = {"params": {"decoder": decoder}}
        elif HEAD in parts:
            more = names.head_from_torch(parts[HEAD])
        elif CLASSIFIER in parts:
            more = names.classifier_from_torch(parts[CLASSIFIER])
        return fields | {
            field: {**fields[field], **x} if field in fields else x for field, x in more.items()
        }

    def origin(self) -> list[dict]:
        """Where the weights are from: each file with its layout and its SHA-256."""
        return [
            {"file": path.name, "layout": layout, "sha256": tensors.sha256(path)}
            for path, layout in zip(self.files, self._layouts, strict=True)
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


def recognised(files: Sequence[Path], overrides: Overrides = Overrides()) -> Imported:
    """Recognises a model by the names and shapes of the tensors in its files.

    Args:
      files: one with an encoder, and optionally one with what was trained on it: a contrastive
        head or a linear probe.
      overrides: what the user says about the model.

    Raises:
      UserError: a file does not exist, is damaged or of no kind that can be read; a tensor is
        missing, unexpected or has a wrong shape; or the files do not say what a model needs.
    """
    where = ",".join(map(str, files))
    contents = [tensors.read(path) for path in files]
    sorted_files = [names.sort(content.tensors, str(content.path)) for content in contents]
    parts: Parts = {}
    for content, one in zip(contents, sorted_files, strict=True):
        if twice := set(parts) & set(one.parts):
            raise UserError(f"{content.path}: another {min(twice)}; one file of each is allowed")
        parts |= one.parts
    if ENCODER not in parts:
        raise UserError(
            f"{where}: holds {sorted_files[0].layout}, and no encoder; name the encoder with it, "
            f"ENCODER,{files[0].name}"
        )
    main = next(i for i, one in enumerate(sorted_files) if ENCODER in one.parts)
    config, grid = _Builder(contents[main], parts, overrides).build()
    described = _described(contents, sorted_files, config, grid)
    layouts = tuple(one.layout for one in sorted_files)
    return Imported(tuple(files), config.stages[0], config, tuple(described), layouts, parts, grid)


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Makes the config of a model.

    Attributes:
      content: of the file with the encoder.
      parts: the tensors of all files.
      overrides: what the user says.
    """

    content: Content
    parts: Parts
    overrides: Overrides

    def build(self) -> tuple[ConfigDict, tuple[int, int]]:
        """The config, and the patch grid (rows, columns) of the positions in the files."""
        kind = self._kind()
        model, grid = self._model()
        self._move_class_position(grid)
        section, decoder = {}, None
        if DECODER in self.parts:
            decoder = self._decoder(model)
            section["decoder"] = {key: getattr(decoder, key) for key in vit.Size._fields}
        elif HEAD in self.parts:
            section = {
                key: self._tensor(HEAD, name, axes=2).shape[0] for key, name in _HEAD_SIZES.items()
            }
        elif "running_var" in self.parts.get(CLASSIFIER, {}):
            name = self.parts[CLASSIFIER]["running_var"].names[0]
            section["bn_eps"] = 1e-6 if name.startswith("head.") else 1e-5  # MAE's, the authors'
        self._compare(self._expected(model, section, decoder, grid))
        data = self._normalisation(model.channels)
        name = self.content.path.stem
        config = {"name": name, "stages": (kind,), "model": model, "data": data, kind: section}
        return ConfigDict(config), grid

    def _kind(self) -> str:
        """The key of `SAVED` by what there is beside the encoder."""
        beside = sorted(set(self.parts) - {ENCODER})
        if len(beside) > 1:
            raise self._error(f"holds {' and '.join(beside)}; only one of them is allowed")
        if HEAD in beside:
            return "ct" if "target_projector.0.weight" in self.parts[HEAD] else "head"
        if CLASSIFIER in beside:
            return "probe" if "running_var" in self.parts[CLASSIFIER] else "finetune"
        return "mae" if DECODER in beside else "encoder"

    # What is written beside the tensors

    def _error(self, message: str) -> UserError:
        return UserError(f"{self.content.path}: {message}")

    def _stated(self, key: str, *allowed):
        """The value of a key, by default the first that is allowed."""
        value = self.content.config.get(key, allowed[0])
        if value not in allowed:
            names_of = " or ".join(map(repr, allowed))
            raise self._error(f"{key} is {value!r}, must be {names_of}")
        return value

    def _number(self, key: str, override, kind: type):
        """The override, or else the value of a key: a number above 0, or `None`."""
        value = self.content.config.get(key) if override is None else override
        if value is None:
            return None
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise self._error(f"{key} is {value!r}, must be a number above 0")
        return number

    def _stated_grid(self, patch: int) -> tuple[int, int] | None:
        """The patch grid of the image size: one side, or two."""
        value = self.content.config.get("image_size")
        try:
            sides = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            sides = value
        if sides is None:
            return None
        sides = sides if isinstance(sides, list) else [sides, sides]
        if len(sides) != 2 or any(type(side) is not int or side < patch for side in sides):
            raise self._error(f"image_size is {value!r}, must be one side or two, in pixels")
        return sides[0] // patch, sides[1] // patch

    def _normalisation(self, channels: int) -> dict[str, tuple[float, ...]]:
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
                raise self._error(f"{key} is {values!r}, must be {channels} numbers")
        return {key: tuple(map(float, values)) for key, values in stated.items()}

    # What the tensors say

    def _tensor(self, part: str, name: str, axes: int) -> Stored:
        """A tensor that must be there. Its exact shape is compared later."""
        if name not in self.parts[part]:
            raise self._error(f"the {part}'s tensor {name!r} is missing")
        x = self.parts[part][name]
        if len(x.shape) != axes or not min(x.shape):
            raise self._error(
                f"{x.names[0]!r} has shape {x.shape}, must have {axes} axes, none empty"
            )
        return x

    def _model(self) -> tuple[ConfigDict, tuple[int, int]]:
        """The `model` section, and the patch grid of the positions in the file."""
        weight = self._tensor(ENCODER, "patch_embed.proj.weight", axes=4)
        width, channels, patch, across = weight.shape
        if patch != across:
            raise self._error(f"{weight.names[0]!r} has shape {weight.shape}: not a square patch")
        known = next((name for name, size in vit.VARIANTS.items() if size.width == width), None)
        heads = self._number("num_attention_heads", self.overrides.heads, int)
        ln_eps = self._number("layer_norm_eps", self.overrides.ln_eps, float)
        if known:
            heads, ln_eps = heads or vit.VARIANTS[known].heads, ln_eps or LN_EPS
        asked = [f"--{key}" for key, x in (("heads", heads), ("ln_eps", ln_eps)) if x is None]
        if asked:
            widths = ", ".join(str(size.width) for size in vit.VARIANTS.values())
            raise self._error(
                f"an encoder of width {width} is none of the known ones ({widths}), and the file "
                f"does not say all of it: import it with {' and '.join(asked)}"
            )
        self._check_width(ENCODER, width, heads)
        size = vit.Size(width, names.depth(self.parts[ENCODER]), heads)
        self._stated("hidden_act", "gelu")  # no tensor tells
        for key, value in (
            ("hidden_size", width),
            ("num_hidden_layers", size.depth),
            ("patch_size", patch),
            ("num_channels", channels),
        ):
            self._stated(key, value)
        grid = self._grid(patch)
        variant = known or "B"
        sizes = {
            key: None if value == getattr(vit.VARIANTS[variant], key) else value
            for key, value in size._asdict().items()
        }
        section = {
            "variant": variant,
            **sizes,
            "patch_size": patch,
            "image_size": self.overrides.image_size or (grid[0] * patch, grid[1] * patch),
            "channels": channels,
            "pool": self.overrides.pool or self._pool(grid, width),
            "ln_eps": ln_eps,
            "dtype": self.overrides.dtype or "bfloat16",
        }
        return ConfigDict(section), grid

    def _check_width(self, part: str, width: int, heads: int) -> None:
        if width % heads or width % 4:
            raise self._error(
                f"the {part}'s width {width} must be a multiple of 4 and of its {heads} heads"
            )

    def _grid(self, patch: int) -> tuple[int, int]:
        """The patch grid (rows, columns) of the position embedding in the file."""
        size = self.overrides.image_size
        if size and any(side < patch or side % patch for side in size):
            raise self._error(
                f"the image size {size} must be a multiple of the patch size, {patch}, which "
                "cannot be changed"
            )
        position = self._tensor(ENCODER, "pos_embed", axes=3)
        rows = position.shape[1]
        counts = (rows - 1, rows)  # the class token may have a row
        squares = [(math.isqrt(count),) * 2 for count in counts]
        asked = size and (size[0] // patch, size[1] // patch)
        # Of several MAE's embedding decides; most others have a row for the class token.
        possible = (self._stated_grid(patch), squares[0], asked, squares[1])
        possible = [grid for grid in possible if grid and math.prod(grid) in counts and min(grid)]
        if not possible:
            raise self._error(
                f"{position.names[0]!r} has shape {position.shape}, which is not that of a square "
                "image; import it with the --image_size=HEIGHT,WIDTH that it was made for"
            )
        return next((g for g in possible if _is_fixed(self.parts[ENCODER], g)), possible[0])

    def _pool(self, grid: tuple[int, int], width: int) -> str:
        """The feature of the model where the user does not name one: for an MAE the paper's."""
        norm = self.parts[ENCODER].get("norm.weight")
        if norm and norm.names == ("fc_norm.weight",):
            return "fc_norm"
        pool = _POOLS[self._stated("global_pool", *_POOLS)]
        if pool or CLASSIFIER in self.parts:
            return pool or "cls"
        base = width == vit.VARIANTS["B"].width
        return "mean" if base and _is_fixed(self.parts[ENCODER], grid) else "cls"

    def _decoder(self, model: ConfigDict) -> mae.Decoder:
        width = self._tensor(DECODER, "embed.weight", axes=2).shape[0]
        heads = self._number("decoder_num_attention_heads", self.overrides.decoder_heads, int)
        heads = heads or _DECODER_HEADS.get(width)
        if heads is None:
            raise self._error(
                f"a decoder of width {width} is not MAE's; import it with --decoder_heads"
            )
        self._check_width(DECODER, width, heads)
        size = vit.Size(width, names.depth(self.parts[DECODER]), heads)
        return mae.Decoder(*size, model.patch_size, model.channels, model.ln_eps)

    def _move_class_position(self, grid: tuple[int, int]) -> None:
        """Adds the class token's row of the position embedding, where there is one, to the token.

        A decoder has no class token of its own, so there the row must be zero.
        """
        patches = math.prod(grid)
        for part in (ENCODER, DECODER):
            tensors = self.parts.get(part, {})
            position = tensors.get("pos_embed")
            if position is None or position.shape[1:2] != (patches + 1,):
                continue
            if part == ENCODER:
                token = self._tensor(ENCODER, "cls_token", axes=3)
                tensors["cls_token"] = dataclasses.replace(
                    token,
                    names=token.names + position.names,
                    read=lambda token=token, x=position: np.asarray(token) + np.asarray(x)[:, :1],
                    floating=token.floating and position.floating,
                )
            elif np.asarray(position)[:, 0].any():
                raise self._error(
                    f"{position.names[0]!r} has a row for the class token that is not zero, for "
                    "which there is no place in the decoder"
                )
            tensors["pos_embed"] = dataclasses.replace(
                position,
                shape=(position.shape[0], patches, *position.shape[2:]),
                read=lambda x=position: np.asarray(x)[:, 1:],
            )

    # The comparison with the network

    def _expected(
        self, model: ConfigDict, section: Mapping, decoder: mae.Decoder | None, grid
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        """By part, the shapes of the tensors of the network that the config describes."""
        encoder, width, patch = vit.from_config(model), vit.size_of(model).width, model.patch_size
        images = np.empty((1, grid[0] * patch, grid[1] * patch, model.channels), np.float32)
        params = _abstract(encoder.init, images)["params"]
        expected = {ENCODER: names.encoder_to_torch(params, patch, grid)}
        if decoder:
            inputs = np.empty((1, 1, width), np.float32), np.empty((1, math.prod(grid)), np.int32)
            params = _abstract(partial(decoder.init, grid=grid), *inputs)["params"]
            expected[DECODER] = names.decoder_to_torch(params, grid)
        shapes = {
            part: {name: x.shape for name, x in tensors.items()}
            for part, tensors in expected.items()
        }
        if HEAD in self.parts:
            shapes[HEAD] = self._expected_head(section, width)
        if CLASSIFIER in self.parts:
            classes = self._tensor(CLASSIFIER, "weight", axes=2).shape[0]
            shapes[CLASSIFIER] = {"weight": (classes, width), "bias": (classes,)}
            if "bn_eps" in section:
                shapes[CLASSIFIER] |= {"running_mean": (width,), "running_var": (width,)}
        return shapes

    def _expected_head(self, section: Mapping, width: int) -> dict[str, tuple[int, ...]]:
        out, queue = section["projector_out"], section["queue_size"]
        modules = {
            "projector": (nnclr.Projector(section["projector_hidden"], out), width),
            "predictor": (nnclr.Predictor(section["predictor_hidden"], out), out),
        }
        variables = {
            name: _abstract(partial(module.init, train=True), np.empty((2, size), np.float32))
            for name, (module, size) in modules.items()
        }
        head = {
            field: {name: tree[field] for name, tree in variables.items()}
            for field in ("params", "batch_stats")
        }
        if "target_projector.0.weight" in self.parts[HEAD]:
            head["target"] = {"projector": head["params"]["projector"]}
        rings = {
            "queue": (queue, out),
            "queue_id": (queue,),
            "queue_y": (queue,),
            "queue_ptr": (1,),
        }
        return {name: x.shape for name, x in names.head_to_torch(head).items()} | rings

    def _compare(self, expected: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
        """Raises `UserError` for a tensor that is missing or unexpected, or of a wrong shape."""
        for part, shapes in expected.items():
            tensors = self.parts[part]
            missing = sorted(set(shapes) - set(tensors))
            if missing:
                more = f" and {len(missing) - 1} more" if missing[1:] else ""
                raise self._error(f"the {part}'s tensor {missing[0]!r} is missing{more}")
            for name, x in tensors.items():
                label, shape = " + ".join(x.names), shapes.get(name)
                if shape is None:
                    raise self._error(f"no place in the {part} for {label!r}")
                if x.shape != shape:
                    raise self._error(f"{label!r} has shape {x.shape}, must be {shape}")
                if not x.floating and name not in _WHOLE_NUMBERS:
                    raise self._error(f"{label!r} must hold floats of 16, 32 or 64 bits")


def _abstract(init: Callable, *inputs: np.ndarray) -> dict:
    """What a network initialises: zeros of the same shapes, which take no memory."""
    variables = jax.eval_shape(init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), variables)


def _is_fixed(encoder: Mapping[str, Stored], grid: tuple[int, int]) -> bool:
    """Whether an encoder's positions are MAE's fixed ones of a grid, bit by bit."""
    stored = encoder["pos_embed"]
    if not stored.floating or stored.shape[2] % 4:
        return False
    rows = np.asarray(stored)[0, -math.prod(grid) :]
    return np.array_equal(rows, positions.sincos(grid, stored.shape[2]))


def _described(
    contents: Sequence[Content],
    sorted_files: Sequence[names.Sorted],
    config: ConfigDict,
    grid: tuple[int, int],
) -> Iterator[str]:
    """Lines for people: the files, the model, how each tensor is used, which are not and why.

    Weight and bias, and those of all blocks, share a line.
    """
    for content, one in zip(contents, sorted_files, strict=True):
        yield f"{content.path}: {one.layout} names, {content.container}"
    parts = {part: x for one in sorted_files for part, x in one.parts.items()}
    model, size = config.model, vit.size_of(config.model)
    yield f"kind       {config.stages[0]}: {' + '.join(sorted(parts, key=ENCODER.__ne__))}"
    yield (
        f"encoder    width {size.width}, depth {size.depth}, heads {size.heads}, patch "
        f"{model.patch_size}, LayerNorm eps {model.ln_eps:g}, feature {model.pool}"
    )
    yield f"images     {model.image_size[0]} x {model.image_size[1]} x {model.channels}"
    fixed = "the fixed sine-cosine ones" if _is_fixed(parts[ENCODER], grid) else "learned, frozen"
    resized = positions.grid(model.image_size, model.patch_size) != grid
    how = f", resized (bicubic) from {grid[0]} x {grid[1]} patches" if resized else ""
    yield f"positions  {fixed}{how}"
    known = "from the folder" if config.data else "unknown; config.data.mean and .std apply"
    yield f"mean, std  {known}"
    ignored = {name: why for one in sorted_files for name, why in one.ignored.items()}
    used = {name for of_part in parts.values() for x in of_part.values() for name in x.names}
    yield f"tensors    {len(ignored) + len(used)}, used as"
    rows: dict[str, dict[str, None]] = {}
    for part, of_part in parts.items():
        for name, x in of_part.items():
            module, _, leaf = name.rpartition(".")
            if not module or not all(n.endswith(f".{leaf}") for n in x.names):
                module, leaf = name, ""
            theirs = " + ".join(n.removesuffix(f".{leaf}") for n in x.names)
            row = re.sub(r"\.\d+\b", ".*", f"  {theirs} -> {part} {module}")
            rows.setdefault(row, {})[leaf] = None
    for row, leaves in rows.items():
        yield f"{row} ({', '.join(leaves)})" if any(leaves) else row
    for name, reason in ignored.items():
        yield f"  {name}: ignored, it {reason}"
