"""The host's part of the input from shards, against the same photographs in a folder.

    python -m benchmarks.shards_input FOLDER [--workers=2]

FOLDER contains `train/<class>/*.jpg`. They are written as tars and as parquet files (row groups of
100 images, compressed by snappy, as HuggingFace's `datasets` does), and all sides give two views of
224 pixels (`turns`). `row_groups` reads parquet without unpacking it: each process keeps the last
row group, since of many it would hardly ever have the right one. Before that, how long it takes to
index shards, and to open them again: also 100,000 small images.
"""

import argparse
import io
import os
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from absl import flags
from pyarrow import parquet as pq

from benchmarks import turns
from maect_jax.data import loader, shard_files
from maect_jax.data.base import Identity, Source
from maect_jax.data.decode import Decoding
from maect_jax.data.folder import Folder
from maect_jax.data.shards import Shards
from maect_jax.data.transforms import Crops

SHARDS, GROUP = 4, 100
SMALL = 100_000  # images of 3 KB


class RowGroups(Source):
    """Images of parquet files, of which each process keeps the last row group."""

    identity, classes = Identity(0, ""), ()

    def __init__(self, paths):
        self.paths, self.kept = [str(path) for path in paths], {}
        counts = [pq.read_metadata(path).num_rows for path in self.paths]
        self.rows = [(i, row) for i, count in enumerate(counts) for row in range(count)]
        self.labels = np.full(len(self.rows), -1)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, record):
        shard, row = self.rows[record]
        key = shard, row // GROUP
        if key not in self.kept:
            with pq.ParquetFile(self.paths[shard]) as file:
                table = file.read_row_group(key[1], ["image"])
            self.kept = {key: table.column("image").combine_chunks().field("bytes")}
        return self.kept[key][row % GROUP].as_py(), -1


def write_tar(path: Path, images) -> None:
    """Writes a tar of (name, label, content)."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, label, content in images:
            for ending, data in ((".jpg", content), (".cls", b"%d" % label)):
                member = tarfile.TarInfo(name + ending)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, images) -> None:
    """Writes a parquet file of them."""
    path.parent.mkdir(exist_ok=True)
    names, labels, contents = zip(*images, strict=True)
    pairs = zip(contents, names, strict=True)
    column = [{"bytes": content, "path": name} for content, name in pairs]
    pq.write_table(pa.table({"image": column, "label": labels}), path, row_group_size=GROUP)


def opened(folder: Path) -> Shards:
    """The images of a folder's shards."""
    start = time.perf_counter()
    source = Shards(shard_files.find(str(folder), "train", "train"), "label")
    took = time.perf_counter() - start
    each = took / len(source) * 1e6
    print(f"{folder.name}: {len(source):,} images opened in {took:.2f} s, {each:.0f} us an image")
    return source


def batches(source: Source, workers: int, batch_size: int = 32):
    """Endless batches of two views."""
    crops = (Crops((224, 224), (0.08, 1.0), 2),)
    make = loader.TrainRecord(source, Decoding(3), crops, (0, 0))
    order = loader.Order(len(source), batch_size, 10**6, (0, 0), range(batch_size))
    return loader.train_batches(order, make, workers)


def main(folder: str, workers: int, scratch: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    files = Folder(f"{folder}/train")
    images = [
        (f"{i:06}", label, content)
        for i, (content, label) in enumerate(files[r] for r in range(len(files)))
    ]
    for i in range(SHARDS):
        write_tar(scratch / "tar" / f"train-{i}.tar", images[i::SHARDS])
        write_parquet(scratch / "parquet" / f"train-{i}.parquet", images[i::SHARDS])
    small = [(f"{i:06}", i % 10, b"0" * 3000) for i in range(SMALL // 10)]
    for i in range(10):
        write_tar(scratch / "small" / f"train-{i}.tar", small)
    for name in ("small", "small"):
        opened(scratch / name)
    sources = {"folder": files, "tar": opened(scratch / "tar")}
    sources["parquet"] = opened(scratch / "parquet")
    sources["row_groups"] = RowGroups(sorted((scratch / "parquet").iterdir()))
    turns.compare({name: batches(x, workers) for name, x in sources.items()}, 32, batches=30)


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # grain's worker processes read them
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as created:
        main(arguments.folder, arguments.workers, Path(created))
