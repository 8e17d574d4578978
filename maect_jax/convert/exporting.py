"""From a run to files for timm, HuggingFace's transformers, and MAE's and MAE-CT's PyTorch code."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from maect_jax import config as configs
from maect_jax import files, sharding
from maect_jax.convert import card, head_names, layouts, names, tensors
from maect_jax.errors import UserError
from maect_jax.models import positions, vit
from maect_jax.run import checkpoints, lineage
from maect_jax.stages import SAVED

FORMATS = ("timm", "hf", "maect", "mae")
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

    @property
    def classifies(self) -> bool:
        """Whether HuggingFace's classifier, which is one of the class token, can be made of it."""
        return self.stage == "finetune" and self.config.model.pool == "cls"


def load(
    run: Path, stage: str | None = None, weights: str = "ema", step: int | None = None
) -> Model:
    """Reads a stage of a run, by default the last, at its end unless a step is named; `weights` is
    "ema" or "trained".

    Raises:
      UserError: there is no such run, stage or step.
    """
    if not (run / "config.json").is_file():
        file = "; a file must be imported first" if run.is_file() else ""
        raise UserError(f"{run}: there is no run (no config.json); name the folder of a run{file}")
    config = configs.read(run / "config.json")
    there = checkpoints.trained_stages(run, tuple(SAVED))
    if not there or stage not in (None, *there):
        has = f"it has {', '.join(there)}" if there else "it has no checkpoint yet"
        raise UserError(f"{run}: no stage {stage or 'to export'}; {has}")
    stage = stage or there[-1]
    lineage.check_saved(run, stage, step, f"{run}: ")
    wanted = SAVED[stage].saved + (("target",) if stage == "ct" else ())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    parts = checkpoints.read_parts(checkpoints.stage_folder(run, stage), wanted, mesh, step)
    if weights == "trained" and stage == "ct":
        params = vit.merge_blocks({**parts["frozen"]["encoder"], **parts["params"]["encoder"]})
    else:
        params = SAVED[stage].encoder_params(parts)
    return Model(stage, config, jax.device_get(params), jax.device_get(parts))


def export(run: Path, file: Path, format: str, stage: str | None, weights: str) -> list[str]:
    """Writes a stage of a run, or a checkpoint, in one of `FORMATS`, and a model card.

    Returns:
      What was written, and what was left out, a line each.

    Raises:
      UserError: there is no such run or stage, the format has no place for it, the file is there
        already, or it cannot be written there.
    """
    endings = _ENDINGS.get(format)
    if endings and file.suffix not in endings:
        raise UserError(f"{file}: a file of format {format} must end in {' or '.join(endings)}")
    run, at, step = checkpoints.run_of(run)
    if stage not in (None, at or stage):
        raise UserError(f"--stage={stage}: the checkpoint is one of stage {at}")
    model = load(run, stage or at, weights, step)
    if model.config.model.pool == "fc_norm" and format in ("hf", "maect"):
        raise UserError(f"{format}: has no norm behind the pooling (fc_norm); use timm or mae")
    parent, card_name = file.absolute().parent, f"{file.name}.md"
    _new(file, *([] if format == "hf" else [parent / card_name]))
    try:
        parent.mkdir(parents=True, exist_ok=True)
        # All is written aside, and then put in its place.
        with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as scratch:
            draft = Path(scratch) / file.name
            whole = _WRITERS[format](model, draft)
            left = (
                "" if whole else f"the run's classifier is left out: {format} has no place for it"
            )
            place = draft / "README.md" if format == "hf" else draft.with_name(card_name)
            files.write_text(place, card.text(run, model, file, format, weights, left))
            made = {one: file.parent / one.name for one in sorted(draft.parent.iterdir())}
            _new(*made.values())
            for one, there in made.items():
                one.replace(there)
    except OSError as error:
        raise UserError(f"{file}: cannot write there: {error}") from error
    return [*map(str, made.values()), *filter(None, [left])]


def _new(*places: Path) -> None:
    for place in places:
        if place.exists():
            raise UserError(f"{place}: is there already; name another file, or remove it")


def _about(model: Model) -> dict[str, str]:
    """What the tensors do not tell, by HuggingFace's keys, for the header of a safetensors file."""
    section = model.config.model
    told = {
        "num_attention_heads": vit.size_of(section).heads,
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


def _timm(model: Model, file: Path) -> bool:
    found = _norm_of_pool(model, _with_class_row(_encoder(model)))
    # timm's models have no batch normalisation before the classifier.
    classifier = {} if model.stage == "probe" else _head(model)
    tensors.write(file, found | classifier, about=_about(model))
    return bool(classifier) or not model.classifier


def _mae(model: Model, file: Path) -> bool:
    found = _norm_of_pool(model, _with_class_row(_encoder(model))) | _head(model)
    decoder = model.parts["params"].get("decoder") if model.stage == "mae" else None
    if decoder:
        own = _with_class_row(names.decoder_to_torch(decoder, model.grid))
        found |= {layouts.mae_decoder_name(name): x for name, x in own.items()}
    tensors.write(file, found, "model", _about(model))
    return True


def _maect(model: Model, file: Path) -> bool:
    tensors.write(file, _encoder(model), "state_dict", _about(model))
    beside = {}
    if model.stage in ("head", "ct"):
        size = model.config[model.stage].queue_size
        beside["head"] = head_names.head_to_torch(model.parts, size)
    elif model.classifier:
        beside["probe"] = layouts.probe(_head(model))
    for kind, found in beside.items():
        tensors.write(file.with_name(f"{file.stem}_{kind}{file.suffix}"), found, "state_dict")
    return True


def _hf(model: Model, folder: Path) -> bool:
    section, size = model.config.model, vit.size_of(model.config.model)
    found = layouts.to_hf(_with_class_row(_encoder(model)), "vit." if model.classifies else "")
    height, width = section.image_size
    config = {
        "architectures": ["ViTForImageClassification" if model.classifies else "ViTModel"],
        "model_type": "vit",
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
    }
    if model.classifies:
        kernel, bias = model.classifier["kernel"], model.classifier["bias"]
        found |= {"classifier.weight": kernel.T, "classifier.bias": bias}
        classes = {str(i): f"class {i}" for i in range(len(bias))}
        config |= {"id2label": classes, "label2id": {c: int(i) for i, c in classes.items()}}
    else:
        # ViTModel has a pooler: one that hands on the class token as it is.
        found |= {
            "pooler.dense.weight": np.eye(size.width, dtype=np.float32),
            "pooler.dense.bias": np.zeros(size.width, np.float32),
        }
        config |= {"pooler_act": "linear", "pooler_output_size": size.width}
    tensors.write(folder / "model.safetensors", found)
    files.write_json(folder / "config.json", config)
    data = model.config.get("data", {})
    if "mean" in data:
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
    return model.classifies or not model.classifier


# Each writes a model to a place, and tells whether it has a place for its classifier.
_WRITERS: Mapping = {"timm": _timm, "hf": _hf, "maect": _maect, "mae": _mae}
