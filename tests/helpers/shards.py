"""Writes tars and parquet files of encoded images, as WebDataset and HuggingFace have them."""

import io
import json
import tarfile

import pyarrow as pa
from pyarrow import parquet as pq

from tests.helpers.common import save


def members_of(root, labels, first=0):
    """The members of a tar: images that are red by their number, from `first` on, and their labels,
    if these are not None. The folder `root` is for a file."""
    members = {}
    for i, label in enumerate(labels, first):
        save(root / "drawn.png", (9, 7 + i % 3), i)
        members[f"a/{i:03}.png"] = (root / "drawn.png").read_bytes()
        if label is not None:
            members[f"a/{i:03}.cls"] = str(label).encode()
    return members


def tar(path, members):
    """Writes a tar of files, content by name; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    return path


def parquet(path, members, names=None, **columns):
    """Writes a parquet file of such members, with `names` of the classes as ClassLabels; returns
    its path. Other columns are added, or removed by None."""
    image = [{"bytes": x, "path": name} for name, x in members.items() if name.endswith(".png")]
    label = [int(x) for name, x in members.items() if name.endswith(".cls")]
    columns = {"label": label, "image": image} | columns
    table = pa.table({key: column for key, column in columns.items() if column is not None})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)
    return path
