"""Samples in a tar, as WebDataset has them: members that share a name up to its first dot."""

import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

from maect_jax.data import decode

HEADER = tarfile.BLOCKSIZE  # bytes before those of a member
_LABELS = (".cls", ".json", ".txt")  # endings of what holds a label, the first that there is
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}


class Image(NamedTuple):
    """An image in a file."""

    name: str  # its own, which no other image in the file has
    offset: int  # of its first byte
    size: int  # bytes
    check: int  # the CRC-32 of its header, which tells it from what replaces it; 0 for no header
    label: str = ""  # its class, by name or number; empty for none


class Listing(NamedTuple):
    """What is in a shard."""

    images: list[Image]  # in order
    # Their names, in the order of their numbers, if the shard gives them.
    classes: Sequence[str] = ()
    # How many files that are in no sample are left out, by their ending.
    others: Mapping[str, int] = {}


def listing(file: BinaryIO, size: int, label_key: str | None) -> Listing:
    """Lists the images of a tar of so many bytes, which can be read anywhere. `label_key` is what
    holds the label in a member `.json`; None to read no labels. Raises `ValueError` if the tar is
    cut off, damaged or compressed, a sample has no image or two, or a label is neither a number nor
    a name."""
    found: dict[str, Image | None] = {}
    labels: dict[str, dict[str, bytes]] = {}
    others: list[tuple[str, str]] = []
    is_image = decode.endings().union(decode.HEIF_ENDINGS)  # without the extra they are bad images
    for member in _members(file, size):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, ending = base.partition(".")
        key, ending = f"{folder}{slash}{stem}", dot + ending.lower()
        if not stem:  # hidden, such as what macOS adds
            continue
        if ending in is_image:
            if other := found.get(key):
                raise ValueError(f"sample {key!r} has two images, {other.name} and {member.name}")
            found[key] = member
        elif ending in _LABELS:
            found.setdefault(key, None)
            if label_key is not None:
                file.seek(member.offset)
                labels.setdefault(key, {})[ending] = file.read(member.size)
        else:
            others.append((key, ending))
    rows = []
    for key, image in found.items():
        if image is None:
            raise ValueError(
                f"sample {key!r} has no image: expected {key}.jpg, .png or .webp in the same tar"
            )
        try:
            label = _label(labels.get(key, {}), label_key or "")
        except ValueError as error:
            raise ValueError(f"sample {key!r}: {error}") from error
        rows.append(image._replace(label=label))
    return Listing(rows, others=Counter(end for key, end in others if key not in found))


def _label(texts: dict[str, bytes], label_key: str) -> str:
    """The label of a sample, from what is in its members by their ending."""
    for ending in _LABELS:
        text = _text(texts.get(ending, b""))
        if text and ending == ".json":
            text = _json_label(text, label_key)
        if text := text.strip():
            return text
    return ""


def _json_label(text: str, label_key: str) -> str:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"its .json is none: {error}") from error
    label = content.get(label_key) if isinstance(content, dict) else content
    if label is None:
        return ""
    if type(label) not in (str, int):
        raise ValueError(
            f"config.data.label_key={label_key!r} is {json.dumps(label)[:40]} in its .json; must "
            "be an integer or a name"
        )
    return str(label)


def _members(file: BinaryIO, size: int) -> Iterator[Image]:
    """The regular files in a tar of so many bytes, without labels. Raises `ValueError` if it is not
    whole."""
    offset, name = 0, ""
    while True:
        file.seek(offset)
        block = file.read(HEADER)
        if not block:
            fix = "If it is whole, `truncate -s +1024 FILE` adds the mark."
            raise ValueError(f"is cut off at byte {offset}: the mark of its end is missing. {fix}")
        if len(block) == HEADER and not block.strip(b"\0"):
            break
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            kinds = [kind for start, kind in _COMPRESSIONS.items() if block.startswith(start)]
            if kinds and not offset:
                raise ValueError(f"is compressed ({kinds[0]}); decompress it once") from error
            raise ValueError(f"is cut off or damaged at byte {offset}: {error}") from error
        start = offset + HEADER
        if member.type in _LINKS:
            link = name or member.name
            raise ValueError(f"{link} is a link; tar files with -h --hard-dereference")
        if start + member.size > size:
            end = start + member.size
            raise ValueError(
                f"is cut off at byte {size}: {member.name} takes bytes {start} to {end}"
            )
        offset = start + -(-member.size // HEADER) * HEADER
        if member.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):  # of the next member
            file.seek(start)
            content = file.read(member.size)
            is_long = member.type == tarfile.GNUTYPE_LONGNAME
            name = _text(content.rstrip(b"\0")) if is_long else _pax_path(content) or name
            continue
        if member.isreg():
            name = (name or member.name).removeprefix("./")
            yield Image(name, start, member.size, zlib.crc32(block))
        name = ""
    file.seek(offset)
    if file.read(64 * HEADER).strip(b"\0"):
        raise ValueError(f"goes on after its end at byte {offset}, as tars do that were joined")


def _text(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


def _pax_path(records: bytes) -> str:
    """The `path` in an extended header, records `LENGTH KEY=VALUE`; empty if it has none."""
    path = ""
    while records:
        length = int(records.partition(b" ")[0])
        key, _, value = records[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        path, records = _text(value) if key == b"path" else path, records[length:]
    return path
