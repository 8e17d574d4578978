"""Figures of the papers to stand beside our own on ImageNet-1k, in percent: of MAE-CT (Lehner et
al., 2023) and of MIM-Refiner (Alkin et al., 2024).

By stage and model, under the names of the columns of `table`.
"""

import re
from collections.abc import Sequence

_CLASSES = 1000
_WNID = re.compile(r"n\d{8}")

_SHOTS = tuple(f"low-shot, {part}" for part in ("1 image", "2 images", "5 images", "1 %", "10 %"))
_COLUMNS = ("k-NN", "linear probe", *_SHOTS)
_FIGURES: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("MAE", "B/16"): (51.1, 66.7),
    ("MAE", "L/16"): (60.6, 75.9, 14.3, 34.9, 56.9, 67.7, 79.3),
    ("MAE", "H/16"): (61.1, 78.0),
    ("MAE", "H/14"): (58.9, 77.2),
    ("MAE-CT", "B/16"): (64.1, 73.5),
    ("MAE-CT", "L/16"): (78.0, 80.2),
    ("MAE-CT", "H/16"): (79.4, 81.5),
    ("MAE-CT", "H/14"): (79.1, 81.3),
    ("MAE-CT_aug", "B/16"): (73.4, 76.9),
    ("MAE-CT_aug", "L/16"): (79.1, 81.5, 49.6, 59.7, 66.9, 74.2, 80.4),
    ("MAE-CT_aug", "H/16"): (79.8, 82.2),
    ("MAE-CT_aug", "H/14"): (78.9, 82.0, 49.4, 59.6, 67.4, 74.4, 81.7),
    ("MIM-Refiner", "H/14"): (None, 83.7),
}
_CLUSTERS = {
    ("MAE-CT", "H/16"): {
        "k-means ACC": 58.0, "mean of runs": 57.1, "NMI": 81.8, "AMI": 69.3, "ARI": 36.8,
        "Dogs-15 k-means ACC": 94.3, "Dogs-15 mean of runs": 87.4, "Dogs-15 NMI": 90.4,
        "Dogs-15 ARI": 87.9,
    },
    ("MIM-Refiner", "H/14"): {"k-means ACC": 64.6},
}  # fmt: skip
NOTE = (
    "Of the low-shot figures that of 10 % is surely of a fine-tuned encoder, that of 1 % probably. "
    "The paper's clusters of ImageNet-1k are those of MAE-CT H/16. How it prepared the features, "
    "and with which model and images it found the clusters of Dogs-15, is not confirmed. Those of "
    "MIM-Refiner are its own paper's."
)


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether classes of these names, WordNet ids, are those of ImageNet-1k."""
    return len(classes) == _CLASSES and all(map(_WNID.fullmatch, classes))


def figures(variant: str, patch_size: int) -> dict[str, dict[str, str]]:
    """The rows of the paper for a model, as text by column; none for a model that it lacks."""
    rows = {}
    for key, values in _FIGURES.items():
        if key[1] == f"{variant}/{patch_size}":
            row = dict(zip(_COLUMNS, values, strict=False)) | _CLUSTERS.get(key, {})
            texts = {name: f"{x:.1f}" for name, x in row.items() if x is not None}
            rows[f"paper, {' '.join(key)}"] = texts
    return rows
