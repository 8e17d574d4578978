"""Features, and classes, for people who want nothing else: `load_encoder`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from maect_jax import files, sharding
from maect_jax.convert import importing
from maect_jax.data import augment, sources
from maect_jax.errors import UserError
from maect_jax.evals.classifier import linear_classifier
from maect_jax.models import positions, vit
from maect_jax.run import lineage
from maect_jax.stages import SAVED

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Classifier(NamedTuple):
    """A linear classifier on features: kernel fp32 `[D, C]`, bias `[C]`, names of the C classes."""

    kernel: np.ndarray
    bias: np.ndarray
    classes: Sequence[str]


class Classified(NamedTuple):
    """The classes of B images.

    Attributes:
      names: of the most likely class of each.
      probabilities: of all classes, in the order of `Encoder.classes`, fp32 `[B, C]`.
    """

    names: list[str]
    probabilities: np.ndarray


class Encoder:
    """A trained encoder: call it with images to get features.

    Attributes:
      classes: the names of the classes that `classify` tells apart, or their numbers where they
        have no names; empty without a classifier.
      image_size: (H, W) of the images.
      channels: C.
      mean, std: of each channel, of pixels from 0 to 1; images are normalised by them.
      pool: what the feature is, "cls", "mean" or "fc_norm" (`vit.features`).
      width: D of a feature.
    """

    def __init__(
        self,
        model: vit.ViT,
        params: Mapping,
        image_size: tuple[int, int],
        *,
        channels: int,
        pool: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        classifier: Classifier | None,
    ):
        self.classes = list(classifier.classes) if classifier else []
        self._classifier = classifier
        self.image_size, self.channels, self.pool = image_size, channels, pool
        self.mean, self.std = mean, std
        self._params = params

        def encode(params, images):
            images = augment.normalise_pixels(images, self.mean, self.std)
            return vit.features(model, params, images, pool)

        self._encode = jax.jit(encode)
        images = jax.ShapeDtypeStruct((1, *self.image_size, channels), np.uint8)
        self.width: int = jax.eval_shape(self._encode, params, images).shape[1]

    def __call__(self, images: ArrayLike) -> jax.Array:
        """Features fp32 `[B, D]` of images `[B, H, W, C]`, jitted for each B.

        Args:
          images: uint8 from 0 to 255, or floating point from 0 to 1; not normalised.

        Raises:
          ValueError: there are none, or they have another shape, dtype or range. To see the range
            of floats that lie on a device it waits for them.
        """
        images = augment.checked(images, (*self.image_size, self.channels))
        return self._encode(self._params, images)

    def classify(self, images: ArrayLike) -> Classified:
        """The classes of images, which are as `__call__` takes them.

        Raises:
          ValueError: as `__call__` does; or there is no classifier on this feature.
        """
        if self._classifier is None:
            raise ValueError(
                f"no classifier on the feature {self.pool!r}: fine-tune the encoder with labels "
                "(the config finetune_my_images), and load that run, with its own pool"
            )
        kernel, bias, classes = self._classifier
        # By default a TPU rounds the inputs of a matmul to bf16.
        scores = jnp.matmul(self(images), kernel, precision="highest") + bias
        probabilities = np.asarray(jax.nn.softmax(scores))
        return Classified([classes[i] for i in probabilities.argmax(1)], probabilities)


def load_encoder(
    where: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    pool: str | None = None,
    dtype: str = "float32",
    heads: int | None = None,
    ln_eps: float | None = None,
    key: str | None = None,
) -> Encoder:
    """Loads the encoder of a run (of its last stage; of ct and refine the average), or of a
    PyTorch, safetensors or HuggingFace file, onto the first device; with its classifier, if it has
    one.

    Args:
      where: the folder of a run, or what `maect import` takes, such as "hf://ORG/NAME".
      image_size: (H, W) of the images, by default those it was trained for; for another size its
        position embedding is resized.
      mean, std: of each channel of pixels from 0 to 1; by default the run's, the file's, or
        ImageNet's if a file has none.
      pool: "cls", "mean" or "fc_norm"; by default the model's own.
      dtype: of the activations, "float32" or "bfloat16".
      heads, ln_eps: what a file of an unusual width does not say.
      key: which model of a file with several, such as "teacher" or "state_dict_ema".

    Raises:
      UserError: there is no such run or file, or it cannot be read.
    """
    if image_size is not None:
        sides = tuple(int(side) for side in np.ravel(image_size))
        if len(sides) != 2:
            raise UserError(f"image_size={sides}: must be (height, width)")
        image_size = sides
    for name, value, options in (("pool", pool, vit.POOLS), ("dtype", dtype, vit.DTYPES)):
        if value not in (None, *options):
            raise UserError(f"{name}={value!r}: must be one of {', '.join(options)}")
    where = ",".join(map(files.expanded, str(where).split(",")))
    if importing.is_file(where):
        overrides = importing.Overrides(heads=heads, ln_eps=ln_eps, image_size=image_size, key=key)
        saved: lineage.Saved = lineage.SavedFiles(where, overrides)
    elif heads or ln_eps or key:
        raise UserError(f"{where}: heads, ln_eps and key are for files; a run has its own")
    else:
        allowed = "the folder of a run, a file of weights, or hf://ORG/NAME"
        saved = lineage.trained_stage(Path(where), (), where=where, allowed=allowed)
    model, data = saved.config.model, saved.config.get("data", {})
    size = image_size or model.image_size
    if any(side < 1 or side % model.patch_size for side in size):
        raise UserError(f"image_size={size}: must be multiples of the patch, {model.patch_size}")
    vit.check_pool(model, "pool", pool or model.pool)
    mean, std = (
        tuple(float(x) for x in np.ravel(data.get(key, _IMAGENET[key]) if given is None else given))
        for key, given in (("mean", mean), ("std", std))
    )
    if not len(mean) == len(std) == model.channels:
        raise UserError(f"{where}: give the mean and std of its {model.channels} channels")
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    parts = saved.read(mesh)
    params = SAVED[saved.stage].encoder_params(parts)
    old, new = (positions.grid(s, model.patch_size) for s in (model.image_size, size))
    params = positions.fitted(params, old, new, rotary=model.rope_theta is not None)
    params = jax.device_put(params, jax.local_devices()[0])
    module = vit.from_config(model).clone(dtype=dtype)
    classifier = None
    if pool in (None, model.pool) and (layer := linear_classifier(saved, parts)):
        kernel, bias = layer
        names = [sources.class_name(saved.classes, i) for i in range(len(bias))]
        classifier = Classifier(kernel, bias, names)
    return Encoder(
        module, params, size, channels=model.channels, pool=pool or model.pool, mean=mean, std=std,
        classifier=classifier,
    )  # fmt: skip
