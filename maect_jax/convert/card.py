"""The model card beside exported weights: how to load them, what they are, where they are from."""

import json
from pathlib import Path

import jinja2

from maect_jax.convert.importing import LN_EPS
from maect_jax.models import vit
from maect_jax.stages import SAVED

_TIMM = {
    "Ti": ("vit_tiny_patch16_224", 16),
    "S": ("vit_small_patch16_224", 16),
    "B": ("vit_base_patch16_224", 16),
    "L": ("vit_large_patch16_224", 16),
    "H": ("vit_huge_patch14_224", 14),
}
_TIMM_SIZES = {"width": "embed_dim", "depth": "depth", "heads": "num_heads"}


def text(model, file: Path, format: str, left_out: str) -> str:
    """The card of an `exporting.Model`, as Markdown.

    Args:
      model: what was written.
      file: where it was written.
      format: one of `exporting.FORMATS`.
      left_out: what the format has no place for, a sentence, or nothing.
    """
    kind, section = SAVED[model.stage], model.config.get(model.stage)
    size = vit.size_of(model.config.model)
    settings = {"model": model.config.model.to_dict() | size._asdict()}
    if section:
        settings[model.stage] = section.to_dict()
    return _template().render(
        model=model,
        config=model.config,
        data=model.config.get("data", {}),
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


def _template() -> jinja2.Template:
    files = jinja2.PackageLoader("maect_jax.convert", package_path="")
    options = dict(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return jinja2.Environment(loader=files, **options).get_template("card.md")


def _timm_call(model, file: Path) -> str:
    """The call that builds the model with its weights in timm."""
    section, size = model.config.model, vit.size_of(model.config.model)
    known, (name, patch) = vit.VARIANTS[section.variant], _TIMM[section.variant]
    arguments = {
        "num_classes": model.classes,
        "global_pool": "token" if section.pool == "cls" else "avg",
    }
    if section.pool == "mean":
        arguments["fc_norm"] = False
    if section.image_size != (224, 224):
        arguments["img_size"] = tuple(section.image_size)
    if section.patch_size != patch:
        arguments["patch_size"] = section.patch_size
    if section.channels != 3:
        arguments["in_chans"] = section.channels
    for key, theirs in _TIMM_SIZES.items():
        if getattr(size, key) != getattr(known, key):
            arguments[theirs] = getattr(size, key)
    texts = [repr(name), *(f"{key}={value!r}" for key, value in arguments.items())]
    if section.ln_eps != LN_EPS:
        texts.append(f"norm_layer=partial(torch.nn.LayerNorm, eps={section.ln_eps!r})")
    return f"timm.create_model({', '.join(texts)}, checkpoint_path={file.name!r})"
