"""Makes the report of a run, and the page of its clusters, again from its folder; of several runs,
also a report that compares them, and prints their results as mean +- standard deviation.

    maect report RUN [RUN ...] [--out=comparison.html]
"""

import os
import sys
from pathlib import Path

from etils import epy

from maect_jax import errors, files
from maect_jax.errors import UserError

with epy.lazy_imports():  # with JAX and matplotlib, which take seconds: `--help` does not wait
    from maect_jax import pipeline
    from maect_jax.report import build, compare


def main() -> None:
    parser = errors.OneLineParser(description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=files.user_path, metavar="RUN", help="the folder of a run"
    )
    parser.add_argument(
        "--out",
        type=files.user_path,
        metavar="FILE",
        help="the comparison of several runs (comparison.html)",
    )
    arguments = parser.parse_args()
    runs = {run.resolve(): run for run in arguments.runs}
    out = arguments.out or Path("comparison.html")
    writable = not out.is_dir() and os.access(out.parent, os.W_OK)
    if len(runs) > 1 and not (writable and out.suffix == ".html"):
        raise UserError(f"--out={out}: must name an .html file in a folder that can be written")
    if len(runs) == 1 and arguments.out:
        raise UserError(f"--out={out}: is for the comparison of several runs. Name several.")
    configs = {folder: build.read_config(run) for folder, run in runs.items()}
    histories = {}
    for folder, run in runs.items():
        images = pipeline.open_images(configs[folder])
        build.show(build.report(run, images))
        histories[folder] = build.read_history(run, images)
    if len(runs) > 1:
        text = compare.compare(histories, out)
        print(f"{out}\n\n{text}")


if __name__ == "__main__":
    sys.exit(errors.run_command(main))
