"""Makes the report of a run again from its folder; for several runs, also prints their results as
mean +- standard deviation.

    python -m maect_jax.report RUN [RUN ...]
"""

import sys
from pathlib import Path

from maect_jax import errors, pipeline
from maect_jax.evals import runner, table
from maect_jax.report import build


def main() -> None:
    parser = errors.OneLineParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    runs = list(dict.fromkeys(parser.parse_args().runs))
    for run in runs:
        images = pipeline.open_images(build.read_config(run), run)
        print(build.report(run, images), flush=True)
    if len(runs) > 1:
        results = {str(run): runner.read_results(run) for run in runs}
        print(f"\n{table.text(table.cells_of_several(results))}")


if __name__ == "__main__":
    sys.exit(errors.run_command(main))
