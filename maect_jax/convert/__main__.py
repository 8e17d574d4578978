"""In and out of the PyTorch world.

maect import FILE [FILE] OUT_RUN
maect export RUN FILE --format={timm,hf,maect,mae}
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import jax

from maect_jax import errors, files, sharding
from maect_jax.convert import exporting, hub, importing
from maect_jax.errors import UserError
from maect_jax.evals import runner, table
from maect_jax.models import vit
from maect_jax.run import checkpoints, lineage
from maect_jax.stages import SAVED

_IMPORT = """
Makes a run of files from elsewhere, for --config.init_from=OUT_RUN. FILE is MAE's .pth (also
Pixio's, DINOv2's, DINOv3's, I-JEPA's, MIM-Refiner's), an encoder of MAE-CT's authors (.th), a
HuggingFace folder (ViTMAE*, ViT*, DINOv2, DINOv3, Pixio, ...), or a timm ViT (.safetensors, .pth);
a second one may be what MAE-CT's authors trained on their encoder, a contrastive head or a linear
probe. Prints what it recognised and how every tensor is used.
"""
_EXPORT = """
Writes the encoder of a run for others, with a model card beside it. timm: for
timm.create_model(checkpoint_path=FILE). hf: FILE is a folder for transformers' from_pretrained.
mae: MAE's names, with the decoder. maect: the names of MAE-CT's authors, the head (or the probe) in
a second file; of refine those of MIM-Refiner's, without heads. timm is safetensors, mae and maect
what the ending of FILE says (.safetensors; .pth needs PyTorch).
"""


def _size(text: str) -> tuple[int, int]:
    sides = tuple(int(side) for side in text.split(","))
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError
    return sides


_size.__name__ = "HEIGHT,WIDTH (such as 224,224)"  # the name in argparse's errors


def _file(text: str) -> Path | str:
    return text if hub.is_id(text) else files.user_path(text)


def _parser() -> argparse.ArgumentParser:
    number, whole = errors.positive(float), errors.positive(int)
    parser = errors.OneLineParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", description=_IMPORT).add_argument
    weights = "of weights, here or on HuggingFace's hub: hf://ORG/NAME[@REVISION][/FILE]"
    add("file", nargs="+", type=_file, metavar="FILE", help=weights)
    add("run", type=files.user_path, metavar="OUT_RUN", help="a new folder")
    add("--heads", type=whole, help="attention heads, where the file does not say")
    add("--decoder_heads", type=whole, help="of MAE's decoder, likewise")
    add("--ln_eps", type=number, help="epsilon of LayerNorm, likewise")
    resized = "of the images to come; the position grid is resized (bicubic) where it differs"
    add("--image_size", type=_size, metavar="H,W", help=resized)
    pooled = """the feature: the class token (the mean of several), or the patches' mean (the
        default for an MAE of ViT-B, as in the paper, and without class tokens), or that mean before
        the final norm"""
    add("--pool", choices=vit.POOLS, help=pooled)
    add("--dtype", choices=vit.DTYPES, help="of activations (bfloat16)")
    add("--key", help="which model of a file with several, such as teacher or state_dict_ema")
    add = commands.add_parser("export", description=_EXPORT).add_argument
    add(
        "run", type=files.user_path, metavar="RUN", help="a run's folder, or one of its checkpoints"
    )
    add("file", type=files.user_path, metavar="FILE", help="a new file, for hf a folder")
    add("--format", required=True, choices=exporting.FORMATS)
    add("--stage", help="of a run with several; by default its last")
    averaged = "of ct and refine: the encoder's average, which is evaluated, or the last encoder"
    add("--weights", choices=("ema", "trained"), default="ema", help=averaged)
    return parser


def _import(arguments: argparse.Namespace) -> None:
    run = arguments.run.absolute()
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run}: exists already; name a new folder")
    fields = dataclasses.fields(importing.Overrides)
    overrides = importing.Overrides(*(getattr(arguments, field.name) for field in fields))
    imported = importing.recognised(arguments.file, overrides)
    print("\n".join(imported.described), flush=True)
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed, so that a run is there whole or not at all.
        with tempfile.TemporaryDirectory(prefix=".import-", dir=run.parent) as scratch:
            draft = Path(scratch) / "run"
            checkpoints.write(checkpoints.stage_folder(draft, imported.kind), imported.read())
            lineage.write_lineage(draft, imported.origin())
            files.write_json(draft / "config.json", imported.config.to_dict())
            draft.replace(run)
    # A full disk is an error of orbax's own.
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{run}: cannot write there: {str(error).splitlines()[0]}") from error
    print(f"\n{arguments.run}: start from it with --config.init_from={arguments.run}")


def read_run(path: Path, stage: str | None = None, weights: str = "ema") -> exporting.Model:
    """Reads a trained stage of a run or of one of its checkpoints, by default the checkpoint's or
    the last one, with its encoder as it is evaluated ("ema") or as it was last ("trained"), and
    what a model card says about it. Raises `UserError` if there is no such run, stage or step, or
    the stage is not finished."""
    allowed = "the folder of a run; a file must be imported first"
    saved = lineage.trained_stage(path, (stage,) if stage else (), where=str(path), allowed=allowed)
    if stage not in (None, saved.stage):
        raise UserError(f"--stage={stage}: the checkpoint is one of stage {saved.stage}")
    run, stage, kind = saved.run, saved.stage, SAVED[saved.stage]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    folder = checkpoints.stage_folder(run, stage)
    parts = checkpoints.read_parts(folder, kind.saved + kind.exported, mesh, saved.step)
    encoder = kind.last_encoder_params if weights == "trained" else kind.encoder_params
    results = runner.read_results(run).get(stage, {})
    measured = table.percentages({stage: results})[stage]
    return exporting.Model(
        stage=stage,
        config=saved.config,
        encoder=jax.device_get(encoder(parts)),
        parts=jax.device_get(parts),
        averaged="ema" in kind.saved and weights == "ema",
        run=run.name,
        lineage=lineage.read_lineage(run),
        measured=measured,
        class_names=saved.classes,
        held_out="k-NN" in measured or results.get("cluster", {}).get("split") == "val",
    )


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.command == "import":
        _import(arguments)
        return
    exporting.check_file(arguments.file, arguments.format)  # before weights are read
    model = read_run(arguments.run, arguments.stage, arguments.weights)
    print("\n".join(exporting.export(model, arguments.file, arguments.format)))


if __name__ == "__main__":
    sys.exit(errors.run_command(main))
