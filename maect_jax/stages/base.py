"""What a stage is: what it reads from its config, trains, saves and hands on to the next."""

import abc
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax import config as configs
from maect_jax import sharding
from maect_jax.config import Rule, Rules, between, not_negative, positive
from maect_jax.data import sources
from maect_jax.data.augment import Photometric, Recipe
from maect_jax.data.loader import TrainRecord
from maect_jax.data.sources import Source
from maect_jax.data.transforms import FIELDS, Crops
from maect_jax.errors import UserError
from maect_jax.models import positions, vit
from maect_jax.stages import optim
from maect_jax.stages.state import TrainState

# Keys of a section that change the colours of gray or RGB images.
_COLOURS = ("photometric.jitter", "photometric.grayscale")
_OF_COLOURS = (*_COLOURS, *(f"local.{key}" for key in _COLOURS), "randaugment")
_PER_VIEW = ("jitter", "blur", "grayscale", "solarize")  # keys of `photometric` with a value a view

Views = tuple[jax.Array, ...]  # normalised `[B, V, H, W, C]`, for each size of views


class Saved:
    """What a run keeps of a trained network, and what is made of it. Has no instances.

    Of the state a run keeps some fields (`saved`). From these come the encoder that is evaluated
    (`encoder_params`) and what the next stage may start from (`handover`): stage `ct` takes the
    encoder, the head and the queue that stage `head` hands on.
    """

    name: ClassVar[str]  # in a run's folder, and of the stage's config section
    title: ClassVar[str]  # for reports and model cards; `{}` is the number of tuned blocks
    row: ClassVar[str]  # what its row of the results holds
    saved: ClassVar[tuple[str, ...]]  # fields that a later stage or an evaluation reads
    exported: ClassVar[tuple[str, ...]] = ()  # further fields, which only an export reads
    encoder_in: ClassVar[tuple[str, ...]] = ("params",)  # fields with parts of the encoder
    hands_on: ClassVar[tuple[str, ...]] = ("encoder",)  # what `handover` gives
    encoder_of: ClassVar[str] = ""  # the stage whose encoder it keeps as it is

    @classmethod
    def encoder_params(cls, parts: Mapping) -> dict:
        """The encoder to evaluate, one stack of blocks, from the saved fields."""
        fields = (parts[field]["encoder"] for field in cls.encoder_in)
        return vit.merge_blocks(functools.reduce(operator.or_, fields))

    @classmethod
    def last_encoder_params(cls, parts: Mapping) -> dict:
        """The encoder as it was last trained, where `encoder_params` is an average."""
        return cls.encoder_params(parts)

    @classmethod
    def with_encoder(cls, encoder: dict) -> dict:
        """The saved fields that hold an encoder from elsewhere: the inverse of `encoder_params`."""
        return {cls.encoder_in[0]: {"encoder": encoder}}

    @classmethod
    def handover(cls, parts: Mapping) -> dict:
        """What the next stage may start from, by name."""
        values = {**parts, **parts["params"], "encoder": cls.encoder_params(parts)}
        return {name: values[name] for name in cls.hands_on}


class ImportedEncoder(Saved):
    """An encoder alone, from a file."""

    name, title, row = "encoder", "imported", "the imported encoder"
    saved = ("params",)


class ImportedProbe(Saved):
    """An encoder with a linear probe on batch-normalised features, from files."""

    name, title, row = "probe", "imported, with a linear probe", "the imported encoder of a probe"
    saved = ("params", "frozen", "batch_stats")
    encoder_in = ("frozen",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Saved, abc.ABC):
    """A training stage.

    The class knows what a stage reads from a config (`check`, `from_config`); an instance has the
    static settings of one run, and pure functions of state and batch, which are jitted.
    """

    number: ClassVar[int]  # from 0; enters the seeds: no stage repeats another's random numbers
    views: ClassVar[int] = 2  # of an image in a batch, of the size of the model's images
    lr_per_view: ClassVar[bool] = True  # whether base rates are of 256 views, or of 256 images
    undecayed: ClassVar[tuple[str, ...]] = optim.UNDECAYED  # parameters without weight decay
    needs_labels: ClassVar[bool] = False
    learns_features: ClassVar[bool] = True  # without labels: then the monitor measures k-NN
    starts_from: ClassVar[tuple[str, ...]] = ()  # stages of another run, the preferred one first
    takes: ClassVar[tuple[str, ...]] = ("encoder",)  # of what that stage hands on
    rules: ClassVar[Rules]  # of its config section

    encoder: vit.ViT
    image_shape: tuple[int, int, int]  # (H, W, C) of a view
    recipes: tuple[Recipe, ...]  # how a batch becomes normalised views: of each size
    groups: Mapping[str, optim.Group]  # how each part of the parameters is optimised
    steps: int  # updates of the whole stage
    warmup: int  # those in which the learning rate rises
    microbatches: int = 1  # parts of a batch that the encoder sees one after the other

    # From the config

    @classmethod
    def by_images(cls, section, images: int, unit: int) -> dict[str, float]:
        """Values for keys that a config leaves at None, by the number of training images.

        Args:
          section: the stage's, whose other keys are kept.
          images: their number.
          unit: what a batch is a multiple of, to be shared by devices and cut into parts.
        """
        return {}

    @classmethod
    def check(cls, config, devices: int) -> None:
        """Checks the stage's section for a number of devices that share a batch. Raises `UserError`
        if a value is not allowed."""
        configs.check(config, cls.name, cls.rules)
        section, channels = configs.flat(config[cls.name]), config.model.channels
        for key in _OF_COLOURS if channels not in (1, 3) else ():
            if np.any(section.get(key, 0)):
                raise UserError(
                    f"config.{cls.name}.{key}={section[key]}: is for gray and RGB images; switch "
                    f"it off for config.model.channels={channels}"
                )
        batch, parts = config[cls.name].batch_size, config.encoder_microbatches
        sharding.check_batch(f"config.{cls.name}.batch_size", batch, devices)
        for views, _ in cls.view_sets(config):
            crops = batch * views.count // devices
            if crops % parts:
                raise UserError(
                    f"config.encoder_microbatches={parts}: must divide the {crops} crops of each "
                    f"device (config.{cls.name}.batch_size={batch}, views: {views.count}, devices: "
                    f"{devices})"
                )

    @classmethod
    def check_taken(cls, before, now, where: str) -> None:
        """Checks that the stage's section `now` fits what it takes over beside the encoder, which
        was made with the section `before`, of a stage that `where` names. Raises `UserError` if
        they differ in what must be the same."""

    @classmethod
    def from_config(cls, config, records: int, classes: int = 0) -> Self:
        """The stage of a config, for `records` training images of so many classes.

        A field with the name of a key of the section takes its value, such as `temperature`; what
        all stages share, and what `_parts` gives, comes before it.
        """
        section, model, data = config[cls.name], config.model, config.data
        per_epoch = cls.updates_per_epoch(config, records)
        steps = section.epochs * per_epoch
        if "warmup_epochs" in section:
            warmup = section.warmup_epochs * per_epoch
        else:
            warmup = warmup_updates(section.warmup_fraction, steps)
        sets = cls.view_sets(config)
        firsts = itertools.accumulate((crops.count for crops, _ in sets), initial=0)
        recipes = tuple(
            Recipe(crops.size, crops.scale, data.mean, data.std, colours, field, first)
            for field, first, (crops, colours) in zip(FIELDS, firsts, sets, strict=False)
        )
        shared = dict(
            encoder=vit.from_config(model, cls.frozen_blocks(config), config.remat),
            image_shape=(*model.image_size, model.channels),
            recipes=recipes,
            steps=steps,
            warmup=warmup,
            microbatches=config.encoder_microbatches,
        )
        fields = {field.name for field in dataclasses.fields(cls)}
        settings = {key: value for key, value in section.items() if key in fields}
        return cls(**settings | shared | cls._parts(config, steps, classes))

    @classmethod
    def view_sets(cls, config) -> tuple[tuple[Crops, tuple[Photometric, ...]], ...]:
        """The views of an image, those of each size: their crops, and the colours of each view."""
        section = config[cls.name]
        colours = section.photometric.to_dict() if "photometric" in section else {}
        photometric = tuple(
            Photometric(**{k: v[view] if k in _PER_VIEW else v for k, v in colours.items()})
            for view in range(cls.views)
        )
        return ((Crops(config.model.image_size, section.crop_scale, cls.views), photometric),)

    @classmethod
    def views_of_image(cls, config) -> int:
        """How many views of an image a batch has, of all sizes."""
        return sum(crops.count for crops, _ in cls.view_sets(config))

    @classmethod
    def for_images(cls, config, images: Source) -> Self:
        """The stage of a config, for its own training images (`own_images`)."""
        classes = images.num_classes if cls.needs_labels else 0
        return cls.from_config(config, len(images), classes)

    @classmethod
    @abc.abstractmethod
    def _parts(cls, config, steps: int, classes: int) -> dict[str, Any]:
        """Fields of a stage that are not plain values of its section: networks, `groups`."""

    @classmethod
    def _group(cls, config, prefix: str = "", layer_decay: float = 1.0) -> optim.Group:
        """The optimiser's settings that the keys `<prefix>base_lr` and so on of a section give."""
        section = config[cls.name]
        return optim.Group(
            lr=optim.scaled_lr(section[f"{prefix}base_lr"], section.batch_size, cls._lr_views()),
            weight_decay=section[f"{prefix}weight_decay"],
            layer_decay=layer_decay,
            depth=vit.size_of(config.model).depth,
            end_lr=section.get("end_lr", 0.0),
            undecayed=cls.undecayed,
        )

    @classmethod
    def _lr_views(cls) -> int:
        """Views of an image that count as samples in a base rate."""
        return cls.views if cls.lr_per_view else 1

    @classmethod
    def own_images(cls, config, images: Mapping[str, Source]) -> Mapping[str, Source]:
        """Those of the images that the stage sees, by split."""
        return images

    @classmethod
    def example_maker(
        cls, config, images: Source, make: type[TrainRecord] = TrainRecord, **settings
    ) -> TrainRecord:
        """What makes the training examples of the stage from its images."""
        return make(
            source=images,
            decoding=sources.decoding(config),
            crops=tuple(crops for crops, _ in cls.view_sets(config)),
            seed=(config.seed, cls.number),
            scaled_jpeg=config.data.scaled_jpeg,
            **settings,
        )

    @classmethod
    def updates_per_epoch(cls, config, records: int) -> int:
        """Whole batches in an epoch; the rest of the images waits for the next shuffle."""
        return records // config[cls.name].batch_size

    @classmethod
    def frozen_blocks(cls, config) -> int:
        """How many of the encoder's first blocks the stage leaves as they are."""
        return 0

    @classmethod
    def tuned_blocks(cls, config) -> int:
        """How many of the encoder's blocks are trained."""
        return vit.size_of(config.model).depth - cls.frozen_blocks(config)

    # Inside the step

    def optimizer(self, params):
        """AdamW for the trained parameters."""
        return optim.adamw(params, self.groups, self.steps, self.warmup)

    @abc.abstractmethod
    def init(self, key: jax.Array, start: dict) -> TrainState:
        """The first state. What `start` does not hold is initialised at random."""

    def _init_state(self, rng: jax.Array, params: dict, **parts) -> TrainState:
        """The state at step 0 with fresh moments; fields that are not given are empty."""
        moments = self.optimizer(params).init(params)
        return TrainState(step=jnp.int32(0), params=params, opt_state=moments, rng=rng, **parts)

    @abc.abstractmethod
    def loss(
        self, params, state: TrainState, views: Views, batch: dict, key: jax.Array
    ) -> tuple[jax.Array, tuple[dict, dict]]:
        """`(loss, (metrics, aux))` of the views of a batch.

        The gradient is with respect to `params`, which are those of the state. Metrics are scalars;
        `aux` is for `update_buffers`.
        """

    def update_buffers(self, state: TrainState, aux: dict, finite: jax.Array) -> TrainState:
        """What follows the optimiser: averages, statistics, queue; nothing unless overridden.

        If the step is not `finite`, the state is restored afterwards, except for the queue.
        """
        return state

    @abc.abstractmethod
    def snapshot(self, state: TrainState, images: jax.Array, ids: jax.Array) -> dict:
        """What the stage makes of some images uint8 `[Q, H, W, C]`, for the report."""

    @abc.abstractmethod
    def flops_per_step(self, batch_size: int) -> int:
        """FLOPs of one update on the global batch, by formula (`block_flops`)."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in (rows, columns)."""
        return positions.grid(self.image_shape[:2], self.encoder.patch_size)

    @property
    def _patches(self) -> int:
        return math.prod(self.grid)

    @property
    def _patch_pixels(self) -> int:
        return self.encoder.patch_size**2 * self.image_shape[2]

    def _encoder_flops(self, patches: int) -> int:
        """Forward pass over `patches` patches of a view: their embedding, and all blocks."""
        encoder = self.encoder
        blocks = block_flops(encoder.depth, encoder.width, patches + encoder.extra_tokens)
        return 2 * patches * self._patch_pixels * encoder.width + blocks


def multiple(batch: int, unit: int) -> int:
    """The batch, or a little less: a multiple of `unit` above 0."""
    return max(batch // unit, 1) * unit


def warmup_updates(fraction: float, steps: int) -> int:
    """`floor(fraction * steps)`, of the fraction as it is written: 0.29 of 100 is 29, not 28."""
    return int(round(fraction * steps, 6))


def block_flops(depth: int, width: int, tokens: int) -> int:
    """Forward pass of `depth` transformer blocks over one image of `tokens` tokens.

    Here and in each stage: two for a multiplication and an addition; matrix products only, as all
    else is below one percent. A backward pass costs twice its forward pass.
    """
    linear = 12 * width**2  # qkv 3, projection 1, MLP 8
    attention = 2 * tokens * width  # scores and weighted sum
    return 2 * depth * tokens * (linear + attention)


def over_microbatches(encode: Callable[..., jax.Array], parts: int, *rows: jax.Array) -> jax.Array:
    """Computes `encode(*rows)` in `parts` sequential microbatches; equal up to rounding.

    An encoder has no batch statistics, so the features of a batch are those of its parts. What the
    backward pass needs of a part is computed again when its turn comes (the idea of GradCache, Gao
    et al., 2021, inside one compiled step), while the head sees the whole batch. Rows are arrays
    `[B, ...]`, of which each device must hold a multiple of `parts`.
    """
    if parts == 1:
        return encode(*rows)

    def split(x):
        # [B] -> [B / parts, parts] keeps every row on its device; [parts, B / parts] moves them.
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain_batch(x, axis=1)

    # Frozen blocks have no backward pass: what they computed is kept, as it is not large.
    policy = jax.checkpoint_policies.save_only_these_names(vit.FROZEN)
    once = jax.checkpoint(encode, policy=policy, prevent_cse=False)
    _, outputs = jax.lax.scan(lambda _, part: ((), once(*part)), (), tuple(map(split, rows)))
    return sharding.constrain_batch(outputs.swapaxes(0, 1).reshape(-1, *outputs.shape[2:]))


# Rules that several sections share


def _range(most: int) -> Rule:
    return Rule(
        f"(low, high) with 0 < low <= high <= {most}",
        lambda v, _: len(v) == 2 and 0 < v[0] <= v[1] <= most,
    )


CROP_SCALE = _range(1)
TRAINING: Rules = {
    "batch_size": positive,
    "epochs": positive,
    "base_lr": positive,
    "weight_decay": not_negative,
    "crop_scale": CROP_SCALE,
}
WARMUP_EPOCHS = Rule("from 0 to the {epochs} epochs", lambda v, section: 0 <= v <= section.epochs)


def photometric(key: str, probability: Rule) -> Rules:
    """Of a subsection `key` with colours; `probability` of what may happen to a view."""
    rules = {
        "solarize_threshold": not_negative,
        "brightness": between(0, 1),
        "contrast": between(0, 1),
        "saturation": between(0, 1),
        "hue": between(0, 0.5),
        "blur_sigma": _range(2),
        **dict.fromkeys(_PER_VIEW, probability),
    }
    return {f"{key}.{name}": rule for name, rule in rules.items()}


_PROBABILITIES = Rule(
    f"{Stage.views} probabilities, one for each view",
    lambda v, _: len(v) == Stage.views and all(0 <= p <= 1 for p in v),
)
PHOTOMETRIC = photometric("photometric", _PROBABILITIES)
