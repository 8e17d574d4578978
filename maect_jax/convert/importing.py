"""From files of weights to what a run saves: its kind, its config, its variables.

The tensors get the names of `names` first. Their shapes give the config of the network, and the
abstract variables of that network say which tensors there must be, and of which shapes.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from maect_jax import errors
from maect_jax.convert import choice, hub, names, tensors
from maect_jax.convert.names import CLASSIFIER, DECODER, ENCODER, HEAD, Parts
from maect_jax.convert.tensors import Content, Stored
from maect_jax.errors import UserError
from maect_jax.models import mae, nnclr, positions, vit
from maect_jax.stages import SAVED

Shapes = dict[str, tuple[int, ...]]  # of tensors
LN_EPS = 1e-6  # MAE's, MAE-CT's and timm's
ROTARY_EPS, ROTARY_BASE, ROTARY_SIZE = 1e-5, 100.0, (224, 224)  # DINOv3's
_HALF = 2.0**-8  # by which numbers up to 1, or in parts, differ that were kept in 16 bits
_DECODER_HEADS = {512: 16}  # by width: MAE's
_HEAD_SIZES = {
    "projector_hidden": "projector.0.weight",
    "projector_out": "projector.6.weight",
    "predictor_hidden": "predictor.0.weight",
    "queue_size": "queue",
}
_TARGET = "target_projector.0.weight"  # a head of stage ct has a target
# Names that tensors of DINOv3 have, in Meta's, timm's or HuggingFace's files, and of DINOv2 none.
_DINOV3 = r"\b(storage_tokens|gamma_1|patch_embeddings\.weight)$"
_WHOLE_NUMBERS = ("queue_id", "queue_y", "queue_ptr")


def _sides(value) -> tuple[int, int]:
    """(height, width) of an image size: one side or two, or JSON."""
    sides = json.loads(value) if isinstance(value, str) else value
    height, width = sides if isinstance(sides, list) else (sides, sides)
    if type(height) is not int or type(width) is not int:
        raise ValueError
    return height, width


def _architecture(value: str) -> str:
    """A name of timm's, of a network that its tensors describe."""
    if re.search(r"_rpn_|patch32_siglip_gap", value):
        raise ValueError
    return value


# What may be written beside the tensors, by HuggingFace's or timm's key: how it is read, and what
# it must be.
_METADATA = {
    "num_attention_heads": (errors.positive(int), "a number above 0"),
    "decoder_num_attention_heads": (errors.positive(int), "a number above 0"),
    "layer_norm_eps": (errors.positive(float), "a number above 0"),
    "rope_theta": (errors.positive(float), "a number above 0"),
    "image_size": (_sides, "one side or two, in pixels"),
    "hidden_act": ({"gelu": "gelu"}.__getitem__, "'gelu'"),  # no tensor says
    "architecture": (_architecture, "one with norms before the branches, and the exact GELU"),
    "global_pool": ({"": None, "token": "cls", "avg": "mean"}.__getitem__, "'token' or 'avg'"),
}


# In the `ctor_kwargs` of MAE-CT's authors: the same keys; the feature of a probe, by its pooling.
_AUTHORS = {
    "attention_heads": "num_attention_heads",
    "embedding_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "patch_size": "patch_size",
}
_POOLINGS = {"class_token": "cls", "mean_patch": "mean"}


@dataclasses.dataclass(frozen=True)
class Overrides:
    """What the user says about a model, which comes before what the files say. `None`: nothing.

    `key` names one of several models in a file (`choice.choose`).
    """

    heads: int | None = None
    decoder_heads: int | None = None
    ln_eps: float | None = None
    image_size: tuple[int, int] | None = None
    pool: str | None = None
    dtype: str | None = None
    key: str | None = None


@dataclasses.dataclass(frozen=True)
class Imported:
    """Files of weights, recognised and checked but not yet read."""

    # By their paths, what a lineage says of each: its name or the id by which the hub has it
    # (`file`), where the user gave another (`named`); whose names it has (`layout`); which of its
    # models is taken (`key`) where it has several.
    files: Mapping[Path, dict[str, str]]
    kind: str  # the stage that a run with such variables has saved, a key of `SAVED`
    # Of such a run: `model`, `data` where the normalisation is known, the sizes of a head.
    config: ConfigDict
    described: tuple[str, ...]  # for people, a line each
    notes: tuple[str, ...]  # those of its lines that tell what a file has and is not used
    parts: Parts  # the tensors
    grid: tuple[int, int]  # (rows, columns) of patches that their positions are for

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
        """Where the weights are from: `files`, each with its SHA-256."""
        return [about | {"sha256": tensors.sha256(x)} for x, about in self.files.items()]


def is_file(init_from: str) -> bool:
    """Whether `init_from` names files of weights, or ids of the hub, and not a run."""
    paths = paths_of(init_from)
    if len(paths) != 1 or isinstance(paths[0], str):
        return bool(paths)
    if paths[0].is_dir():
        return not (paths[0] / "checkpoints").exists() and bool(tensors.weights_in(paths[0]))
    return paths[0].is_file()


def paths_of(text: str) -> tuple[Path | str, ...]:
    """The paths in `ENCODER` or `ENCODER,HEAD`; ids of the hub as they are."""
    if Path(text).exists():
        return (Path(text),)
    return tuple(part if hub.is_id(part) else Path(part) for part in text.split(",") if part)


def recognised(
    files: Sequence[Path | str],
    overrides: Overrides | None = None,
    fetch: Callable[[str], hub.Fetched] = hub.fetch,
) -> Imported:
    """Recognises a model by the names and shapes of the tensors in its files.

    The files are one with an encoder, and optionally one with what was trained on it: a contrastive
    head or a linear probe. Each is a path, or an id of the hub, which `fetch` gets. Raises
    `UserError` if a file does not exist, is damaged or of no kind that can be read; a tensor is
    missing, unexpected or of a wrong shape; or the files do not say what a model needs.
    """
    overrides = overrides or Overrides()
    fetched = [fetch(file) if isinstance(file, str) else None for file in files]
    contents = [
        one.read() if one else tensors.read(Path(file))
        for one, file in zip(fetched, files, strict=True)
    ]
    chosen = choice.choose(contents, overrides.key)
    sources: dict[str, _Source] = {}
    all_sources = []
    for content, model, one in zip(contents, chosen, fetched, strict=True):
        source = _Source(content, model, names.sort(model.tensors, str(content.path)), one)
        if twice := sources.keys() & source.sorted.parts.keys():
            raise UserError(f"{content.path}: another {min(twice)}; one file of each is allowed")
        sources |= dict.fromkeys(source.sorted.parts, source)
        all_sources.append(source)
    if ENCODER not in sources:
        raise UserError(
            f"{files[0]}: holds {all_sources[0].sorted.layout}, and no encoder; name the file of "
            "its encoder, too"
        )
    config, grid = _Builder(sources, overrides).build()
    return Imported(
        files={x.content.path: x.about() for x in all_sources},
        kind=config.stages[0],
        config=config,
        described=tuple(_described(all_sources, config, grid)),
        notes=tuple(note for x in all_sources for note in x.model.notes),
        parts={part: x.sorted.parts[part] for part, x in sources.items()},
        grid=grid,
    )


class _Source(NamedTuple):
    """A file, the model that is taken of it, and the parts of that."""

    content: Content
    model: choice.Chosen
    sorted: names.Sorted
    fetched: hub.Fetched | None  # where it is from, if not from here

    @property
    def name(self) -> str:
        return self.fetched.name if self.fetched else self.content.path.stem

    def about(self) -> dict[str, str]:
        """What a lineage says of the file."""
        key = {} if self.model.key is None else {"key": self.model.key}
        file = {"file": self.content.path.name}
        if self.fetched:
            file = {"file": self.fetched.id, "named": self.fetched.named}
        return {**file, "layout": self.sorted.layout, **key}


def _authors(content: Content) -> Mapping:
    """What the code of MAE-CT's authors writes about a model, if it has written the file."""
    kwargs = content.config.get("ctor_kwargs")
    return kwargs if isinstance(kwargs, Mapping) else {}


def _stated(content: Content, overrides: Overrides) -> dict[str, tuple[str, Any]]:
    """What is stated about an encoder, by HuggingFace's or timm's key: where, and the value."""
    stated = {key: (key, value) for key, value in content.config.items()}
    timm = content.config.get("pretrained_cfg")
    if isinstance(timm, Mapping) and isinstance(size := timm.get("input_size"), list):
        stated["image_size"] = "pretrained_cfg.input_size", size[1:]  # without the channels
    own = content.config.get("model_args")
    if isinstance(own, Mapping) and "act_layer" in own:
        stated["hidden_act"] = "model_args.act_layer", own["act_layer"]
    authors = _authors(content)
    for theirs, key in _AUTHORS.items():
        if theirs in authors:
            stated[key] = f"ctor_kwargs.{theirs}", authors[theirs]
    if "attention_heads" in authors:
        stated["layer_norm_eps"] = "", LN_EPS  # their code has no other
    given = {
        "num_attention_heads": ("heads", overrides.heads),
        "decoder_num_attention_heads": ("decoder_heads", overrides.decoder_heads),
        "layer_norm_eps": ("ln_eps", overrides.ln_eps),
    }
    stated |= {key: pair for key, pair in given.items() if pair[1] is not None}
    return stated | ({"global_pool": ("pool", None)} if overrides.pool else {})


class _Builder:
    """Makes the config of a model from its tensors, what is beside them, and the overrides."""

    def __init__(self, sources: Mapping[str, _Source], overrides: Overrides):
        self.sources, self.overrides = sources, overrides
        self.parts = {part: source.sorted.parts[part] for part, source in sources.items()}
        self.content = sources[ENCODER].content
        self.beside = _stated(self.content, overrides)
        self.stated = {}
        for key, (read, allowed) in _METADATA.items():
            label, value = self.beside.get(key, (key, None))
            try:
                self.stated[key] = None if value is None else read(value)
            except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
                raise self.error(f"{label} is {value!r}, must be {allowed}") from error

    def error(self, message: str, part: str = ENCODER) -> UserError:
        return UserError(f"{self.sources[part].content.path}: {message}")

    def missing(self, part: str, tensor: str, more: str = "") -> UserError:
        name = self.sources[part].sorted.in_file(part, tensor)
        return self.error(f"the {part}'s tensor {name!r} is missing{more}", part)

    def tensor(self, part: str, name: str, axes: int) -> Stored:
        """A tensor that must be there. Its exact shape is compared later."""
        if name not in self.parts[part]:
            raise self.missing(part, name)
        x = self.parts[part][name]
        if len(x.shape) != axes or not min(x.shape):
            wrong = f"{x.names[0]!r} has shape {x.shape}, must have {axes} axes"
            raise self.error(f"{wrong}, none of them empty", part)
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
        if model.rope_theta is None:
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
            "name": self.sources[ENCODER].name,
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
        mlp = self.parts[ENCODER].get("blocks.0.mlp.fc1.weight")
        if mlp is not None and mlp.shape[:1] != (4 * width,):
            wrong = f"{mlp.names[0]!r} has shape {mlp.shape}, a SwiGLU or an MLP of another width"
            raise self.error(f"{wrong}; only GELU MLPs of 4 times the width {width} can be read")
        biases = self.parts[ENCODER].get("blocks.0.attn.qkv.bias")
        _, stated = self.beside.get("qkv_bias", ("", False))
        if biases and stated and len(biases.names) not in (1, 3):  # some are zeros
            raise self.missing(ENCODER, "blocks.0.attn.key.bias", "; config has qkv_bias")
        variant = next((name for name, size in vit.VARIANTS.items() if size.width == width), None)
        heads, ln_eps = self.stated["num_attention_heads"], self.stated["layer_norm_eps"]
        rope_theta, periods = self.rope_theta(), self.sources[ENCODER].sorted.periods
        if rope_theta is not None:
            ln_eps = ln_eps or ROTARY_EPS
        if periods is not None:
            heads = heads or width // (4 * len(np.asarray(periods)))
        if variant:
            heads, ln_eps = heads or vit.VARIANTS[variant].heads, ln_eps or LN_EPS
        if heads is None or ln_eps is None:
            asked = [f"--{key}" for key, x in (("heads", heads), ("ln_eps", ln_eps)) if x is None]
            widths, flags = [size.width for size in vit.VARIANTS.values()], " and ".join(asked)
            raise self.error(f"its width {width} is none of {widths}: import it with {flags}")
        size = vit.Size(width, names.depth(self.parts[ENCODER]), heads)
        cls_tokens, registers = self.tokens()
        beside = dict(hidden_size=width, num_hidden_layers=size.depth, n_cls_tokens=cls_tokens)
        beside |= dict(num_register_tokens=registers, patch_size=patch, num_channels=channels)
        for key, value in beside.items():
            label, stated = self.beside.get(key, (key, value))
            if stated not in (value, [value] * 2, (value,) * 2):  # of a patch also two sides
                raise self.error(f"{label} is {stated!r}, must be {value} as in the tensors")
        variant, grid = variant or "B", self.grid(patch)
        usual = vit.VARIANTS[variant]._asdict()
        section = {
            "variant": variant,
            **{key: None if x == usual[key] else x for key, x in size._asdict().items()},
            "patch_size": patch,
            "image_size": self.overrides.image_size or (grid[0] * patch, grid[1] * patch),
            "channels": channels,
            "cls_tokens": cls_tokens,
            "registers": registers,
            "rope_theta": rope_theta,
            "post_norm": "embed_norm.weight" in self.parts[ENCODER],
            "pool": self.probe_pool() or self.overrides.pool or self.pool(grid, width),
            "ln_eps": ln_eps,
            "dtype": self.overrides.dtype or "bfloat16",
            "attention": "auto",
        }
        config = ConfigDict({"model": section})
        try:
            vit.check(config)
        except UserError as error:
            raise self.error(str(error).removeprefix("config.model.")) from error
        if periods is not None:
            count = width // heads // 4
            want = rope_theta ** (np.arange(count) / count)
            if np.shape(periods) != want.shape or not np.allclose(periods, want, _HALF, 0):
                wrong = f"{periods.names[0]!r} must be {count} powers from 1 to {rope_theta}"
                raise self.error(f"{wrong}, which rotary positions of {heads} heads have")
        return config.model, grid

    def rope_theta(self) -> float | None:
        """The base of rotary positions, if the model has DINOv3's; then it has no others.

        Which rotary positions a model has is in none of its tensors, but of those that add no
        position, and have such names, DINOv3 alone has registers beside a class token.
        """
        own, stated = self.parts[ENCODER], self.stated["rope_theta"]
        theirs = [name for x in own.values() for name in x.names]
        said = stated is not None or self.sources[ENCODER].sorted.periods is not None
        if "pos_embed" not in own:
            dinov3 = any(re.search(_DINOV3, name) for name in theirs)
            if not said and not (dinov3 and {"cls_token", "register_tokens"} <= own.keys()):
                raise self.missing(ENCODER, "pos_embed", "; of rotary positions DINOv3's are read")
            for name in ("cls_token",) if stated else ("cls_token", "register_tokens"):
                self.tensor(ENCODER, name, axes=3)
            return stated or ROTARY_BASE
        # LayerScale by this name beside biases by that one is of timm's vit_*_rope_ape_*.
        both = all(any(name.endswith(end) for name in theirs) for end in ("gamma_1", "qkv.bias"))
        if said or both:
            raise self.error("has rotary positions beside a position embedding; these are not read")
        return None

    def tokens(self) -> tuple[int, int]:
        """The numbers of class tokens and of registers."""
        own = self.parts[ENCODER]
        cls_tokens, registers = (
            self.tensor(ENCODER, name, axes=3).shape[1] if name in own else 0
            for name in ("cls_token", "register_tokens")
        )
        return cls_tokens, registers

    def extra_rows(self) -> tuple[int, ...]:
        """How many rows of a position embedding may come before those of the patches: for class
        tokens, as in most models, for registers, too, or none."""
        cls_tokens, registers = self.tokens()
        return cls_tokens, cls_tokens + registers, 0

    def grid(self, patch: int) -> tuple[int, int]:
        """The patch grid (rows, columns) of the position embedding in the file; of rotary
        positions, which fit any, that of the images."""
        if "pos_embed" not in self.parts[ENCODER]:
            size = self.overrides.image_size or self.stated["image_size"] or ROTARY_SIZE
            return positions.grid(size, patch)
        position = self.tensor(ENCODER, "pos_embed", axes=3)
        counts = [position.shape[1] - extra for extra in self.extra_rows()]
        first, *squares = [(math.isqrt(max(count, 0)),) * 2 for count in counts]
        sizes = self.stated["image_size"], self.overrides.image_size
        stated, asked = (size and positions.grid(size, patch) for size in sizes)
        own = self.sources[ENCODER].sorted.grid
        # Of several, MAE's embedding decides.
        possible = [
            grid
            for grid in ((own,) if own else (stated, first, asked, *squares))
            if grid and math.prod(grid) in counts and min(grid) > 0
        ]
        if not possible:
            rows = position.shape[1] - 1
            if not self.tokens()[0] and math.isqrt(rows) ** 2 == rows:
                raise self.missing(ENCODER, "cls_token")
            wrong = f"{position.names[0]!r} has shape {position.shape}, not that of a square image"
            raise self.error(f"{wrong}; import it with the --image_size that it was made for")
        fixed = (g for g in possible if _is_fixed(self.parts[ENCODER], g, atol=_HALF))
        return next(fixed, possible[0])

    def probe_pool(self) -> str | None:
        """The feature that a probe was trained on, where its file states it."""
        if CLASSIFIER not in self.sources:
            return None
        pooling = _authors(self.sources[CLASSIFIER].content).get("pooling")
        kind = pooling.get("kind") if isinstance(pooling, Mapping) else pooling
        if kind is None:
            return None
        stated = f"ctor_kwargs.pooling.kind is {kind!r}"
        pool = _POOLINGS.get(kind) if isinstance(kind, str) else None
        if pool is None:
            raise self.error(f"{stated}, must be one of {', '.join(_POOLINGS)}", CLASSIFIER)
        for label, other in (
            ("--pool", self.overrides.pool),
            ("its encoder's global_pool", self.stated["global_pool"]),
            ("its encoder's feature", "fc_norm" if self.has_fc_norm() else None),
        ):
            if other not in (None, pool):
                raise self.error(f"{stated}, which is {pool!r}; {label} is {other!r}", CLASSIFIER)
        return pool

    def has_fc_norm(self) -> bool:
        theirs = [name for x in self.parts[ENCODER].values() for name in x.names]
        return any(re.search(r"\b(fc_norm|pooler\.layernorm)\.weight$", name) for name in theirs)

    def pool(self, grid: tuple[int, int], width: int) -> str:
        """The feature, where the user does not name one."""
        if self.has_fc_norm():
            return "fc_norm"
        if self.stated["global_pool"]:
            return self.stated["global_pool"]
        if CLASSIFIER in self.parts and self.tokens()[0]:
            return "cls"
        if not self.tokens()[0]:
            return "mean"
        # Of an MAE of ViT-B the paper takes the patches' mean, of the others the class token.
        is_base = width == vit.VARIANTS["B"].width
        return "mean" if is_base and _is_fixed(self.parts[ENCODER], grid, atol=_HALF) else "cls"

    def normalisation(self, channels: int) -> dict[str, tuple[float, ...]]:
        """`mean` and `std` of the channels of pixels from 0 to 1, where they are stated."""
        processor, timm = self.content.preprocessor, self.content.config.get("pretrained_cfg")
        timm = timm if isinstance(timm, Mapping) else {}
        header = {key: _listed(self.content.config.get(f"image_{key}")) for key in ("mean", "std")}
        stated = {k: processor.get(f"image_{k}", timm.get(k, x)) for k, x in header.items()}
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
            raise self.error(f"a decoder of width {width}: import it with --decoder_heads", DECODER)
        if width % heads or width % 4:
            wrong = f"its decoder's width {width} must be a multiple of 4 and {heads}"
            raise self.error(wrong, DECODER)
        size = vit.Size(width, names.depth(self.parts[DECODER]), heads)
        module = mae.Decoder(*size, model.patch_size, model.channels)
        latent = np.zeros((1, 1, vit.size_of(model).width))
        params = _zeros(module, latent, np.zeros((1, math.prod(grid)), int), grid=grid)["params"]
        shapes = _shapes(names.decoder_to_torch(params))
        shapes["pos_embed"] = self.position_shape(DECODER, grid, width)
        position = self.parts[DECODER]["pos_embed"]
        if np.asarray(position)[:, : -math.prod(grid)].any():
            name = position.names[0]
            raise self.error(f"{name!r} has a row for the class token that is not zero", DECODER)
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
        own = self.parts[CLASSIFIER]
        running = next((x for name, x in own.items() if ".running_" in name), None)
        if running is None:
            return "finetune", {}, shapes
        shapes |= {f"classifier.running_{key}": (width,) for key in ("mean", "var")}
        of_mae = re.search(r"\bhead\.0\.running_\w+$", running.names[0])
        bn_eps = 1e-6 if of_mae else 1e-5  # the authors'
        return "probe", {"bn_eps": bn_eps}, shapes

    def position_shape(self, part: str, grid: tuple[int, int], width: int) -> tuple[int, ...]:
        rows, patches = self.tensor(part, "pos_embed", axes=3).shape[1], math.prod(grid)
        allowed = [patches + extra for extra in self.extra_rows()]
        return (1, rows if rows in allowed else allowed[0], width)

    def compare(self, shapes: Mapping[str, Shapes]) -> None:
        """Raises `UserError` for a tensor that is missing or unexpected, or of a wrong shape."""
        for part, expected in shapes.items():
            if missing := sorted(set(expected) - set(self.parts[part])):
                raise self.missing(
                    part, missing[0], f" and {len(missing) - 1} more" if missing[1:] else ""
                )
            for name, x in self.parts[part].items():
                label = " + ".join(x.names)
                if name not in expected:
                    raise self.error(f"no place in the {part} for {label!r}", part)
                if x.shape != expected[name]:
                    wrong = f"{label!r} has shape {x.shape}, must be {expected[name]}"
                    raise self.error(wrong, part)
                if not x.floating and name not in _WHOLE_NUMBERS:
                    raise self.error(f"{label!r} must hold floats of 16, 32 or 64 bits", part)


def _listed(text):
    """The list that a text in a header of safetensors stands for; what else there is as it is."""
    with suppress(TypeError, ValueError):
        return json.loads(text)
    return text


def _zeros(network: nn.Module, *inputs: np.ndarray, **settings) -> dict:
    """The variables of a network, as zeros that take no memory."""
    init = partial(network.init, **settings)
    abstract = jax.eval_shape(init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), abstract)


def _shapes(arrays: Mapping[str, np.ndarray]) -> Shapes:
    return {name: x.shape for name, x in arrays.items()}


def _is_fixed(encoder: Mapping[str, Stored], grid: tuple[int, int], atol: float = 0.0) -> bool:
    """Whether an encoder's positions are MAE's fixed ones of a grid, bit by bit unless `atol` is
    given."""
    stored = encoder.get("pos_embed")
    if stored is None or not stored.floating or stored.shape[2] % 4:
        return False
    rows = np.asarray(stored)[0, -math.prod(grid) :]
    sincos = positions.sincos(grid, stored.shape[2])
    return rows.shape == sincos.shape and np.allclose(rows, sincos, rtol=0, atol=atol)


def _described(sources: Sequence[_Source], config: ConfigDict, grid) -> Iterator[str]:
    """Lines for people: the files, the model, how each tensor is used, which are not and why.

    Weight and bias, and those of all blocks, share a line.
    """
    for content, chosen, one, fetched in sources:
        entry = f", entry {chosen.entry!r}" if chosen.entry else ""
        label = fetched.id if fetched else content.path
        yield f"{label}: {one.layout} names, {content.container}{entry}"
        yield from chosen.notes
    parts = {part: x for source in sources for part, x in source.sorted.parts.items()}
    ignored = {name: why for source in sources for name, why in source.sorted.ignored.items()}
    model, size = config.model, vit.size_of(config.model)
    how = "the fixed sine-cosine ones" if _is_fixed(parts[ENCODER], grid) else "learned, frozen"
    resized = positions.grid(model.image_size, model.patch_size) != grid
    smooth = ", antialiased" if positions.is_smooth(model.registers) else ""
    how += f", resized (bicubic{smooth}) from {grid[0]} x {grid[1]} patches" if resized else ""
    if model.rope_theta is not None:
        how = f"rotary, of base {model.rope_theta:g}"
    elif parts[ENCODER]["pos_embed"].shape[1] > math.prod(grid):
        how += "; those of class tokens are added to these"
    pool = model.pool
    if pool == "cls" and model.cls_tokens > 1:
        pool += f" (the mean of the {model.cls_tokens} class tokens)"
    known = "as stated there" if config.data else "unknown; config.data.mean and .std apply"
    used = [(part, name, x) for part, named in parts.items() for name, x in named.items()]
    total = len(ignored) + len({name for *_, x in used for name in x.names})
    yield f"""\
kind       {config.stages[0]}: {" + ".join(sorted(parts, key=ENCODER.__ne__))}
encoder    width {size.width}, depth {size.depth}, heads {size.heads}, patch {model.patch_size}, \
LayerNorm eps {model.ln_eps:g}, feature {pool}
tokens     class {model.cls_tokens}, registers {model.registers}, patches {math.prod(grid)}
images     {model.image_size[0]} x {model.image_size[1]} x {model.channels}
positions  {how}
mean, std  {known}
tensors    {total}, used as"""
    rows: dict[str, dict[str, None]] = {}
    for part, name, x in used:
        leaf = names.split(name)[2]
        leaf = leaf if all(theirs.endswith(leaf) for theirs in x.names) else ""
        theirs = " + ".join(theirs.removesuffix(leaf) for theirs in x.names)
        ours = f"{part} {name.removesuffix(leaf)}".replace("classifier classifier", "classifier")
        row = re.sub(r"\.\d+\b", ".*", f"  {theirs or 'zeros'} -> {ours}")
        rows.setdefault(row, {})[leaf.removeprefix(".")] = None
    for row, leaves in rows.items():
        yield f"{row} ({', '.join(leaves)})" if any(leaves) else row
    for name, reason in ignored.items():
        yield f"  {name}: ignored, it {reason}"
