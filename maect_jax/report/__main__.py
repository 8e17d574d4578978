"""Rebuilds the page of a run, or of several: python -m maect_jax.report RUN [RUN ...].

With several runs it also prints their results as mean +- deviation over the runs.
"""

import sys
from pathlib import Path

from maect_jax import inputs
from maect_jax.errors import UserError
from maect_jax.evals import runner, table
from maect_jax.report import page


def main(arguments: list[str]) -> None:
    if not arguments or any(argument.startswith("-") for argument in arguments):
        print(__doc__.strip())
        sys.exit(0 if arguments in (["-h"], ["--help"]) else 2)
    runs = [Path(argument) for argument in arguments]
    try:
        for run in runs:
            images = inputs.open_sources(page.read_config(run), run)
            print(page.build(run, images), flush=True)
        if len(runs) > 1:
            results = {str(run): runner.read_results(run) for run in runs}
            print(f"\n{table.text(table.cells_of_several(results))}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
