"""Writes tars and parquet files of encoded images, as WebDataset and HuggingFace have them."""

import io
import json
import tarfile

import pyarrow as pa
from pyarrow import parquet as pq

from tests.helpers.common import save


def tar(path, members):
    """A tar of files, content by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    return path


def samples(root, labels, ending="cls", start=0):
    """Members of an image for each label, which is in a file with this ending, if it is not None;
    the images are red by their number."""
    members = {}
    for i, label in enumerate(labels, start):
        save(root / "drawn.png", (9, 7 + i % 3), i)
        members[f"a/{i:03}.png"] = (root / "drawn.png").read_bytes()
        if label is not None:
            members[f"a/{i:03}.{ending}"] = str(label).encode()
    return members


def parquet(path, members, names=None, **columns):
    """A parquet file of images and of labels, some rows a group; `names` of the classes make the
    labels ClassLabels."""
    images = {name: x for name, x in members.items() if name.endswith(".png")}
    labels = [int(x) for name, x in members.items() if name.endswith(".cls")]
    struct = [{"bytes": x, "path": name} for name, x in images.items()]
    columns = {"image": struct} | ({"label": labels} if labels else {}) | columns
    table = pa.table({key: column for key, column in columns.items() if column is not None})
    if names:
        feature = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        about = json.dumps({"info": {"features": feature}})
        table = table.replace_schema_metadata({"huggingface": about})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)
    return path
