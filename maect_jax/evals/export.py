"""Files of features for other programs, with the names of the images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maect_jax.evals.features import Features

KINDS = ("npz", "parquet")
_ROWS = 8192  # of a row group


def write(path: Path, features: Features, names: Sequence[str]) -> None:
    """Writes a `.npz` (`features` fp32 `[N, D]`, `label`, `index`, `name`) or a `.parquet` (the
    same as columns, a list of D numbers a row), as the suffix says. `names` are of these images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, (x, labels, index) = path.with_suffix(".tmp"), features
    if path.suffix == ".npz":
        with draft.open("wb") as file:
            np.savez(file, features=x, name=np.array(names, str), label=labels, index=index)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        flat = pa.array(np.ascontiguousarray(x).ravel())  # no copy of what lies on disk
        columns = {"name": pa.array(names, pa.string()), "label": labels, "index": index}
        columns["features"] = pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
        pq.write_table(pa.table(columns), draft, row_group_size=_ROWS)
    draft.replace(path)
