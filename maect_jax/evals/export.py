"""Features for others: files that hold the names of the images, too."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maect_jax.evals.features import Features

KINDS = ("npz", "parquet")
_ROWS = 8192  # written at a time


def write(path: Path, found: Features, names: Sequence[str]) -> None:
    """Writes features to a `.npz` (`features` fp32 `[N, D]`, `label`, `index`, `name`) or a
    `.parquet` (the same as columns, a list of D numbers a row).

    Args:
      path: its ending says which.
      found: the features.
      names: of these images, in their order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    numbers = {"label": found.labels, "index": found.index}
    if path.suffix == ".npz":
        with draft.open("wb") as file:
            np.savez(file, features=found.x, name=np.array(names, str), **numbers)
    else:
        width = found.x.shape[1]
        kind = pa.list_(pa.float32(), width)
        columns = {"name": pa.string(), "label": pa.int32(), "index": pa.int32(), "features": kind}
        with pq.ParquetWriter(draft, pa.schema(columns)) as writer:
            for start in range(0, len(found.x), _ROWS):
                part = slice(start, start + _ROWS)
                flat = pa.array(np.ascontiguousarray(found.x[part]).ravel())
                rows = pa.FixedSizeListArray.from_arrays(flat, width)
                plain = {key: array[part] for key, array in numbers.items()}
                table = {"name": list(names[part]), **plain, "features": rows}
                writer.write_table(pa.table(table, schema=pa.schema(columns)))
    draft.replace(path)
