"""Writes the page on which people look through the clusters of a run and name them.

`clusters.html` is the page, with its script (`clusters.js`). `clusters/` has what it shows, as a
browser reads it from a disk: `data.js`, the thumbnails in sheets, and `all.js` where the page has
not all images. On the page an image is called by its place among the thumbnails.
"""

import base64
import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from maect_jax import __version__, files
from maect_jax.data import decode, loader, sources
from maect_jax.data.base import Source, digest, evenly_spaced, relative_names
from maect_jax.errors import BadImageError
from maect_jax.evals import runner
from maect_jax.evals.assignment import ARRAYS, Centres, Names, places, read_names
from maect_jax.report import style

_LOGGER = logging.getLogger(__name__)
_SCRIPT = Path(__file__).with_name("clusters.js")
_MOST = 50_000  # images of a page
_LISTED = 1_000  # borderline images, outliers, and pairs
_BORDERLINE = 0.1  # of all images, at most
_CENTRAL = 12  # images of each cluster that the list of clusters has room for
_NEAREST = 8  # clusters
_NEIGHBOURS = 2**14  # images that others are most like, at most: as many as `evals.near` samples
_SAMPLED = 64  # images by which the size of thumbnails is found
_SIDE, _BORDER = 92, 2  # pixels of a thumbnail's longer side, at most; around it
_BLOCK = 16  # pixels of a side that JPEG encodes together
_SHEET = 480  # pixels of a side: a browser decodes all of a sheet to show one image
_LOSSLESS = 64  # pixels up to which a thumbnail is all of the image
_GREY = np.full((_SIDE, _SIDE, 3), style.GREY_RGB, np.uint8)  # stands for what cannot be read


class Clustered(NamedTuple):
    """The clustering of a row."""

    source: Source  # its images
    found: Mapping[str, np.ndarray]  # the arrays of `cluster.Cluster`
    # Those of `near.npz`, with positions in `found` for record numbers; empty without it.
    near: Mapping[str, np.ndarray]
    names: Names  # those of the run's `names.json`

    @classmethod
    def read(cls, run: Path, row: str, source: Source, *, entry: Mapping) -> "Clustered | None":
        """That of a run, of whose results `entry` is the row's; `None`, with a warning, if it is of
        an earlier version. Raises `UserError` if a file of it is damaged."""
        found = runner.read_clusters(run, row)
        if not found:
            return None
        if absent := {"margin", "rank", "merges", *ARRAYS} - found.keys():
            path = runner.folder_of(run, row) / "cluster.npz"
            _LOGGER.warning(
                "%s: is of an earlier version (has no %s), so there is no clusters.html; %s",
                path, min(absent), runner.AGAIN,
            )  # fmt: skip
            return None
        names = read_names(run, Centres.read(found))
        return cls(source, found, _near(run, row, found, entry=entry), names)


def write(run: Path, clustered: Clustered, config: ConfigDict, template: jinja2.Template) -> None:
    """Writes `clusters.html` and `clusters/` into a run's folder, in place of what is there."""
    folder, draft = run / "clusters", run / "clusters.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        order = _order(clustered)
        sheets = _Sheets.write(
            draft, folder, clustered, order=order, decoding=sources.decoding(config)
        )
        names = relative_names(clustered.source)
        data = _data(clustered, order, names) | sheets.data()
        _write_script(draft / "data.js", "maectClusters", data)
        if data["part"]:
            records = clustered.found["index"].tolist()
            every = dict(names=[names[i] for i in records], place=_packed(places(clustered.found)))
            _write_script(draft / "all.js", "maectAll", every)
        script = _SCRIPT.read_text(encoding="utf-8")
        html = template.render(config=config, data=data, script=script)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        files.write_text(run / "clusters.html", html)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def remove(run: Path) -> None:
    """Removes the page of a run, which would show what is no more."""
    (run / "clusters.html").unlink(missing_ok=True)
    shutil.rmtree(run / "clusters", ignore_errors=True)


def _near(
    run: Path, row: str, found: Mapping[str, np.ndarray], *, entry: Mapping
) -> dict[str, np.ndarray]:
    """The arrays of a row's `near.npz`; none if it is not there, or is of other images."""
    near = runner.read_near(run, row)
    # An evaluation may have ended between the two.
    splits = {entry.get(name, {}).get("split") for name in ("cluster", "near")} - {None}
    if near and not (np.array_equal(near["index"], found["index"]) and len(splits) < 2):
        path = runner.folder_of(run, row) / "near.npz"
        _LOGGER.warning("%s: is of other images; clusters.html does without it", path)
        return {}
    positions = np.full(found["index"].max() + 2, -1, np.int32)  # the last is of no record
    positions[found["index"]] = np.arange(len(found["index"]))
    return near | {key: positions[near[key]] for key in ("neighbours", "pairs") if near}


def _listed(clustered: Clustered) -> dict[str, np.ndarray]:
    """The positions of borderline images and outliers, and those pairs `[P, 2]` that are listed,
    with their `cosine` and whether they are the `same`; the most remarkable first."""
    found, near = clustered.found, clustered.near
    few = min(_LISTED, int(np.ceil(_BORDERLINE * len(found["margin"]))))
    few *= len(found["numbers"]) > 1  # or nothing is between clusters
    listed = {"borderline": np.argsort(found["margin"], kind="stable")[:few]}
    if near:
        outliers = np.flatnonzero(near["outlier"])
        far = np.argsort(-near["far"][outliers], kind="stable")
        listed |= {"outliers": outliers[far][:_LISTED]}
        listed |= {key: near[key][:_LISTED] for key in ("pairs", "cosine", "same")}
    return listed


def _order(clustered: Clustered) -> np.ndarray:
    """The positions of the images of the page, int `[n]`, in the order of their thumbnails: what is
    seen together is near.

    First what is listed, and the central images of all clusters, which the page starts with; then
    the others, by cluster, from the centre to the rim. Of very many images these are the rim, those
    that others are most like, and some that are evenly spaced; of very many clusters some have
    none.
    """
    found, listed = clustered.found, _listed(clustered)
    of = places(found)
    order = np.lexsort((found["rank"], of))
    parts = [listed[key].ravel() for key in ("borderline", "outliers", "pairs") if key in listed]
    parts.append(order[found["rank"][order] < _CENTRAL])
    if len(order) > _MOST:
        from_rim = np.bincount(of)[of] - 1 - found["rank"]
        near = np.unique(clustered.near.get("neighbours", -1))
        parts += [order[from_rim[order] < _CENTRAL], near[near >= 0][:_NEIGHBOURS]]
    first = np.concatenate(parts)
    first = first[np.sort(np.unique(first, return_index=True)[1])][:_MOST]
    rest = order[~np.isin(order, first)]
    return np.concatenate([first, rest[evenly_spaced(len(rest), _MOST - len(first))]])


def _data(clustered: Clustered, order: np.ndarray, names: list[str]) -> dict:
    """What the page shows but for the thumbnails, plain JSON: of the images in this `order`."""
    source, found, given = clustered.source, clustered.found, clustered.names
    centres, of = Centres.read(found), places(found)
    shown = np.full(len(of) + 1, -1, np.int32)  # positions to images of the page
    shown[order] = np.arange(len(order), dtype=np.int32)
    records = found["index"][order]
    listed = _listed(clustered)
    first = source.name(int(records[0]))
    is_file = os.path.isabs(first) and os.path.isfile(first)
    data = {
        "digest": centres.digest,
        "images": len(of),
        "part": len(order) < len(of),
        "numbers": centres.numbers.tolist(),
        "sizes": np.bincount(of, minlength=len(centres.numbers)).tolist(),
        "nearest": _nearest(centres.x),
        "merges": found["merges"][:, :2].astype(int).tolist(),
        "names": [names[record] for record in records.tolist()],
        "folder": first.removesuffix(names[int(records[0])]) if is_file else "",
        "record": _packed(records.astype(np.int32)),
        "place": _packed(of[order]),
        "rank": _packed(found["rank"][order].astype(np.int32)),
        "distance": _packed(found["distance"][order].astype(np.float32)),
        "margin": _packed(found["margin"][order].astype(np.float32)),
        "beyond": _packed((found["distance"] > centres.rim[of])[order].astype(np.uint8)),
        "borderline": shown[listed["borderline"]].tolist(),
        "saved": dict(names=given.clusters, images=given.images) if any(given) else {},
        "near": None,
    }
    if near := clustered.near:
        pairs = shown[listed["pairs"]]
        data["near"] = {
            "neighbours": _packed(shown[near["neighbours"][order]]),
            "outliers": shown[listed["outliers"]].tolist(),
            "outlierCount": int(near["outlier"].sum()),
            "pairs": pairs.ravel().tolist(),
            "cosine": listed["cosine"].astype(float).round(4).tolist(),
            "same": listed["same"].tolist(),
            "pairCount": len(near["pairs"]),
        }
    return data


def _nearest(centres: np.ndarray) -> list[list[int]]:
    """For each of centres `[K, P]` the places of the nearest others, nearest first."""
    squares = np.square(centres).sum(1)
    apart = squares[:, None] + squares - 2 * centres @ centres.T
    np.fill_diagonal(apart, np.inf)
    return np.argsort(apart, 1, kind="stable")[:, : min(_NEAREST, len(centres) - 1)].tolist()


def _packed(array: np.ndarray) -> dict[str, str]:
    """An array as a script holds it: base64 of little-endian numbers, and JavaScript's name for
    their type."""
    kind = {"i": "Int", "u": "Uint", "f": "Float"}[array.dtype.kind]
    content = base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
    return {"type": f"{kind}{8 * array.itemsize}Array", "base64": content}


def _write_script(path: Path, name: str, content: dict) -> None:
    """Writes a script that sets a variable: browsers read no JSON from a disk."""
    path.write_text(f"window.{name} = {json.dumps(content)};\n", encoding="ascii")


class _Sheets(NamedTuple):
    """The thumbnails of images, in sheets `sprites_000.jpg` and on; each in a square cell."""

    side: int  # of the longest, pixels; `cell` has it with its border
    sizes: np.ndarray  # width and height of each, uint8 [n, 2]
    ending: str  # of the files

    @property
    def cell(self) -> int:
        return -(-(self.side + 2 * _BORDER) // _BLOCK) * _BLOCK

    @property
    def columns(self) -> int:
        return _SHEET // self.cell

    def data(self) -> dict:
        """What the page reads, plain JSON."""
        about = dict(border=_BORDER, cell=self.cell, columns=self.columns, ending=self.ending)
        about |= dict(side=self.side, crisp=self.side <= _LOSSLESS)
        return {"sheets": about, "shape": _packed(self.sizes)}

    @classmethod
    def write(
        cls, draft: Path, before: Path, clustered: Clustered, order: np.ndarray, decoding
    ) -> "_Sheets":
        """Writes those of images in this `order`; takes them from the folder `before`, if it has
        them."""
        source, records = clustered.source, clustered.found["index"][order].tolist()
        parts = [__version__, source.identity._asdict(), dataclasses.asdict(decoding), records]
        made_of = digest(json.dumps(parts).encode())
        about = draft / "sprites.npz"
        if (before / about.name).exists():
            kept = files.read_saved_arrays(
                before / about.name, "made_of", "sizes", "side", "ending"
            )
            if kept["made_of"] == made_of:
                for path in before.glob("sprites*"):
                    shutil.copy(path, draft)
                return cls(int(kept["side"]), kept["sizes"], str(kept["ending"]))

        def read(record: int, side: int = _SIDE) -> np.ndarray:
            return _thumbnail(source, record, decoding, side)

        with ThreadPoolExecutor(loader.cores()) as pool:
            sampled = pool.map(read, (records[i] for i in evenly_spaced(len(records), _SAMPLED)))
            side = max(max(image.shape) for image in sampled)
            empty = cls(side, np.zeros((0, 2), np.uint8), "png" if side <= _LOSSLESS else "jpg")
            each, shapes = empty.columns**2, []
            bar = tqdm(
                desc="thumbnails", unit="image", total=len(records), leave=False,
                disable=not sys.stderr.isatty(),
            )  # fmt: skip
            with bar:
                for start in range(0, len(records), each):
                    images = list(pool.map(partial(read, side=side), records[start : start + each]))
                    shapes += [image.shape[1::-1] for image in images]
                    sheet = empty._drawn(images).convert("L" if decoding.channels == 1 else "RGB")
                    path = draft / f"sprites_{start // each:03}.{empty.ending}"
                    sheet.save(path, quality=85)
                    bar.update(len(images))
        sheets = empty._replace(sizes=np.array(shapes, np.uint8))
        files.write_arrays(
            about,
            made_of=np.array(made_of),
            **{key: np.array(value) for key, value in sheets._asdict().items()},
        )
        return sheets

    def _drawn(self, images: list[np.ndarray]) -> Image.Image:
        """A sheet of images uint8 `[h, w, 3]`. Their edges go on beyond them, as neither scaling
        nor JPEG keeps to cells."""
        cell, rows = self.cell, -(-len(images) // self.columns)
        sheet = np.zeros((rows, self.columns, cell, cell, 3), np.uint8)
        for i, image in enumerate(images):
            around = [(_BORDER, cell - _BORDER - side) for side in image.shape[:2]]
            sheet[divmod(i, self.columns)] = np.pad(image, (*around, (0, 0)), mode="edge")
        return Image.fromarray(sheet.swapaxes(1, 2).reshape(rows * cell, -1, 3))


def _thumbnail(source: Source, record: int, decoding: decode.Decoding, side: int) -> np.ndarray:
    """An image of at most `side` pixels a side, uint8 `[h, w, 3]`; grey if it cannot be read."""
    try:
        content, _ = source[record]
        scale = min(1.0, side / max(decode.shape(content, decoding)))
        pixels = decode.pixels(content, decoding, scale)
    except (BadImageError, OSError):
        return _GREY[:side, :side]
    thumbnail = Image.fromarray(style.to_rgb_image(pixels))
    thumbnail.thumbnail((side, side))
    return np.asarray(thumbnail)
