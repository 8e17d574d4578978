"""Assigns new images to the clusters that the evaluation of a run has found.

    maect assign RUN IMAGES [IMAGES ...] --out=assigned.csv

IMAGES are files, folders with all that is below them, or the shards of a pattern, read as those of
the run were. Each has a line: the number and the name of its cluster; its distance from the centre
of that; how much farther the next centre is; and whether it is beyond the rim, farther than 99 % of
the images that the cluster was made of are from the centre of the others. One that cannot be read
has no cluster.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from absl import flags
from etils import epy
from ml_collections import ConfigDict
from numpy.typing import ArrayLike

from maect_jax import config as configs
from maect_jax import errors, files
from maect_jax.errors import UserError, first_of, shown

with epy.lazy_imports():  # with JAX, which takes a second: `--help` and mistakes do not wait
    import jax

    from maect_jax import sharding, stages
    from maect_jax.convert import hub
    from maect_jax.data import (
        augment,
        bad_images,
        cache,
        loader,
        shard_files,
        shards,
        sources,
        values,
    )
    from maect_jax.data import folder as image_folder
    from maect_jax.evals import assignment, features, runner
    from maect_jax.run import folder as run_folder
    from maect_jax.run import lineage

_LISTED = 30  # clusters on a terminal
_UNLIKE = 3, 3  # times as many images beyond the rim as are to be expected, and how many more
_ENCODER_KEYS = ("batch_size", "pool", "dtype", "final_norm")


@dataclass(frozen=True)
class Clusters:
    """The clusters of a run: call them with images to know which these belong to.

    Attributes:
      run: its folder.
      row: of its results, the encoder whose features are clustered.
      config: of the run.
      centres: of the clusters.
      names: that people have given some of them.
    """

    run: Path
    row: str
    config: ConfigDict
    centres: "assignment.Centres"
    names: "assignment.Names"
    _encode: "features.Encode"
    _mesh: "jax.sharding.Mesh"

    def __call__(self, images: ArrayLike) -> "assignment.Assigned":
        """The clusters of images `[B, H, W, C]`, whose features are computed by a program for each
        B.

        Args:
          images: of the size of the run's model; uint8 from 0 to 255, or floating point from 0 to
            1; not normalised.

        Raises:
          ValueError: there are none, or they have another shape, dtype or range.
        """
        model, data = self.config.model, self.config.data
        images = augment.checked(images, (*model.image_size, model.channels))
        with jax.set_mesh(self._mesh):
            x = self._encode(runner.normalise(images, data.mean, data.std))
        return self._assign(np.asarray(x))

    def of_source(self, images: "sources.Source") -> "tuple[assignment.Assigned, np.ndarray]":
        """The clusters of all images of a source, read as the evaluation reads its own, and which
        of them are readable, bool `[N]`; a warning names the others."""
        config = self.config.copy_and_resolve_references()
        if config.data.workers:
            config.data.workers = loader.AUTO  # the run may have had more images
        images = cache.reduced(config, images)
        bad = bad_images.BadImages(images, sources.decoding(config), allowed=1)
        per_device = -(-min(config.eval.batch_size, len(images)) // self._mesh.size)
        run = run_folder.Run(config, self.run, self._mesh)
        extraction = runner.Extraction(run, images, bad, per_device * self._mesh.size)
        with jax.set_mesh(self._mesh):
            batches = extraction.batches(self._encode, title="assign")
            each = [(*self._assign(x), valid) for x, _, valid in batches]
        *found, valid = (np.concatenate(x)[: len(images)] for x in zip(*each, strict=True))
        return assignment.Assigned(*found), valid

    def _assign(self, x: np.ndarray) -> "assignment.Assigned":
        return self.centres.assign(x, self.names.clusters)


def load_clusters(where: str | Path, *, row: str | None = None) -> Clusters:
    """Loads the clusters of a run's evaluation, with the encoder whose features they are made of,
    onto the first device. Names are those of `names.json` in the run's folder.

    Args:
      where: the folder of a run.
      row: of its results; by default the last stage that trains without labels.

    Raises:
      UserError: there is no such run, it has no such clusters, or its encoder has changed since.
    """
    run = Path(files.expanded(str(where)))
    return _opened(run, row, sharding.make_mesh(devices=jax.local_devices()[:1]))


def _opened(run: Path, row: str | None, mesh, names: Path | None = None) -> Clusters:
    """The clusters of a row, with the names in a file, by default those in the run's folder."""
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{str(run)!r}: has no config.json. Name the folder of a run.")
    config = configs.read(path)
    entries = _entries(runner.read_results(run))
    saved = {name: arrays for name in entries if (arrays := runner.read_clusters(run, name))}
    if not saved:
        raise UserError(
            f"{run}: has no clusters; evaluate it with cluster among config.eval.protocols"
        )
    # Not those of another row where the file of this one is gone.
    row = row or next(name for name in entries if name in saved or entries[name])
    if row not in saved:
        raise UserError(
            f"{run}: has no clusters of row {row!r}; it has those of {first_of([*saved])}"
        )
    configs.require(path, config, "eval", _ENCODER_KEYS)
    folder, arrays = runner.folder_of(run, row), saved[row]
    if absent := [name for name in assignment.ARRAYS if name not in arrays]:
        raise UserError(
            f"{folder / 'cluster.npz'}: has no {first_of(absent)}, as an earlier version has "
            f"written it; {runner.AGAIN}"
        )
    centres = assignment.Centres.read(arrays)
    named = (
        assignment.checked_names(names, centres) if names else assignment.read_names(run, centres)
    )
    encode, made_of = runner.encoder_of(config, row, _saved(run, config, row), mesh)
    before = features.saved_made_of(folder / str(entries[row].get("split")))
    if not before:
        raise UserError(f"{folder}: its features are absent or damaged; run the same command again")
    if changed := [key for key, value in made_of.items() if before.get(key) != value]:
        raise UserError(
            f"{folder}: the clusters are of other features than this encoder gives now (changed: "
            f"{first_of(changed)}); run the evaluation again"
        )
    return Clusters(run, row, config, centres, named, encode, mesh)


def _entries(results: Mapping[str, dict]) -> dict[str, dict]:
    """What results say of the clusters of each row; those behind blocks follow their encoder's."""
    found = {}
    for name in runner.ordered(results):
        found[name] = results[name].get("cluster", {})
        for block, entry in results[name].get("blocks", {}).items():
            found[f"{name}{runner.BLOCKS}{block}"] = entry.get("cluster", {})
    return found


def _saved(run: Path, config: ConfigDict, row: str) -> "lineage.Saved | None":
    """The encoder of a row of the results. Raises `UserError` if it is gone."""
    name = row.partition(runner.BLOCKS)[0]
    if name == runner.PIXELS:
        return None
    where, first = str(run), config.stages[0]
    if first in stages.STAGES:
        origin: lineage.Saved = lineage.SavedStage(run, first)
    else:
        where, fetch = config.init_from, partial(hub.fetch, noted=lineage.hub_ids(run))
        origin = lineage.find(where, first, fetch=fetch)
    rows: Mapping[str, lineage.Saved] = origin.rows()
    if name not in rows:
        raise UserError(f"{where}: has no encoder {name!r} any more, whose features have clusters")
    return rows[name]


def _images(paths: Sequence[str]) -> "sources.Source":
    """The images that people name: files and folders, or shards. Raises `UserError` if there are
    none, or a file or folder is absent."""
    if all(map(shard_files.is_pattern, paths)):
        return shards.Shards(
            [x for path in paths for x in shard_files.find(path, "", "train")], None
        )
    names: list[str] = []
    for path in paths:
        if "://" in path or os.path.isdir(path):
            folder = image_folder.Folder(path, labelled=False)
            if len(paths) == 1:
                return folder
            names += map(folder.name, range(len(folder)))
        elif shard_files.is_pattern(path):
            raise UserError(f"{shown(path)!r}: shards and other images must be assigned apart")
        elif os.path.lexists(path):
            names.append(os.path.abspath(path))
        else:
            raise UserError(f"{shown(path)!r}: there is no such file or folder")
    return image_folder.Files(names)


def _lines(
    images: "sources.Source", found: "assignment.Assigned", readable: np.ndarray
) -> Iterator[Sequence]:
    """A line for each image, with empty cells where it cannot be read."""
    for record, cells in enumerate(zip(*(x.tolist() for x in found), strict=True)):
        cluster, name, *distances, beyond = cells
        line = [cluster, name, *(f"{x:.6g}" for x in distances), int(beyond)]
        yield images.name(record), *(line if readable[record] else [""] * len(line))


def _summary(clusters: Clusters, found: "assignment.Assigned") -> str:
    """How many images there are in each cluster, and beyond its rim, for people."""
    numbers, places, counts = np.unique(found.cluster, return_inverse=True, return_counts=True)
    beyond = np.bincount(places, found.beyond_rim).astype(int)
    count, far = len(found.cluster), int(beyond.sum())
    lines = [
        f"{count:,} image{'s' * (count != 1)} in {len(numbers)} of the "
        f"{len(clusters.centres.numbers)} clusters of {clusters.run} (row {clusters.row})",
        f"{'images':>9}{'beyond the rim':>17}",
    ]
    order = np.argsort(-counts, kind="stable")
    for place in order[:_LISTED]:
        number = int(numbers[place])
        name = clusters.names.clusters.get(number)
        title = f"{shown(name)} (cluster {number})" if name else f"cluster {number}"
        lines.append(f"{counts[place]:9,}{beyond[place]:17,}  {title}")
    if rest := order[_LISTED:].tolist():
        lines.append(f"{counts[rest].sum():9,}{beyond[rest].sum():17,}  {len(rest)} more")
    centres = clusters.centres
    usual = dict(zip(centres.numbers.tolist(), centres.beyond.tolist(), strict=True))
    expected = sum(usual[number] for number in found.cluster.tolist())
    if far > _UNLIKE[0] * expected + _UNLIKE[1]:
        lines.append(
            f"{far / count:.0%} of the images are beyond the rim, as {expected / count:.0%} of "
            "images like the run's own would be: these are unlike those, and their clusters may "
            "mean little."
        )
    return "\n".join(lines)


def main() -> None:
    parser = errors.OneLineParser(description=__doc__)
    parser.add_argument("run", type=files.user_path, metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "images",
        nargs="+",
        type=files.expanded,
        metavar="IMAGES",
        help="a file, a folder, or shards by their pattern, in quotes",
    )
    parser.add_argument(
        "--out", type=files.user_path, default="assigned.csv", help="the table (%(default)s)"
    )
    parser.add_argument(
        "--names",
        type=files.user_path,
        metavar="FILE",
        help="names of the clusters; kept as RUN/names.json, which is used without it",
    )
    parser.add_argument("--row", help="of the results; by default the last stage without labels")
    arguments = parser.parse_args()
    run, out, kept = arguments.run, arguments.out, arguments.run / assignment.NAMES
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out={out}: must name a file in a folder that can be written")
    clusters = _opened(run, arguments.row, sharding.make_mesh(), arguments.names)
    if (channels := clusters.config.model.channels) not in (1, 3):
        raise UserError(f"{run}: is of images of {channels} channels, for which use load_clusters")
    flags.FLAGS.mark_as_parsed()  # which grain's worker processes read
    try:
        images = _images(arguments.images)
    except UserError as error:  # this command has no such key
        raise UserError(str(error).removeprefix("config.data.path: ")) from error
    values.check([images], sources.decoding(clusters.config))
    found, readable = clusters.of_source(images)
    if not readable.any():
        raise UserError(f"none of the {len(images):,} images can be read")
    try:
        if arguments.names and arguments.names.resolve() != kept.resolve():
            files.write_json(kept, files.read_json(arguments.names))
            print(f"{arguments.names}: is kept as {kept}")
        of_images = partial(_lines, images, found, readable)
        files.write_csv(out, ["image", *found._fields], of_images)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written: {error.strerror}") from error
    print(_summary(clusters, assignment.Assigned(*(x[readable] for x in found))))
    if bad := int((~readable).sum()):
        print(f"{bad:,} of {len(images):,} images cannot be read, and have no cluster")
    print(out)


if __name__ == "__main__":
    sys.exit(errors.run_command(main))
