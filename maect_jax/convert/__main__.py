"""In and out of the PyTorch world.

python -m maect_jax.convert import FILE [FILE] OUT_RUN
python -m maect_jax.convert export RUN FILE --format={timm,hf,maect,mae}
"""

import argparse
import sys
import tempfile
from pathlib import Path

from maect_jax import errors, files
from maect_jax.convert import exporting, importing
from maect_jax.convert.told import Given
from maect_jax.errors import UserError
from maect_jax.models import vit
from maect_jax.run import checkpoints, lineage

_IMPORT = """
Makes a run of files from elsewhere, for --config.init_from=OUT_RUN. FILE is MAE's .pth, an encoder
of MAE-CT's authors (.th), a HuggingFace folder (ViTMAE*, ViT*), or a timm ViT (.safetensors, .pth);
a second one may be what the authors trained on their encoder, a contrastive head or a linear probe.
Prints what it recognised and how every tensor is used.
"""
_EXPORT = """
Writes the encoder of a run for others, with a model card beside it. timm: for
timm.create_model(checkpoint_path=FILE). hf: FILE is a folder for transformers' from_pretrained.
mae: MAE's names, with the decoder. maect: the names of MAE-CT's authors, the head (or the probe) in
a second file. timm is safetensors, mae and maect what the ending of FILE says (.safetensors; .pth
needs PyTorch).
"""


def _size(text: str) -> tuple[int, int]:
    sides = tuple(int(side) for side in text.split(","))
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError
    return sides


_size.__name__ = "HEIGHT,WIDTH (such as 224,224)"  # by which argparse calls it


def _parser() -> argparse.ArgumentParser:
    def formatted(prog):
        return argparse.RawDescriptionHelpFormatter(prog, width=100)

    parser = errors.OneLineParser(
        prog="python -m maect_jax.convert", formatter_class=formatted, description=__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    take = commands.add_parser("import", formatter_class=formatted, description=_IMPORT)
    take.add_argument("file", nargs="+", type=Path, metavar="FILE", help="of weights")
    take.add_argument("run", type=Path, metavar="OUT_RUN", help="a new folder")
    take.add_argument(
        "--heads", type=errors.positive(int), help="attention heads, where the file does not tell"
    )
    take.add_argument(
        "--decoder_heads", type=errors.positive(int), help="of MAE's decoder, likewise"
    )
    take.add_argument(
        "--ln_eps", type=errors.positive(float), help="epsilon of LayerNorm, likewise"
    )
    take.add_argument(
        "--image_size", type=_size, metavar="H,W",
        help="of the images to come; the position grid is resized (bicubic) where it differs",
    )  # fmt: skip
    take.add_argument(
        "--pool", choices=vit.POOLS,
        help="the feature: the class token, or the patches' mean (by default for an MAE "
        "of ViT-B, as in the paper), or that mean before the final norm",
    )  # fmt: skip
    take.add_argument("--dtype", choices=vit.DTYPES, help="of activations (bfloat16)")
    give = commands.add_parser("export", formatter_class=formatted, description=_EXPORT)
    give.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    give.add_argument("file", type=Path, metavar="FILE", help="a new file, for hf a folder")
    give.add_argument("--format", required=True, choices=exporting.FORMATS)
    give.add_argument("--stage", help="of a run with several; by default its last")
    give.add_argument(
        "--weights", choices=("ema", "trained"), default="ema",
        help="of stage ct: the average of the encoder, which is what is evaluated, or the last one",
    )  # fmt: skip
    return parser


def _import(arguments: argparse.Namespace) -> None:
    run = arguments.run.absolute()
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run}: is there already; name a new folder")
    keys = ("heads", "decoder_heads", "ln_eps", "image_size", "pool", "dtype")
    given = Given(**{key: getattr(arguments, key) for key in keys})
    found = importing.recognised(arguments.file, given)
    print("\n".join(found.described), flush=True)
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own beside it, so that a run is there whole or not at all.
        with tempfile.TemporaryDirectory(prefix=".import-", dir=run.parent) as scratch:
            draft = Path(scratch) / "run"
            checkpoints.write(checkpoints.stage_folder(draft, found.kind), found.read())
            lineage.write_lineage(draft, found.origin())
            files.write_json(draft / "config.json", found.config.to_dict())
            draft.replace(run)
    # A full disk is an error of orbax's own.
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{run}: cannot write there: {str(error).splitlines()[0]}") from error
    print(f"\n{arguments.run}: start from it with --config.init_from={arguments.run}")


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.command == "import":
        _import(arguments)
        return
    written = exporting.export(
        arguments.run, arguments.file, arguments.format, arguments.stage, arguments.weights
    )
    print("\n".join(written))


if __name__ == "__main__":
    sys.exit(errors.run_command(main))
