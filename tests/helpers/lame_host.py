"""A run one of whose hosts, the first, cannot write:

python -m tests.helpers.lame_host WHAT [flags of maect_jax.main]

WHAT is `checkpoints` or `metrics`.
"""

import errno
import os
import sys

from maect_jax import main
from maect_jax.run import checkpoints, jsonl, manifest


def away(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    _, what, *flags = sys.argv
    checkpoints._PAUSES = (0.1, 0.1, 0.1)
    if os.environ["JAX_PROCESS_ID"] == "0":
        if what == "checkpoints":
            manifest.digests = away
        else:
            jsonl.Writer.add = away
    sys.argv = ["maect_jax.main", *flags]
    main._PATIENCE = 3.0
    main.main()
