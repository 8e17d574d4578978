"""Images in memory: the packaged ones, and those of an `.npz` file."""

import gzip
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib import resources

import numpy as np

from maect_jax import files
from maect_jax.data import decode, values
from maect_jax.data.base import Identity, Source, digest
from maect_jax.data.decode import Decoding
from maect_jax.errors import BadImageError, UserError

# The packaged images by split. The last two divide the training images: settings are chosen on
# them, so that only a final result uses the held-out images.
FASHION_MNIST = {
    "train": slice(2_000, None),
    "val": slice(2_000),
    "train[:80%]": slice(2_000, 8_400),
    "train[80%:]": slice(8_400, None),
}
_FASHION_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot",
)  # fmt: skip
_MAX_CLASSES = 2**20  # more than any data set has
_SPLIT_SEED = 0  # the same split in every run: no stage trains on what another holds out


class Arrays(Source):
    """Pixels in memory: uint8 `[N, H, W, C]`, labels `[N]`."""

    in_memory = True

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]):
        self.images, self.labels, self.classes = images, labels, list(classes)
        self.shape = images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, record: int) -> tuple[np.ndarray, int]:
        return self.images[record], int(self.labels[record])

    @cached_property
    def identity(self) -> Identity:
        kind = f"{self.images.shape} {self.classes}".encode()
        return Identity(len(self), digest(kind, self.images, self.labels))


def fashion_mnist(split: str) -> Arrays:
    """The packaged images (Xiao et al., 2017): 28 x 28 gray, 8,000 to train on and 2,000 held out.

    They are the 10,000 of the original test split, divided at random. `split` is one of
    `FASHION_MNIST`.
    """
    folder = resources.files("maect_jax.data") / "fashion_mnist"

    def read(name: str, header: int) -> np.ndarray:
        content = gzip.decompress((folder / name).read_bytes())
        return np.frombuffer(content, np.uint8, offset=header)

    images = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
    labels = read("t10k-labels-idx1-ubyte.gz", 8)
    records = np.random.default_rng(_SPLIT_SEED).permutation(len(images))[FASHION_MNIST[split]]
    return Arrays(images[records], labels[records], _FASHION_CLASSES)


def npz(path: str, split: str, decoding: Decoding) -> Arrays:
    """The images of one size in an `.npz` file, as pixels or encoded.

    The file holds `image` `[N, H, W]` or `[N, H, W, C]`, uint8 or numbers that
    `decoding.range` makes uint8; or `blob` and `offsets`, image i being the encoded file
    `blob[offsets[i]:offsets[i + 1]]`. Optional are `label` integers `[N]`, `names` of the classes,
    and `is_test` bool `[N]`, which marks the images of the split "val"; the others are of "train".

    Raises:
      UserError: there is no such file or split, or its arrays are others.
    """
    where = f"config.data.path={path!r}"

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise UserError(f"{where}: {message}")

    try:
        content = files.read_arrays(path)
    except ValueError as error:
        raise UserError(f"{where}: not a readable .npz file: {error}") from error
    encoded = {"blob", "offsets"} <= content.keys()
    needed = "must have `image`, or `blob` and `offsets`"
    require(encoded or "image" in content, f"has {', '.join(content)}; {needed}")
    images = np.atleast_1d(content["blob" if encoded else "image"])
    count = content["offsets"].size - 1 if encoded else len(images)
    labels = content.get("label", np.full(count, -1))
    held_out = content.get("is_test", np.zeros(count, bool))
    starts = np.atleast_1d(content["offsets"])[:-1] if encoded else np.arange(count)
    for key, numbers in {"label": labels, "is_test": held_out, "offsets": starts}.items():
        fits = numbers.shape == (count,) and numbers.dtype.kind in "biu"
        kind = _kind(content.get(key, numbers))
        require(fits, f"`{key}` is {kind}; must be integers, for {count} images")
    records = np.flatnonzero(held_out.astype(bool) == (split == "val"))
    require(len(records) > 0, f"has no image for {split}, by its `is_test`")
    if encoded:
        is_file = images.dtype == np.uint8 and images.ndim == 1
        require(is_file, f"`blob` is {_kind(images)}; must be uint8 [bytes]")
        is_colour = decoding.channels in (1, 3)
        require(is_colour, f"config.model.channels={decoding.channels}: must be 1 or 3 for files")
        encoded_images = _Encoded(path, images, content["offsets"], records)
        values.check([encoded_images], decoding)

        def decoded(i: int) -> np.ndarray:
            try:
                return decode.pixels(encoded_images[i][0], decoding)
            except BadImageError as error:
                raise UserError(f"{where}: image {records[i]} cannot be read: {error}") from error

        with ThreadPoolExecutor() as pool:
            pixels = list(pool.map(decoded, range(len(records))))
        sizes = {image.shape for image in pixels}
        require(len(sizes) == 1, f"has images of {len(sizes)} sizes; they must have one size")
        images = np.stack(pixels)
    else:
        images = images[records]
        images = images[..., None] if images.ndim == 3 else images
    fits = images.dtype.kind in "iuf" and images.ndim == 4 and images.size > 0
    wanted = f"uint8 [N, H, W, C] with {decoding.channels} channels"
    fits = fits and images.shape[-1] == decoding.channels
    require(fits, f"`image` is {_kind(images)}; must be {wanted} (config.model.channels)")
    images = values.to_uint8(f"{where}: `image` is {_kind(images)}", images, decoding.range)
    known = bool(np.all((labels >= -1) & (labels < _MAX_CLASSES)))
    require(known, f"`label` must be from 0 to {_MAX_CLASSES:,}, or -1 for none")
    labels = labels.astype(np.int32)
    names = content.get("names", np.arange(labels.max(initial=-1) + 1).astype(str))
    is_text = names.ndim == 1 and names.dtype.kind == "U"
    require(is_text, f"`names` is {_kind(names)}; must be text, one for each class")
    return Arrays(images, labels[records], names.tolist())


class _Encoded(Source):
    """Some of the encoded images of an `.npz` file, without their labels."""

    def __init__(self, path: str, blob: np.ndarray, offsets: np.ndarray, records: np.ndarray):
        self.path, self.blob, self.records = path, blob, records
        self.bounds = np.stack([offsets[:-1], offsets[1:]], axis=1)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[bytes, int]:
        start, end = self.bounds[self.records[record]]
        return self.blob[start:end].tobytes(), -1

    def name(self, record: int) -> str:
        return f"{self.path}, image {self.records[record]}"


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"
