"""Images that are in memory: the packaged ones, and those of an `.npz` file."""

import gzip
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import numpy as np

from maect_jax import files
from maect_jax.data import decode
from maect_jax.errors import BadImageError, UserError

# The packaged images by split. The last two divide the training images: settings are chosen on
# them, so that nothing but a final result ever sees the held-out ones.
FASHION_MNIST = {
    "train": slice(2_000, None),
    "val": slice(2_000),
    "train[:80%]": slice(2_000, 8_400),
    "train[80%:]": slice(8_400, None),
}
_FASHION_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot",
)  # fmt: skip
_CLASSES = 2**20  # so many nobody has
_SPLIT_SEED = 0  # the same split in every run: no stage trains on what another holds out


class Arrays:
    """Pixels in memory: uint8 `[N, H, W, C]`, labels `[N]`."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]):
        self.images, self.labels, self.classes = images, labels, list(classes)
        self.shape = images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, record: int) -> tuple[np.ndarray, int]:
        return self.images[record], int(self.labels[record])

    @property
    def labelled(self) -> bool:
        """Whether all images have a label."""
        return bool((self.labels >= 0).all())

    def name(self, record: int) -> str:
        """What a record is called."""
        return f"image {record}"


def fashion_mnist(split: str) -> Arrays:
    """The packaged images (Xiao et al., 2017): 28 x 28 gray, 8,000 to train on and 2,000 held out.

    They are the 10,000 of the original test split, divided at random by a fixed seed. `split` is
    one of `FASHION_MNIST`.
    """
    folder = resources.files("maect_jax.data") / "fashion_mnist"

    def read(name: str, header: int) -> np.ndarray:
        pixels = gzip.decompress((folder / name).read_bytes())
        return np.frombuffer(pixels, np.uint8, offset=header)

    images = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
    labels = read("t10k-labels-idx1-ubyte.gz", 8)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    chosen = order[FASHION_MNIST[split]]
    return Arrays(images[chosen], labels[chosen], _FASHION_CLASSES)


def npz(path: str, split: str, channels: int) -> Arrays:
    """The images of one size in an `.npz` file, as pixels or encoded.

    The file holds `image` uint8 `[N, H, W]` or `[N, H, W, C]`; or `blob` and `offsets`, image i
    being the encoded file `blob[offsets[i]:offsets[i + 1]]`. Further, where they are known: `label`
    integers `[N]`, `names` of the classes, and `is_test` bool `[N]` for what is held out.

    Args:
      path: of the file.
      split: "train", or "val" for what is held out.
      channels: 1 (gray) or 3 (RGB).

    Raises:
      UserError: there is no such file or split, or it holds something else.
    """
    where = f"config.data.path={path!r}"
    try:
        found = files.read_arrays(path)
    except ValueError as error:
        raise UserError(f"{where}: not a readable .npz file: {error}") from error
    encoded = {"blob", "offsets"} <= found.keys()
    if not encoded and "image" not in found:
        raise UserError(f"{where}: has {', '.join(found)}; `image`, or `blob` and `offsets` needed")
    whole = np.atleast_1d(found.get("image"))
    count = found["offsets"].size - 1 if encoded else len(whole)
    labels = found.get("label", np.full(count, -1))
    held_out = found.get("is_test", np.zeros(count, bool))
    checked = {"label": labels, "is_test": held_out}
    if encoded:
        checked["offsets"] = np.atleast_1d(found["offsets"])[:-1]
    for key, values in checked.items():
        if values.shape != (count,) or values.dtype.kind not in "biu":
            raise UserError(
                f"{where}: `{key}` is {values.dtype} {found[key].shape}; must be whole numbers, "
                f"for {count} images"
            )
    chosen = np.flatnonzero(held_out.astype(bool) == (split == "val"))
    if not len(chosen):
        raise UserError(f"{where}: no image is for {split}, by its `is_test`")
    images = _decoded(found, chosen, channels, where) if encoded else whole[chosen]
    if images.ndim == 3:
        images = images[..., None]
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.size
    if not fits or images.shape[-1] != channels:
        raise UserError(
            f"{where}: `image` is {images.dtype} {images.shape}; must be uint8 [N, H, W, C] with "
            f"{channels} channels"
        )
    if not np.all((labels >= -1) & (labels < _CLASSES)):
        raise UserError(f"{where}: `label` must be from 0 to {_CLASSES:,}, or -1 where not known")
    labels = labels.astype(np.int32)
    names = found.get("names", np.arange(labels.max(initial=-1) + 1).astype(str))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise UserError(f"{where}: `names` is {names.dtype} {names.shape}; must be texts, one each")
    return Arrays(images, labels[chosen], names.tolist())


def _decoded(found: dict, chosen: np.ndarray, channels: int, where: str) -> np.ndarray:
    blob, offsets = found["blob"], found["offsets"]
    if blob.dtype != np.uint8 or blob.ndim != 1:
        raise UserError(f"{where}: `blob` is {blob.dtype} {blob.shape}; must be uint8 [bytes]")

    def one(i: int) -> np.ndarray:
        try:
            return decode.pixels(blob[offsets[i] : offsets[i + 1]].tobytes(), channels)
        except BadImageError as error:
            raise UserError(f"{where}: image {i} cannot be read: {error}") from error

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(one, chosen, chunksize=256))
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise UserError(f"{where}: images of {len(sizes)} sizes; they must be of one")
    return np.stack(images)
