"""Which copies of photographs a cosine finds, in the features of a run, and which outliers.

    python -m benchmarks.copies RUN IMAGES      # a folder with JPEG files, and folders of these

Each photograph is changed and encoded again. Then images of other kinds are put among them.
"""

import io
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageEnhance

from maect_jax import config as configs
from maect_jax import load_encoder, sharding
from maect_jax.data import arrays, transforms
from maect_jax.evals import knn, near

_COSINES = (0.95, 0.97, 0.98, 0.99, 0.995)
_BATCH = 100


def saved(image: Image.Image, quality: int = 90) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def cropped(image: Image.Image, fraction: float) -> Image.Image:
    x, y = (round(side * fraction / 2) for side in image.size)
    return image.crop((x, y, image.width - x, image.height - y))


CHANGES = {
    "saved with quality 50": lambda image: saved(image, 50),
    "half the size": lambda image: saved(image.resize((image.width // 2, image.height // 2))),
    "cropped by 5 %": lambda image: saved(cropped(image, 0.05)),
    "cropped by 10 %": lambda image: saved(cropped(image, 0.1)),
    "brighter by 10 %": lambda image: saved(ImageEnhance.Brightness(image).enhance(1.1)),
    "mirrored": lambda image: saved(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
}


def others(size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Images of other kinds, uint8 `[n, H, W, 3]`."""
    clothes = arrays.fashion_mnist("val").images[:10, ..., 0]
    pictures = [Image.fromarray(x).convert("RGB").resize(size[::-1]) for x in clothes]
    noise = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    plain = {"black": (0, 0, 0), "white": (255, 255, 255), "blue": (0, 0, 255)}
    found = {name: np.full((1, *size, 3), colour, np.uint8) for name, colour in plain.items()}
    return found | {"noise": noise, "clothes": np.stack([np.asarray(x) for x in pictures])}


def main(run: str, folder: str) -> None:
    encoder, data = load_encoder(run), configs.read(Path(run) / "config.json").data
    photographs = [Image.open(p).convert("RGB") for p in sorted(Path(folder).rglob("*.jpg"))]

    def encoded(change=lambda image: image) -> np.ndarray:
        crops = [
            transforms.centre_crop(np.asarray(change(image)), data.short_side, encoder.image_size)
            for image in photographs
        ]
        parts = [crops[i : i + _BATCH] for i in range(0, len(crops), _BATCH)]
        return np.concatenate([encoder(np.stack(part)) for part in parts])

    x = encoded()
    rows = near.centred(x)
    for name, change in CHANGES.items():
        cosines = (rows[:] * rows.prepare(encoded(change))).sum(1)
        print(f"{name:24}", *(f"{(cosines >= c).mean():7.1%} ({c})" for c in _COSINES), flush=True)
    pairs = (rows[:] @ rows[:].T)[np.triu_indices(len(x), 1)]
    print(f"{'pairs of no copies':24}", *(f"{(pairs >= c).sum():7} ({c})" for c in _COSINES))
    mesh = sharding.make_mesh()
    for name, images in others(encoder.image_size).items():
        both = np.concatenate([x, encoder(images)])
        with jax.set_mesh(mesh):
            outlier = near.outliers(near.nearest(knn.Search(mesh, 256), near.centred(both), 0)[1])
        found = outlier[len(x) :].sum()
        print(
            f"{name:24} outliers: {found} of {len(images)}, photographs: {outlier[: len(x)].sum()}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
