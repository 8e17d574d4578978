"""From foreign files to what a run saves: its kind, its model, its variables."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from maect_jax.convert import describe, head_names, layouts, names, recognise, shapes, tensors, told
from maect_jax.convert.layouts import CLASSIFIER, DECODER, ENCODER, HEAD, Parts
from maect_jax.convert.tensors import Stored
from maect_jax.convert.told import Given
from maect_jax.errors import UserError
from maect_jax.models import positions, vit

_CLASSIFIER = {"kernel": "weight", "bias": "bias"}
_STATISTICS = {"mean": "running_mean", "var": "running_var"}
_NOTHING = Given()


@dataclasses.dataclass(frozen=True)
class Imported:
    """Foreign files, recognised and checked but not yet read.

    Attributes:
      files: where they are.
      kind: the stage that a run with such variables has saved, a key of `SAVED`.
      config: of such a run: `model`, `data` where the normalisation is known, the sizes of a head.
      described: for people, a line each.
    """

    files: tuple[Path, ...]
    kind: str
    config: ConfigDict
    described: tuple[str, ...]
    _layouts: tuple[str, ...]
    _parts: Parts
    _grid: tuple[int, int]

    def read(self) -> dict:
        """The variables, NumPy arrays: what `Saved.saved` names and, for ct, `target`."""
        model = self.config.model
        grids = self._grid, positions.grid(model.image_size, model.patch_size)
        encoder = names.encoder_from_torch(self._parts[ENCODER], self._grid)
        encoder = positions.fitted(encoder, *grids)
        if self.kind == "encoder":
            return {"params": {"encoder": encoder}}
        if self.kind == "mae":
            decoder = names.decoder_from_torch(self._parts[DECODER], self._grid)
            decoder = positions.fitted(decoder, *grids)
            return {"params": {"encoder": encoder, "decoder": decoder}}
        if self.kind in ("finetune", "probe"):
            own = self._parts[CLASSIFIER]
            classifier = {ours: np.asarray(own[name]) for ours, name in _CLASSIFIER.items()}
            params = {"classifier": classifier | {"kernel": classifier["kernel"].T}}
            if self.kind == "finetune":
                trained, frozen = vit.split_blocks(encoder, 0)
                return {"params": params | {"encoder": trained}, "frozen": {"encoder": frozen}}
            found = {ours: np.asarray(own[name]) for ours, name in _STATISTICS.items()}
            return {
                "params": params,
                "frozen": {"encoder": encoder},
                "batch_stats": {"classifier": found},
            }
        head = head_names.head_from_torch(self._parts[HEAD])
        parts = {key: head[key] for key in ("batch_stats", "queue")}
        if self.kind == "head":
            return parts | {"params": head["params"], "frozen": {"encoder": encoder}}
        # As after tuning with all blocks frozen: the average is the encoder itself.
        trained, frozen = vit.split_blocks(encoder, vit.size_of(model).depth)
        return parts | {
            "params": head["params"] | {"encoder": trained},
            "frozen": {"encoder": frozen},
            "ema": {"encoder": trained},
            "target": head["target"],
        }

    def origin(self) -> list[dict]:
        """Where the weights are from: each file with its layout and its SHA-256."""
        return [
            {"file": path.name, "layout": layout, "sha256": tensors.sha256(path)}
            for path, layout in zip(self.files, self._layouts, strict=True)
        ]


def is_file(init_from: str) -> bool:
    """Whether `init_from` names foreign files, and not a run."""
    paths = paths_of(init_from)
    if len(paths) == 1 and paths[0].is_dir():
        return not (paths[0] / "checkpoints").exists() and bool(tensors.weights_in(paths[0]))
    return len(paths) > 1 or any(path.is_file() for path in paths)


def paths_of(text: str) -> tuple[Path, ...]:
    """The paths in `ENCODER` or `ENCODER,HEAD`."""
    if Path(text).exists():
        return (Path(text),)
    return tuple(Path(part) for part in text.split(",") if part)


def recognised(files: Sequence[Path], given: Given = _NOTHING) -> Imported:
    """Finds out what some files are, by the names and shapes of their tensors alone.

    Args:
      files: one with an encoder, and perhaps one with what was trained on it: a contrastive head or
        a linear probe.
      given: what the user says of them.

    Raises:
      UserError: a file is not there, damaged or of no kind that can be read; a tensor is missing,
        has no place or a wrong shape; or what a model needs is not told.
    """
    where = ",".join(map(str, files))
    contents = [tensors.read(path) for path in files]
    found = [layouts.sort(content.tensors, str(content.path)) for content in contents]
    parts: Parts = {}
    for one, content in zip(found, contents, strict=True):
        twice = set(parts) & set(one.parts)
        if twice:
            raise UserError(f"{content.path}: another {min(twice)}; one file of each is allowed")
        parts |= one.parts
    if ENCODER not in parts:
        raise UserError(
            f"{where}: holds {found[0].layout}, and no encoder; name the encoder with it, "
            f"ENCODER,{files[0].name}"
        )
    own = next(i for i, one in enumerate(found) if ENCODER in one.parts)
    main, about, path = found[own], contents[own].config, str(files[own])
    section, grid = recognise.model(main, about, given, path)
    _place_class_position(parts, grid, files[own])
    decoding = None
    if DECODER in parts:
        decoding = recognise.decoder(parts[DECODER], about, section, given, path)
    sizes = recognise.head(parts[HEAD], where) if HEAD in parts else {}
    shapes.check(parts, shapes.expected(parts, section, sizes, decoding, grid), where)
    kind = _kind(parts, where)
    config = {"name": files[own].stem, "stages": (kind,), "model": section}
    config["data"] = told.normalisation(about, contents[own].preprocessor, section.channels, path)
    config[kind] = dict(sizes)
    if decoding:
        config[kind]["decoder"] = {k: getattr(decoding, k) for k in ("width", "depth", "heads")}
    if kind == "probe":
        config[kind]["bn_eps"] = next(one.bn_eps for one in found if CLASSIFIER in one.parts)
    config = ConfigDict(config)
    of = tuple(one.layout for one in found)
    described = tuple(describe.lines(contents, found, config, grid, parts))
    return Imported(tuple(files), kind, config, described, of, parts, grid)


def _kind(parts: Parts, where: str) -> str:
    beside = set(parts) - {ENCODER}
    if len(beside) > 1:
        raise UserError(f"{where}: holds {' and '.join(sorted(beside))}; one of them is allowed")
    kinds = {
        DECODER: "mae",
        HEAD: "ct" if "target_projector.0.weight" in parts.get(HEAD, ()) else "head",
        CLASSIFIER: "probe" if "running_var" in parts.get(CLASSIFIER, ()) else "finetune",
    }
    return kinds[beside.pop()] if beside else "encoder"


def _place_class_position(parts: Parts, grid: tuple[int, int], path: Path) -> None:
    """Adds the class token's row of the position embedding, where there is one, to that token."""
    patches = grid[0] * grid[1]
    for part in (ENCODER, DECODER):
        own = parts.get(part, {})
        stored = own.get("pos_embed")
        if stored is None or len(stored.shape) != 3 or stored.shape[1] != patches + 1:
            continue
        if part == ENCODER:
            token = recognise.need(own, "cls_token", str(path))
            own["cls_token"] = Stored(
                token.names + stored.names,
                token.shape,
                lambda token=token, stored=stored: np.asarray(token) + np.asarray(stored)[:, :1],
                path,
                token.floating,
            )
        elif np.asarray(stored)[:, 0].any():
            raise UserError(
                f"{path}: {stored.names[0]!r} has a row for the class token that is not zero, for "
                "which there is no place in the decoder"
            )
        own["pos_embed"] = Stored(
            stored.names,
            (stored.shape[0], patches, stored.shape[2]),
            lambda stored=stored: np.asarray(stored)[:, 1:],
            path,
            stored.floating,
        )
