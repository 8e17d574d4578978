"""From a run to files for timm, HuggingFace's transformers, and MAE's and MAE-CT's PyTorch code."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from maect_jax import checkpoint, files, sharding
from maect_jax import config as pages
from maect_jax.convert import card, head_names, layouts, names, tensors
from maect_jax.errors import UserError
from maect_jax.models import positions, vit
from maect_jax.stages import build

FORMATS = ("timm", "hf", "maect", "mae")
_STAGES = ("ct", "head", "mae", "finetune", "encoder", "probe")  # the first that a run has
_ENDINGS = {"timm": (".safetensors",), "maect": (".safetensors", ".pth", ".th"),
            "mae": (".safetensors", ".pth")}  # fmt: skip


class Model(NamedTuple):
    """A stage of a run, with NumPy arrays.

    Attributes:
      stage: its name.
      config: of the run.
      encoder: whole parameters, as they are evaluated or, if asked, as they were last trained.
      parts: all that the stage has saved of its state.
    """

    stage: str
    config: ConfigDict
    encoder: dict
    parts: dict

    @property
    def grid(self) -> tuple[int, int]:
        section = self.config.model
        return positions.grid(section.image_size, section.patch_size)

    @property
    def classifier(self) -> dict:
        """`kernel` `[D, C]` and `bias` `[C]`, if there is one."""
        return self.parts["params"].get("classifier", {})


def load(run: Path, stage: str | None = None, weights: str = "ema") -> Model:
    """Reads a stage of a run, by default the last; `weights` is "ema" or "trained".

    Raises:
      UserError: there is no such run or stage.
    """
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: there is no run (no config.json); name the folder of a run")
    config = pages.read(run / "config.json")
    there = checkpoint.trained_stages(run, _STAGES)
    if not there or stage not in (None, *there):
        has = f"it has {', '.join(there)}" if there else "it has no checkpoint yet"
        raise UserError(f"{run}: no stage {stage or 'to export'}; {has}")
    stage = stage or there[0]
    wanted = build.SAVED_PARTS[stage] + (("target",) if stage == "ct" else ())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    parts = checkpoint.read_parts(checkpoint.stage_folder(run, stage), wanted, mesh)
    if weights == "trained" and stage == "ct":
        params = vit.merge_blocks({**parts["frozen"]["encoder"], **parts["params"]["encoder"]})
    else:
        params = build.evaluated_encoder(stage, parts)
    return Model(stage, config, jax.device_get(params), jax.device_get(parts))


def export(run: Path, file: Path, format: str, stage: str | None, weights: str) -> list[Path]:
    """Writes a stage of a run in one of `FORMATS`, and a model card; returns what it wrote.

    Raises:
      UserError: there is no such run or stage, the format has no place for it, or it cannot be
        written there.
    """
    endings = _ENDINGS.get(format)
    if endings and file.suffix not in endings:
        raise UserError(f"{file}: a file of format {format} must end in {' or '.join(endings)}")
    model = load(run, stage, weights)
    written = _WRITERS[format](model, file)
    place = file / "README.md" if format == "hf" else file.with_suffix(".md")
    try:
        files.write_text(place, card.text(run, model, written[0], format, weights))
    except OSError as error:
        raise UserError(f"{place}: cannot write there: {error}") from error
    return [*written, place]


def _about(model: Model) -> dict[str, str]:
    """What the tensors do not tell, by HuggingFace's keys, for the header of a safetensors file."""
    section = model.config.model
    told = {
        "num_attention_heads": build.encoder_size(section).heads,
        "layer_norm_eps": section.ln_eps,
        "image_size": list(section.image_size),
    }
    if model.stage == "mae" and "decoder" in model.parts["params"]:
        told["decoder_num_attention_heads"] = model.config.mae.decoder.heads
    return {key: str(value) for key, value in told.items()}


def _encoder(model: Model) -> dict[str, np.ndarray]:
    return names.encoder_to_torch(model.encoder, model.config.model.patch_size, model.grid)


def _with_class_row(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With a position of zeros for the class token, which has none here."""
    position = tensors["pos_embed"]
    row = np.zeros_like(position[:, :1])
    return tensors | {"pos_embed": np.concatenate([row, position], axis=1)}


def _norm_of_pool(model: Model, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the final norm under the name that it has behind the pooling."""
    if model.config.model.pool != "fc_norm":
        return found
    return {f"fc_{n}" if n.startswith("norm.") else n: x for n, x in found.items()}


def _head(model: Model) -> dict[str, np.ndarray]:
    """The linear classifier under timm's and MAE's names, if there is one."""
    if not model.classifier:
        return {}
    weight, bias = model.classifier["kernel"].T, model.classifier["bias"]
    if model.stage != "probe":
        return {"head.weight": weight, "head.bias": bias}
    found = model.parts["batch_stats"]["classifier"]
    running = {f"head.0.running_{key}": found[key] for key in ("mean", "var")}
    return running | {"head.1.weight": weight, "head.1.bias": bias}


def _timm(model: Model, file: Path) -> list[Path]:
    found = _norm_of_pool(model, _with_class_row(_encoder(model)))
    # timm's models have no batch normalisation before the classifier.
    classifier = {} if model.stage == "probe" else _head(model)
    tensors.write(file, found | classifier, about=_about(model))
    return [file]


def _mae(model: Model, file: Path) -> list[Path]:
    found = _norm_of_pool(model, _with_class_row(_encoder(model))) | _head(model)
    decoder = model.parts["params"].get("decoder") if model.stage == "mae" else None
    if decoder:
        own = _with_class_row(names.decoder_to_torch(decoder, model.grid))
        found |= {layouts.mae_decoder_name(name): x for name, x in own.items()}
    tensors.write(file, found, "model", _about(model))
    return [file]


def _maect(model: Model, file: Path) -> list[Path]:
    if model.config.model.pool == "fc_norm":
        raise UserError("maect: the authors' code has no norm behind the pooling; use timm or mae")
    tensors.write(file, _encoder(model), "state_dict", _about(model))
    if model.stage == "head" or model.stage == "ct":
        size = model.config[model.stage].queue_size
        found, kind = head_names.head_to_torch(model.parts, size), "head"
    elif model.classifier:
        found, kind = layouts.probe(_head(model)), "probe"
    else:
        return [file]
    beside = file.with_name(f"{file.stem}_{kind}{file.suffix}")
    tensors.write(beside, found, "state_dict")
    return [file, beside]


def _hf(model: Model, folder: Path) -> list[Path]:
    section, size = model.config.model, build.encoder_size(model.config.model)
    if section.pool == "fc_norm":
        raise UserError("hf: HuggingFace's ViT has no norm behind the pooling; use timm or mae")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; name a new folder")
    classifies = model.stage == "finetune" and section.pool == "cls"
    prefix = "vit." if classifies else ""
    found = layouts.to_hf(_with_class_row(_encoder(model)), prefix)
    config = {
        "architectures": ["ViTForImageClassification" if classifies else "ViTModel"],
        "model_type": "vit",
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": section.ln_eps,
        "image_size": _square(section.image_size),
        "patch_size": section.patch_size,
        "num_channels": section.channels,
        "qkv_bias": True,
    }
    if classifies:
        found |= {
            "classifier.weight": model.classifier["kernel"].T,
            "classifier.bias": model.classifier["bias"],
        }
        classes = {str(i): f"class {i}" for i in range(len(model.classifier["bias"]))}
        config |= {"id2label": classes, "label2id": {c: int(i) for i, c in classes.items()}}
    else:
        # ViTModel has a pooler: one that hands on the class token as it is.
        found |= {
            "pooler.dense.weight": np.eye(size.width, dtype=np.float32),
            "pooler.dense.bias": np.zeros(size.width, np.float32),
        }
        config |= {"pooler_act": "linear", "pooler_output_size": size.width}
    weights = folder / "model.safetensors"
    tensors.write(weights, found)
    files.write_json(folder / "config.json", config)
    beside = [folder / "config.json"]
    data = model.config.get("data", {})
    if "mean" in data:
        height, width = section.image_size
        files.write_json(
            folder / "preprocessor_config.json",
            {
                "image_processor_type": "ViTImageProcessor",
                "do_resize": True,
                "size": {"height": height, "width": width},
                "resample": 3,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": list(data["mean"]),
                "image_std": list(data["std"]),
            },
        )
        beside.append(folder / "preprocessor_config.json")
    return [weights, *beside]


def _square(image_size: tuple[int, int]) -> int | list[int]:
    height, width = image_size
    return height if height == width else [height, width]


_WRITERS: Mapping = {"timm": _timm, "hf": _hf, "maect": _maect, "mae": _mae}
