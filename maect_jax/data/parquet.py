"""Images in parquet files, as HuggingFace hands out data sets."""

import json
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import parquet as pq

from maect_jax.data.tars import Image, Listing
from maect_jax.errors import first_of

_BYTES = ("binary", "large_binary", "binary_view")
_NAMES = ("string", "large_string", "string_view", "null")
_ROWS = 64  # taken at a time of a row group, which is in memory as a whole


def unpack(file: BinaryIO, into: BinaryIO, label_key: str | None) -> Listing:
    """Writes the encoded images of a parquet file one after the other.

    Parquet compresses many images together, so that to read one takes as long as to read all of
    those.

    Args:
      file: has a column of images, `{bytes, path}` or bytes: `image`, or the only such one.
      into: where they are written, from its start.
      label_key: the column of the labels, numbers or names; None to read no labels.

    Returns:
      Where they are in `into`, and the names of the classes (ClassLabel). The name of an image is
      its path, or its row where it has none of its own.

    Raises:
      ValueError: the file is damaged, or has no such columns, or images that are paths alone.
    """
    try:
        with pq.ParquetFile(file) as content:
            return _unpacked(content, into, label_key)
    except pa.ArrowException as error:  # some kinds are no ValueError
        raise ValueError(f"cannot be read: {' '.join(str(error).split())}") from error


def _unpacked(content: pq.ParquetFile, into: BinaryIO, label_key: str | None) -> Listing:
    schema = content.schema_arrow
    column, labels = _image_column(schema), None
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = {  # of the classes of each column that has such
        column: kind["names"]
        for column, kind in features.get("info", {}).get("features", {}).items()
        if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
    }
    if label_key is not None:
        labels = _label_column(schema, list(names), label_key)
    classes = names.get(labels, [])
    images, offset = [], 0
    for batch in content.iter_batches(_ROWS, columns=[column, *filter(None, [labels])]):
        encoded, paths = batch.column(column), [None] * len(batch)
        if pa.types.is_struct(encoded.type):
            parts = dict(zip(encoded.type.names, encoded.flatten(), strict=True))
            encoded, paths = parts["bytes"], parts.get("path", pa.array(paths)).to_pylist()
        numbers = batch.column(labels).to_pylist() if labels else [None] * len(batch)
        for row, path, number in zip(encoded, paths, numbers, strict=True):
            if not row.is_valid and path:
                raise ValueError(f"has the path of an image, {path!r}, without its bytes")
            size = into.write(row.as_buffer()) if row.is_valid else 0
            images.append(Image(path or "", offset, size, 0, _label(number, classes)))
            offset += size
    if len({image.name for image in images}) < len(images) or any(not i.name for i in images):
        images = [image._replace(name=str(row)) for row, image in enumerate(images)]
    return Listing(images, classes)


def _image_column(schema: pa.Schema) -> str:
    def is_image(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind) and "bytes" in kind.names:
            kind = kind.field("bytes").type
        return str(kind) in _BYTES

    found = [field.name for field in schema if is_image(field.type)]
    if "image" in found:
        return "image"
    if len(found) != 1:
        what = f"several columns of bytes, {first_of(found)}" if found else "no column of images"
        raise ValueError(f"has {what}; expected `image`, or one such column: {_kinds(schema)}")
    return found[0]


def _label_column(schema: pa.Schema, labels: list[str], label_key: str) -> str | None:
    """The column of the labels, of which some are known; None if there is none."""
    if label_key not in schema.names:
        if labels:
            raise ValueError(
                f"has no column {label_key!r}; set config.data.label_key to one of its labels: "
                f"{first_of(labels)}"
            )
        return None
    kind = schema.field(label_key).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(kind) or str(kind) in _NAMES):
        raise ValueError(f"{label_key!r} is {kind}; labels must be integers or names")
    return label_key


def _label(value: Any, classes: list[str]) -> str:
    if value is None or value == -1:  # -1 for none, as in test splits
        return ""
    if classes and not 0 <= value < len(classes):
        raise ValueError(f"has the label {value}, and {len(classes)} classes")
    return classes[value] if classes else str(value)


def _kinds(schema: pa.Schema) -> str:
    return first_of([f"{field.name} ({field.type})" for field in schema])
