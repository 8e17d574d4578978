"""The model card beside exported weights: what they are, how to load them, where they are from."""

import json
from pathlib import Path

from maect_jax.convert.recognise import LN_EPS
from maect_jax.evals import runner, table
from maect_jax.models import vit
from maect_jax.run import lineage

_TIMM = {
    "Ti": ("vit_tiny_patch16_224", 16),
    "S": ("vit_small_patch16_224", 16),
    "B": ("vit_base_patch16_224", 16),
    "L": ("vit_large_patch16_224", 16),
    "H": ("vit_huge_patch14_224", 14),
}
_HF_HEADER = """---
library_name: transformers
pipeline_tag: image-feature-extraction
---

"""
_FEATURES = {
    "cls": "the class token after the final norm",
    "mean": "the mean of the patch tokens after the final norm",
    "fc_norm": "the mean of the patch tokens, then the final norm",
}
_STAGES = {
    "mae": "masked pre-training (MAE)",
    "head": "an NNCLR head on a frozen encoder",
    "ct": "contrastive tuning (MAE-CT)",
    "finetune": "an encoder and a classifier, trained with labels",
    "encoder": "imported",
    "probe": "imported, with a linear probe",
}
_LICENCE = (
    "The licence of the weights that training started from goes with these. Meta's public MAE "
    "checkpoints are under CC BY-NC 4.0 (no commercial use), and so is what started from them."
)
_SCRATCH = (
    "Trained from random weights; nobody else's licence goes with them but that of the images, "
    "where it asks for it."
)


def timm_call(model, file: str) -> str:
    """The call by which timm builds an exported model (`exporting.Model`) with its weights."""
    section, size = model.config.model, vit.size_of(model.config.model)
    name, patch = _TIMM[section.variant]
    height, width = section.image_size
    known = vit.VARIANTS[section.variant]
    classes = len(model.classifier["bias"]) if model.stage == "finetune" else 0
    own = {"num_classes": classes, "global_pool": "token" if section.pool == "cls" else "avg"}
    if section.pool == "mean":
        own |= {"fc_norm": False}
    if (height, width) != (224, 224):
        own["img_size"] = (height, width)
    own |= {"patch_size": section.patch_size} if section.patch_size != patch else {}
    own |= {"in_chans": section.channels} if section.channels != 3 else {}
    names = {"width": "embed_dim", "depth": "depth", "heads": "num_heads"}
    own |= {
        names[key]: value for key, value in size._asdict().items() if value != getattr(known, key)
    }
    arguments = [f"{key}={value!r}" for key, value in own.items()]
    if section.ln_eps != LN_EPS:
        arguments.append(f"norm_layer=partial(torch.nn.LayerNorm, eps={section.ln_eps!r})")
    return f"timm.create_model({', '.join([repr(name), *arguments, f'checkpoint_path={file!r}'])})"


def _use(model, file: Path, kind: str) -> str:
    if kind == "timm":
        call = timm_call(model, file.name)
        more = "from functools import partial\n\nimport torch\n" if "partial(" in call else ""
        features = "features = model.forward_head(model.forward_features(images), pre_logits=True)"
        return f"{more}import timm\n\nmodel = {call}.eval()\n{features}"
    if kind == "hf" and model.classifies:
        return (
            "from transformers import AutoModelForImageClassification\n\n"
            f"model = AutoModelForImageClassification.from_pretrained({file.name!r})\n"
            "logits = model(pixel_values=images).logits"
        )
    if kind == "hf":
        return (
            "from transformers import AutoModel\n\n"
            f"model = AutoModel.from_pretrained({file.name!r})\n"
            "found = model(pixel_values=images)\n"
            "tokens = found.last_hidden_state  # found.pooler_output is the class token"
        )
    read = f"from safetensors.torch import load_file\n\nstate_dict = load_file({file.name!r})"
    if file.suffix != ".safetensors":
        wrapper = {"mae": "model", "maect": "state_dict"}[kind]
        call = f"torch.load({file.name!r}, weights_only=True)"
        read = f"import torch\n\nstate_dict = {call}[{wrapper!r}]"
    ours = f"from maect_jax import load_encoder\n\nencoder = load_encoder({file.name!r})"
    return f"{read}\n\n# or in JAX:\n{ours}"


def _lineage(run: Path, model) -> str:
    found = lineage.read_lineage(run)
    if not found:
        return f"{run.name} does not tell where its weights are from. {_LICENCE}"
    if found == [lineage.SCRATCH]:
        return _SCRATCH
    texts = {
        "run": lambda step: f"stage {step['stage']} of the run `{step['run']}`",
        "file": lambda step: (
            f"the file `{step['file']}` ({step['layout']} names; SHA-256 `{step['sha256']}`)"
        ),
        "start": lambda step: step["start"],
    }
    lines = [f"- {texts[next(iter(step))](step)}" for step in found]
    return "\n".join([*lines, "", _SCRATCH if found[-1] == lineage.SCRATCH else _LICENCE])


def _sentence(text: str) -> str:
    return f"\n{text[0].upper()}{text[1:]}." if text else ""


def _data(model) -> str:
    data = model.config.get("data", {})
    if "source" not in data:
        return "not known: the weights were imported"
    where = data.name if data.source == "tfds" else data.path or data.source
    return f"`{where}` ({data.source}), split `{data.train_split}`"


def _measured(run: Path, model, weights: str) -> str:
    results = runner.read_results(run)
    name = model.stage
    found = table.percentages({name: results[name]})[name] if name in results else {}
    if not found:
        return "Nothing was measured in this run."
    held_out = "k-NN" in found or results[name].get("cluster", {}).get("split") == "val"
    where = "the held-out images of that set" if held_out else "these images themselves"
    whose = " with the average of the weights" if name == "ct" and weights != "ema" else ""
    rows = [f"| {key} | {value:.1f} |" for key, value in found.items()]
    return "\n".join([f"On {where}{whose}, in percent:", "", "| | |", "|---|---|", *rows])


def text(run: Path, model, file: Path, kind: str, weights: str, left: str) -> str:
    """The card, as Markdown.

    Args:
      run: the run that was exported.
      model: an `exporting.Model` of it.
      file: the weights that were written.
      kind: the format, one of `exporting.FORMATS`.
      weights: "ema" or "trained".
      left: what the format had no place for, if anything.
    """
    data, stage, section = model.config.get("data", {}), model.stage, model.config.model
    size, (height, width) = vit.size_of(section), section.image_size
    shape = (
        f"width {size.width}, depth {size.depth}, {size.heads} heads, patch {section.patch_size}"
    )
    average = "; the moving average of its weights" if stage == "ct" and weights == "ema" else ""
    pixels = (
        f"`(pixels / 255 - mean) / std` with mean {list(data['mean'])} and std {list(data['std'])}"
        if "mean" in data
        else "normalised by the mean and deviation that the imported weights were trained with"
    )
    own = model.config.get(stage)
    settings = {"model": section.to_dict() | size._asdict()} | (
        {stage: own.to_dict()} if own else {}
    )
    header = _HF_HEADER if kind == "hf" else ""
    return f"""{header}# {model.config.name}: {_STAGES[stage]}

A Vision Transformer, exported by maect_jax: {shape}{average}.

## Use

```python
{_use(model, file, kind)}
```

Images: {height} x {width}, channels: {section.channels}, {pixels}.
Feature: {_FEATURES[section.pool]}.{_sentence(left)}

## Training

Stage: {_STAGES[stage]}.
Images: {_data(model)}.

```json
{json.dumps(settings, indent=2)}
```

## Measured

{_measured(run, model, weights)}

## Where the weights are from

{_lineage(run, model)}
"""
