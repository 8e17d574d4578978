"""Figures of the paper (Lehner et al., 2023) to stand beside our own on ImageNet-1k, in percent.

By model and stage, under the names of the columns of `table`.
"""

import re
from collections.abc import Sequence

_CLASSES = 1000
_WNID = re.compile(r"n\d{8}")

_PROBE, _KNN = "linear probe", "k-NN"
_SHOTS = tuple(f"low-shot, {part}" for part in ("1 image", "2 images", "5 images", "1 %", "10 %"))
_FIGURES = {
    ("B/16", "MAE"): {_KNN: 51.1, _PROBE: 66.7},
    ("L/16", "MAE"): {_KNN: 60.6, _PROBE: 75.9},
    ("H/16", "MAE"): {_KNN: 61.1, _PROBE: 78.0},
    ("H/14", "MAE"): {_KNN: 58.9, _PROBE: 77.2},
    ("B/16", "MAE-CT"): {_KNN: 64.1, _PROBE: 73.5},
    ("L/16", "MAE-CT"): {_KNN: 78.0, _PROBE: 80.2},
    ("H/16", "MAE-CT"): {_KNN: 79.4, _PROBE: 81.5},
    ("H/14", "MAE-CT"): {_KNN: 79.1, _PROBE: 81.3},
    ("B/16", "MAE-CT_aug"): {_KNN: 73.4, _PROBE: 76.9},
    ("L/16", "MAE-CT_aug"): {_KNN: 79.1, _PROBE: 81.5},
    ("H/16", "MAE-CT_aug"): {_KNN: 79.8, _PROBE: 82.2},
    ("H/14", "MAE-CT_aug"): {_KNN: 78.9, _PROBE: 82.0},
}
_LOWSHOT = {
    ("L/16", "MAE"): (14.3, 34.9, 56.9, 67.7, 79.3),
    ("L/16", "MAE-CT_aug"): (49.6, 59.7, 66.9, 74.2, 80.4),
    ("H/14", "MAE-CT_aug"): (49.4, 59.6, 67.4, 74.4, 81.7),
}
_CLUSTERS = {
    "k-means ACC": 58.0, "mean of runs": 57.1, "NMI": 81.8, "AMI": 69.3, "ARI": 36.8,
    "Dogs-15 k-means ACC": 94.3, "Dogs-15 mean of runs": 87.4, "Dogs-15 NMI": 90.4,
    "Dogs-15 ARI": 87.9,
}  # fmt: skip
NOTE = (
    "Of the low-shot figures that of 10 % is surely of a fine-tuned encoder, that of 1 % probably. "
    "The paper's clusters of ImageNet-1k are those of MAE-CT H/16. How it prepared the features, "
    "and with which model and images it found the clusters of Dogs-15, is not confirmed."
)


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether classes of these names, WordNet ids, are those of ImageNet-1k."""
    return len(classes) == _CLASSES and all(map(_WNID.fullmatch, classes))


def figures(variant: str, patch_size: int) -> dict[str, dict[str, str]]:
    """The rows of the paper for a model, as text by column; none for a model that it lacks."""
    model, rows = f"{variant}/{patch_size}", {}
    for method in ("MAE", "MAE-CT", "MAE-CT_aug"):
        row = dict(_FIGURES.get((model, method), {}))
        row |= zip(_SHOTS, _LOWSHOT.get((model, method), ()), strict=False)
        if (model, method) == ("H/16", "MAE-CT"):
            row |= _CLUSTERS
        if row:
            rows[f"paper, {method} {model}"] = {key: f"{value:.1f}" for key, value in row.items()}
    return rows
