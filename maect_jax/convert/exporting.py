"""Writes a model for timm, HuggingFace's transformers, and MAE's and MAE-CT's PyTorch code."""

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from ml_collections import ConfigDict

from maect_jax import files
from maect_jax.convert import names, tensors
from maect_jax.convert.importing import LN_EPS, ROTARY_BASE, ROTARY_EPS
from maect_jax.data import sources
from maect_jax.errors import UserError
from maect_jax.models import positions, vit
from maect_jax.stages import SAVED

_ENDINGS = {
    "timm": (".safetensors",),
    "hf": (),  # a folder
    "maect": (".safetensors", ".pth", ".th"),
    "mae": (".safetensors", ".pth"),
}
FORMATS = tuple(_ENDINGS)


class _HFKind(NamedTuple):
    """A model of HuggingFace's transformers."""

    name: str  # of its classes
    names: str = ""  # of its tensors, the kind of `names.to_files`
    classifies: str = ""  # the feature that its classifier reads; "": none that a run has
    pooled: str = ""  # what its `pooler_output` is; "": it has none


_HF_KINDS = {
    "vit": _HFKind("ViT", classifies="cls", pooled="the class token"),
    "ijepa": _HFKind("IJepa", classifies="mean"),
    "pixio": _HFKind("Pixio", "pixio", pooled="the mean of the class tokens"),
    "dinov2_with_registers": _HFKind("Dinov2WithRegisters", "dinov2", pooled="the class token"),
    "dinov3_vit": _HFKind("DINOv3ViT", "dinov3", pooled="the class token"),
}
_TIMM_VARIANTS = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A trained stage, with NumPy arrays."""

    stage: str  # its name, a key of `SAVED`
    config: ConfigDict  # of its run
    encoder: dict  # whole parameters, with one stack of blocks
    parts: dict  # the fields of the state that the stage has saved
    averaged: bool = False  # whether `encoder` is a moving average of what was trained
    run: str = ""  # the name of its run, and below what the model card says about it
    # Where the weights that training started from are from, the last first.
    lineage: Sequence[Mapping] = ()
    # Figures of the evaluation, in percent.
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)
    held_out: bool = False  # whether they are of images that training has not seen
    class_names: Sequence[str] = ()  # those of its classifier; empty where they have none

    @property
    def classes(self) -> int:
        """How many classes a classifier right behind the feature has; 0 for none."""
        normalised = "classifier" in self.parts.get("batch_stats", {})
        return 0 if normalised else len(self.parts["params"].get("classifier", {}).get("bias", ()))

    @property
    def refined(self) -> bool:
        """Whether it is of MIM-Refiner, with heads on several blocks."""
        return "heads" in SAVED[self.stage].hands_on

    @property
    def hf_classifier(self) -> bool:
        """Whether HuggingFace's model has the classifier, which there reads a certain feature."""
        kind = _HF_KINDS.get(self.hf_kind, _HFKind(""))
        return bool(self.classes) and self.config.model.pool == kind.classifies

    @property
    def hf_kind(self) -> str:
        """HuggingFace's type of model with such tokens, "" for none. Those with several take square
        images only."""
        model = self.config.model
        if self.rotary:
            return "dinov3_vit" if model.cls_tokens == 1 and model.registers else ""
        height, width = model.image_size
        if model.cls_tokens < 2 and not model.registers:
            return "vit" if model.cls_tokens else "ijepa"
        if height == width and model.cls_tokens and not model.registers:
            return "pixio"
        return "dinov2_with_registers" if height == width and model.cls_tokens == 1 else ""

    @property
    def distilled(self) -> bool:
        """Whether it is timm's DeiT with a distillation token, the second class token."""
        model = self.config.model
        two = (model.cls_tokens, model.registers) == (2, 0)
        return two and model.pool == "cls" and not self.rotary

    @property
    def global_pool(self) -> str:
        """What timm calls its feature."""
        return "token" if self.config.model.pool == "cls" else "avg"

    @property
    def rotary(self) -> bool:
        """Whether its positions are rotary (DINOv3)."""
        return self.config.model.rope_theta is not None

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return positions.grid(self.config.model.image_size, self.config.model.patch_size)


def export(model: Model, file: Path, format: str) -> list[str]:
    """Writes a model in one of `FORMATS`, and a model card.

    Returns:
      The paths that were written, and what was left out.

    Raises:
      UserError: the format has no place for the model, a file exists already, or it cannot be
        written.
    """
    check_file(file, format)
    _check_has_place(model, format)
    parent, card_name = file.absolute().parent, f"{file.name}.md"
    complete = {"timm": bool(model.classes), "hf": model.hf_classifier}.get(format, True)
    left_out = [f"The run's classifier is left out: {format} has no place for it"]
    if complete or "classifier" not in model.parts["params"]:
        left_out = []
    if format == "maect" and model.refined:
        left_out = ["The run's heads are left out: the files of MIM-Refiner's authors have none"]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        # Everything is written aside, and then moved into place.
        with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as scratch:
            draft = Path(scratch) / file.name
            _WRITERS[format](model, draft)
            text = _card(model, file, format, left_out)
            files.write_text(
                draft / "README.md" if format == "hf" else draft.with_name(card_name), text
            )
            written = {one: file.parent / one.name for one in sorted(draft.parent.iterdir())}
            _check_new(*written.values())
            for one, path in written.items():
                one.replace(path)
    except OSError as error:
        raise UserError(f"{file}: cannot write there: {error}") from error
    return [*map(str, written.values()), *left_out]


def _check_has_place(model: Model, format: str) -> None:
    """Raises `UserError` where a format has no model of this kind."""
    section = model.config.model
    tokens = f"{section.cls_tokens} class tokens and {section.registers} registers"
    if section.post_norm and format != "maect":
        raise UserError(f"{format}: has no post-norm blocks; use maect")
    if model.rotary and format in ("maect", "mae"):
        raise UserError(f"{format}: has no rotary positions; use timm or hf")
    if section.pool == "fc_norm" and format in ("hf", "maect"):
        raise UserError(f"{format}: has no norm behind the pooling (fc_norm); use timm or mae")
    if format == "maect" and (section.cls_tokens, section.registers) != (1, 0):
        raise UserError(f"maect: the authors' code has one class token, not {tokens}; use mae")
    if format == "timm" and section.cls_tokens > 1 and not model.distilled:
        raise UserError(f"timm: has no model with {tokens}, feature {section.pool}; use mae")
    if format == "hf" and not model.hf_kind:
        raise UserError(f"hf: has no model with {tokens}, images {section.image_size}; use mae")


def check_file(file: Path, format: str) -> None:
    """Raises `UserError` if a file cannot be of one of `FORMATS` by its name, or exists already."""
    endings = _ENDINGS[format]
    if endings and file.suffix not in endings:
        raise UserError(f"{file}: a file of format {format} must end in {' or '.join(endings)}")
    _check_new(file, *([file.with_name(f"{file.name}.md")] if endings else []))


def _check_new(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists already; name another file, or remove it")


def _metadata(model: Model) -> dict[str, str]:
    """For the header of a safetensors file: what tensors do not say, by HuggingFace's keys."""
    section = model.config.model
    values = {
        "num_attention_heads": vit.size_of(section).heads,
        "layer_norm_eps": section.ln_eps,
        "image_size": list(section.image_size),
        "global_pool": model.global_pool,
    }
    if "mean" in (data := model.config.get("data", {})):
        values |= {f"image_{key}": list(data[key]) for key in ("mean", "std")}
    if model.rotary:
        values["rope_theta"] = section.rope_theta
    if "decoder" in model.parts["params"]:
        values["decoder_num_attention_heads"] = model.config[model.stage].decoder.heads
    return {key: str(value) for key, value in values.items()}


def _encoder(model: Model, extra_rows: int) -> dict[str, np.ndarray]:
    """The encoder as all but the authors have it: with positions of tokens that are no patches,
    zeros."""
    grid = None if model.rotary else model.grid
    encoder = names.encoder_to_torch(model.encoder, model.config.model.patch_size, grid)
    if grid:
        encoder = _with_rows(encoder, extra_rows)
    if model.config.model.pool != "fc_norm":
        return encoder
    return {f"fc_{name}" if name.startswith("norm.") else name: x for name, x in encoder.items()}


def _with_rows(tensors: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return tensors | {"pos_embed": np.pad(tensors["pos_embed"], ((0, 0), (count, 0), (0, 0)))}


def _layer_scale(model: Model) -> dict[str, np.ndarray]:
    """Factors of 1, where a model must have some: those that it had are in its weights."""
    size = vit.size_of(model.config.model)
    ones = np.ones(size.width, np.float32)
    return {f"blocks.{i}.ls{j}": ones for i in range(size.depth) for j in (1, 2)}


def _classifier(model: Model, linear: str, norm: str = "") -> dict[str, np.ndarray]:
    """`weight [C, D]` and `bias [C]` of a linear classifier, if there is one, after `running_mean
    [D]` and `running_var [D]` if batch normalisation comes before it, in modules of these names."""
    layer = model.parts["params"].get("classifier")
    stats = model.parts.get("batch_stats", {}).get("classifier", {})
    running = {f"{norm}.running_{key}": stats[key] for key in ("mean", "var") if stats}
    weights = {"weight": layer["kernel"].T, "bias": layer["bias"]} if layer else {}
    return running | {f"{linear}.{name}": x for name, x in weights.items()}


def _timm(model: Model, file: Path) -> None:
    section = model.config.model
    weights = _encoder(model, section.cls_tokens + section.registers)
    if section.registers:
        weights["reg_token"] = weights.pop("register_tokens")
    if model.rotary:
        weights |= {n.replace("ls", "gamma_"): x for n, x in _layer_scale(model).items()}
    heads = ["head"]
    if model.distilled:  # the mean of both heads' scores is the score of the mean of their tokens
        weights["cls_token"], weights["dist_token"] = np.split(weights["cls_token"], 2, axis=1)
        heads.append("head_dist")
    for head in heads if model.classes else ():  # after batch normalisation timm has none
        weights |= _classifier(model, head)
    tensors.write(file, weights, metadata=_metadata(model))


def _mae(model: Model, file: Path) -> None:
    linear = "head" if model.classes else "head.1"
    rows = model.config.model.cls_tokens
    weights = _encoder(model, rows) | _classifier(model, linear, "head.0")
    if decoder := model.parts["params"].get("decoder"):
        decoder = _with_rows(names.decoder_to_torch(decoder, model.grid), rows)
        weights |= names.to_files(decoder, part="decoder", column="pytorch")
    tensors.write(file, weights, wrapper="model", metadata=_metadata(model))


def _maect(model: Model, file: Path) -> None:
    section = model.config.model
    encoder = names.encoder_to_torch(model.encoder, section.patch_size, model.grid)
    if section.post_norm or model.refined:  # as in their MIM-Refiner
        encoder["pos_embed"] = encoder["pos_embed"].reshape(1, *model.grid, -1)
        encoder = names.to_files(encoder, part="encoder", column="pytorch", kind="refiner")
    tensors.write(file, encoder, wrapper="state_dict", metadata=_metadata(model))
    kind, weights = "probe", _classifier(model, "layer.2", "layer.1")
    if "queue" in model.parts and not model.refined:
        size = model.config[model.stage].queue_size
        kind, weights = "head", names.head_to_torch(model.parts, size)
    if weights:
        path = file.with_name(f"{file.stem}_{kind}{file.suffix}")
        tensors.write(path, weights, wrapper="state_dict")


def _hf(model: Model, folder: Path) -> None:
    section, size = model.config.model, vit.size_of(model.config.model)
    kind, weights = _HF_KINDS[model.hf_kind], _encoder(model, section.cls_tokens)
    height, width = section.image_size
    purpose = "ForImageClassification" if model.hf_classifier else "Model"
    config = {
        "architectures": [kind.name + purpose],
        "model_type": model.hf_kind,
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": section.ln_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": section.patch_size,
        "num_channels": section.channels,
        "qkv_bias": True,
        "global_pool": model.global_pool,  # for what is read here again
    }
    if model.hf_kind == "pixio":
        config["n_cls_tokens"] = section.cls_tokens
    if section.registers:
        config["num_register_tokens"] = section.registers
        if model.rotary:
            config |= {"rope_theta": section.rope_theta, "key_bias": True}
        weights |= _layer_scale(model)
    weights = names.to_files(weights, part="encoder", column="hf", kind=kind.names)
    if section.registers:
        shape = (1, 1, size.width) if model.rotary else (1, size.width)
        weights["embeddings.mask_token"] = np.zeros(shape, np.float32)
    if model.hf_classifier:
        weights = {f"{model.hf_kind}.{name}": x for name, x in weights.items()}
        weights |= _classifier(model, "classifier")
        own = model.class_names or [f"class {i}" for i in range(model.classes)]
        classes = {str(i): name for i, name in enumerate(own)}
        config |= {"id2label": classes, "label2id": {c: int(i) for i, c in classes.items()}}
    elif model.hf_kind == "vit":
        # ViTModel has a pooler: one that hands on the class token as it is.
        weights["pooler.dense.weight"] = np.eye(size.width, dtype=np.float32)
        weights["pooler.dense.bias"] = np.zeros(size.width, np.float32)
        config |= {"pooler_act": "linear", "pooler_output_size": size.width}
    tensors.write(folder / "model.safetensors", weights)
    files.write_json(folder / "config.json", config)
    if "mean" in (data := model.config.get("data", {})):
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(data["mean"]),
            "image_std": list(data["std"]),
        }
        files.write_json(folder / "preprocessor_config.json", processor)


_WRITERS = {"timm": _timm, "hf": _hf, "maect": _maect, "mae": _mae}


def _card(model: Model, file: Path, format: str, left_out: Sequence[str]) -> str:
    """The model card, as Markdown."""
    text = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    template = jinja2.Template(
        text, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    kind, section = SAVED[model.stage], model.config.get(model.stage)
    size = vit.size_of(model.config.model)
    settings = {"model": model.config.model.to_dict() | size._asdict()}
    settings |= {model.stage: section.to_dict()} if section else {}
    return template.render(
        model=model,
        config=model.config,
        data=(data := model.config.get("data", {})),
        images=sources.title(data) if "source" in data else "",
        pooled=_HF_KINDS[model.hf_kind].pooled if model.hf_kind else "",
        title=kind.title.replace("{} ", ""),
        size=size,
        file=repr(file.name),
        safetensors=file.suffix == ".safetensors",
        format=format,
        timm_call=_timm_call(model, file),
        left_out=left_out,
        average_measured="ema" in kind.saved and not model.averaged,
        settings=json.dumps(settings, indent=2),
    )


def _timm_call(model: Model, file: Path) -> str:
    """The call that builds the model with its weights in timm."""
    section, size = model.config.model, vit.size_of(model.config.model)
    variant = section.variant
    if model.distilled and variant not in ("Ti", "S"):
        variant = "B"  # the largest DeiT
    if model.rotary and variant not in ("S", "B"):
        variant = "L"  # the largest DINOv3 whose MLPs are not gated
    known, patch = vit.VARIANTS[variant], 14 if variant == "H" else 16
    kind = "deit_{}_distilled" if model.distilled else "vit_{}"
    name = f"{kind.format(_TIMM_VARIANTS[variant])}_patch{patch}_224"
    own: list[tuple[str, object, object]] = [
        ("reg_tokens", section.registers, 0),
        ("fc_norm", section.pool != "mean", True),
    ]
    if model.rotary:
        name = f"vit_{_TIMM_VARIANTS[variant]}_patch{patch}_dinov3"
        own = [
            ("num_reg_tokens", section.registers, 4),
            ("use_fc_norm", section.pool == "fc_norm", False),
            ("rope_temperature", section.rope_theta, ROTARY_BASE),
            ("attn_type", "rope", "eva"),  # the other has no bias of the keys
            ("qkv_bias", True, False),
        ]
    arguments: dict[str, object] = {
        "num_classes": model.classes,
        "global_pool": model.global_pool,
    }
    for key, value, default in (
        ("class_token", section.cls_tokens > 0, True),
        *own,
        ("img_size", tuple(section.image_size), (224, 224)),
        ("patch_size", section.patch_size, patch),
        ("in_chans", section.channels, 3),
        ("embed_dim", size.width, known.width),
        ("depth", size.depth, known.depth),
        ("num_heads", size.heads, known.heads),
    ):
        if value != default:
            arguments[key] = value
    texts = [repr(name), *(f"{key}={value!r}" for key, value in arguments.items())]
    if section.ln_eps != (ROTARY_EPS if model.rotary else LN_EPS):
        texts.append(f"norm_layer=partial(torch.nn.LayerNorm, eps={section.ln_eps!r})")
    return f"timm.create_model({', '.join(texts)}, checkpoint_path={file.name!r})"
