"""Stages 2 and 3: nearest-neighbour contrastive learning (NNCLR) on an MAE's encoder.

Stage 2 (`head`) trains projector and predictor on the frozen encoder. Stage 3 (`ct`) also tunes
the encoder's upper blocks, looks its neighbours up with an averaged projector, and averages the
encoder. What the two share is `NNCLR`, and what they share with MIM-Refiner (`refiner`).
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from maect_jax import config as configs
from maect_jax.config import Rule, at_most, between, fraction, not_negative, positive
from maect_jax.data import augment
from maect_jax.data.sources import IMAGENET_TRAIN
from maect_jax.errors import UserError
from maect_jax.models import nnclr, positions, vit
from maect_jax.stages import base, losses, optim, support_queue
from maect_jax.stages.base import Stage, Views, over_microbatches
from maect_jax.stages.state import TrainState
from maect_jax.stages.support_queue import Queue

_SNAPSHOT_NEIGHBOURS = 3
# Where a config leaves them open (`NNCLR.by_images`):
_BATCHES, _BATCHES_PER_EPOCH = (32, 256), 16
_EPOCHS = 20  # the paper's, for the training images of ImageNet
_LARGEST_QUEUE = 8192
_PEAK, _MOST = 1e-3, 20.0  # learning rate, and its product with the number of updates
_SIZES = ("projector_hidden", "projector_out", "predictor_hidden", "queue_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NNCLR(Stage):
    """A contrastive head on an encoder, with a queue of past projections."""

    saved: ClassVar[tuple[str, ...]] = ("params", "frozen", "batch_stats", "queue")
    hands_on: ClassVar[tuple[str, ...]] = (
        "encoder", "projector", "predictor", "batch_stats", "queue",
    )  # fmt: skip
    rules: ClassVar[configs.Rules] = base.TRAINING | base.PHOTOMETRIC | {
        **dict.fromkeys((*_SIZES, "temperature"), positive),
        "batch_size": Rule(
            "above 1, as the negatives of an image are the others of its batch",
            lambda v, section: v > 1 and positive.holds(v, section),
        ),
        "top_k": Rule(
            "above 0, and at most the queue size, {queue_size}",
            lambda v, section: 0 < v <= section.queue_size,
        ),
    }  # fmt: skip
    # Keys of a section that must stay from the stage that makes a head to the one that takes it
    # over, and the name of the first of these.
    head_keys: ClassVar[tuple[str, ...]] = _SIZES
    head_stage: ClassVar[str] = ""
    together: ClassVar[bool] = False  # whether BatchNorm sees all views together, or one by one
    measured_views: ClassVar[int] = 1  # whose neighbours count in `nn_accuracy`

    projector: nnclr.Projector
    predictor: nnclr.Predictor
    pool: str  # how tokens become a feature (`vit.features`)
    batch_size: int
    queue_size: int
    top_k: int  # neighbours to find, of which one is drawn
    temperature: float
    blocks: tuple[int, ...] = ()  # behind which there is a head, beside that on the final feature

    @classmethod
    def by_images(cls, section, images: int, unit: int) -> dict[str, float]:
        """Fewer images: smaller batches, more epochs, a shorter queue (docs/recipe.md). The peak of
        the learning rate does not depend on the batch."""
        few, many = _BATCHES
        power = 2 ** round(math.log2(images / _BATCHES_PER_EPOCH + 1))
        batch = section.batch_size or base.multiple(min(max(power, few), many), unit)
        epochs = section.epochs or round(_EPOCHS * (IMAGENET_TRAIN / images) ** 0.25)
        updates = max(epochs * (images // batch), 1)
        peak = min(_PEAK, _MOST / updates)
        base_lr = float(f"{peak / optim.scaled_lr(1.0, batch, cls._lr_views()):.3g}")
        return {
            "batch_size": batch,
            "epochs": epochs,
            "queue_size": min(max(images // 2, few), _LARGEST_QUEUE),
            "base_lr": base_lr,
            "head_base_lr": base_lr,
        }

    @classmethod
    def check(cls, config, devices: int) -> None:
        super().check(config, devices)
        if cls.head_stage in config.stages:
            before, now = config[cls.head_stage], config[cls.name]
            cls.check_taken(before, now, f"config.{cls.head_stage}")

    @classmethod
    def check_taken(cls, before, now, where: str) -> None:
        for key in cls.head_keys:
            if before[key] != now[key]:
                raise UserError(
                    f"config.{cls.name}.{key}={now[key]!r}: must be {before[key]!r}, as in {where}"
                )

    @classmethod
    def _parts(cls, config, steps: int, classes: int) -> dict:
        section, model, group = config[cls.name], config.model, cls._group(config)
        out, dtype = section.projector_out, model.dtype
        return dict(
            projector=nnclr.Projector(section.projector_hidden, out, dtype),
            predictor=nnclr.Predictor(section.predictor_hidden, out, dtype),
            pool=model.pool,
            groups={"projector": group, "predictor": group},
        )

    def _split(self, encoder: dict) -> tuple[dict, dict]:
        """Whole encoder parameters as `(trained, frozen)`."""
        return {}, encoder

    def _new_head(self, projector_key: jax.Array, predictor_key: jax.Array) -> dict:
        """`projector`, `predictor` and `batch_stats` at random."""
        features = jnp.zeros((2, self.encoder.width))
        projected = jnp.zeros((2, self.projector.out))
        projector = self.projector.init(projector_key, features, train=True)
        predictor = self.predictor.init(predictor_key, projected, train=True)
        made = {"projector": projector, "predictor": predictor}
        stats = {name: variables["batch_stats"] for name, variables in made.items()}
        return {name: variables["params"] for name, variables in made.items()} | {
            "batch_stats": stats
        }

    def _new_queue(self, key: jax.Array) -> Queue:
        return support_queue.init(key, self.queue_size, self.batch_size, self.projector.out)

    def _rebatched(self, queue: Queue) -> Queue:
        return support_queue.rebatch(queue, self.queue_size, self.batch_size)

    def init(self, key: jax.Array, start: dict) -> TrainState:
        """`start` may hold `encoder` (whole, one stack of blocks), `projector`, `predictor`,
        `batch_stats` and `queue`."""
        encoder_key, projector_key, predictor_key, queue_key, rng = jax.random.split(key, 5)
        whole, images = self.encoder.clone(frozen_blocks=0), jnp.zeros((1, *self.image_shape))
        encoder = start.get("encoder") or whole.init(encoder_key, images)["params"]
        trained, frozen = self._split(encoder)
        first = self._new_head(projector_key, predictor_key) | start
        params = {part: first[part] for part in ("projector", "predictor")}
        params |= {"encoder": trained} if trained else {}
        before = start.get("queue")
        queue = self._rebatched(before) if before else self._new_queue(queue_key)
        buffers = dict(frozen={"encoder": frozen}, batch_stats=first["batch_stats"], queue=queue)
        return self._init_state(rng, params, **buffers)

    def features(
        self, params: dict, frozen: dict, views: Views, microbatches: int = 1
    ) -> jax.Array:
        """Features `[B, V, K + 1, D]` of all views: those behind `blocks`, and the final one."""
        encoder = {**frozen["encoder"], **params.get("encoder", {})}
        found, rotary = [], self.encoder.rope_theta is not None
        for x in views:
            grid = positions.grid(x.shape[2:4], self.encoder.patch_size)
            fitted = positions.fitted(encoder, self.grid, grid, rotary=rotary)
            of = partial(vit.block_features, self.encoder, fitted, how=self.pool)
            encode = partial(of, blocks=self.blocks)
            y = over_microbatches(encode, microbatches, x.reshape(-1, *x.shape[2:]))
            found.append(y.reshape(*x.shape[:2], *y.shape[1:]))
        return jnp.concatenate(found, axis=1)

    def head(self, params: dict, batch_stats: dict, target: dict, features: jax.Array):
        """Runs a head on the features `[B, V, D]` of all views, with batch statistics.

        The neighbours are looked up with the projections of `target`, or, if it is empty, with the
        projector's own.

        Returns:
          Normalised rows for the look-up `[B, V, out]` without gradient, predictions
          `[B, V, out]`, and the new running statistics.
        """
        projected, predicted, stats = [], [], dict(batch_stats)

        def run(name, module, x):
            variables = {"params": params[name], "batch_stats": stats[name]}
            y, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
            stats[name] = new["batch_stats"]
            return y

        batch, views, width = features.shape
        parts = features.reshape(1, -1, width) if self.together else features.swapaxes(0, 1)
        for x in parts:
            z = run("projector", self.projector, x)
            predicted.append(run("predictor", self.predictor, z))
            if target:  # the running statistics are not read in training
                variables = {"params": target["projector"], "batch_stats": stats["projector"]}
                z = self.projector.apply(variables, x, train=True)
            projected.append(jax.lax.stop_gradient(support_queue.normalise(z)))

        def by_image(rows):
            return rows[0].reshape(batch, views, -1) if self.together else jnp.stack(rows, 1)

        return by_image(projected), by_image(predicted), stats

    def _contrast(self, head: dict, features: jax.Array, batch: dict, key: jax.Array):
        """The loss of one head, its `nn_accuracy`, and what else the step knows of it.

        Args:
          head: `params` of projector and predictor, `batch_stats`, `target`, `queue`.
          features: of all views `[B, V, D]`.
          batch: `index` and `label` of the images, `[B]`.
          key: draws the neighbours.
        """
        projected, predicted, stats = self.head(
            head["params"], head["batch_stats"], head["target"], features
        )
        projected = projected[:, : self.views]  # local ones are not looked up
        queries = projected.reshape(-1, self.projector.out)
        with jax.named_scope("queue"):
            sizes = dict(size=self.queue_size, k=self.top_k)
            ids = jnp.repeat(batch["index"], self.views)
            found = support_queue.nearest(head["queue"], queries, ids, **sizes)
            chosen = support_queue.choose(found, key)
            rows, labels = support_queue.take(head["queue"], chosen)
        loss = self._loss(projected, rows.reshape(projected.shape), predicted)
        known = (batch["label"] >= 0)[:, None]
        measured = labels.reshape(-1, self.views)[:, : self.measured_views]
        hits = (measured == batch["label"][:, None]) & known
        accuracy = hits.sum() / jnp.maximum(known.sum() * self.measured_views, 1)
        chosen = chosen.reshape(-1, self.views)
        aux = dict(batch_stats=stats, projected=projected, predicted=predicted, positions=chosen)
        return loss, accuracy, aux

    def _loss(self, projected: jax.Array, neighbours: jax.Array, predicted: jax.Array):
        """The symmetric NNCLR loss of unit vectors `[B, 2, out]` and predictions `[B, 2, out]`."""
        del projected
        both = (
            losses.nearest_neighbour(neighbours[:, 0], predicted[:, 1], self.temperature)
            + losses.nearest_neighbour(neighbours[:, 1], predicted[:, 0], self.temperature)
        )  # fmt: skip
        return both / 2

    def loss(self, params, state: TrainState, views: Views, batch: dict, key: jax.Array):
        """That of the head."""
        features = self.features(params, state.frozen, views, self.microbatches)[:, :, 0]
        head = dict(
            params=params, batch_stats=state.batch_stats, target=state.target, queue=state.queue
        )
        loss, accuracy, aux = self._contrast(head, features, batch, key)
        aux |= dict(ids=batch["index"], labels=batch["label"])
        return loss, ({"nn_accuracy": accuracy}, aux)

    def _push(self, queue: Queue, rows: jax.Array, aux: dict, keep: jax.Array) -> Queue:
        return support_queue.push(queue, rows, aux["ids"], aux["labels"], keep=keep)

    def update_buffers(self, state: TrainState, aux: dict, finite: jax.Array) -> TrainState:
        """Running statistics; view 0 enters the queue."""
        assert state.queue is not None
        with jax.named_scope("queue"):
            rows = aux["projected"][..., 0, :]
            queue = self._push(state.queue, rows, aux, keep=finite)
        return state.replace(batch_stats=aux["batch_stats"], queue=queue)

    def _final_head(self, state: TrainState) -> tuple[dict, Queue]:
        """The projector that looks neighbours up, as variables, and the queue, of the head on the
        final feature."""
        assert state.queue is not None
        projector = state.target.get("projector", state.params["projector"])
        return {"params": projector, "batch_stats": state.batch_stats["projector"]}, state.queue

    def snapshot(self, state: TrainState, images: jax.Array, ids: jax.Array) -> dict:
        """`neighbours` in the queue, int32 `[Q, k]`: dataset indices, nearest first, -1 for rows
        that belong to no image.

        As in training, but with running statistics; rows with the same `ids [Q]` are excluded.
        """
        recipe = self.recipes[0]
        x = augment.normalise_pixels(images, recipe.mean, recipe.std)
        features = self.features(state.params, state.frozen, (x[:, None],))[:, 0, -1]
        variables, queue = self._final_head(state)
        projected = vit.apply(self.projector, variables, features, train=False)
        queries = support_queue.normalise(projected)
        k = min(_SNAPSHOT_NEIGHBOURS, self.queue_size)
        found = support_queue.nearest(queue, queries, ids, size=self.queue_size, k=k)
        return {"neighbours": queue.ids.reshape(-1)[found.positions]}

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        """How many views there are of each size, and their patches."""
        patch = self.encoder.patch_size
        return [
            (len(recipe.photometric), math.prod(positions.grid(recipe.size, patch)))
            for recipe in self.recipes
        ]

    def _projector_flops(self) -> int:
        hidden, out = self.projector.hidden, self.projector.out
        return 2 * (self.encoder.width * hidden + hidden**2 + hidden * out)

    def flops_per_step(self, batch_size: int) -> int:
        out, views = self.projector.out, sum(count for count, _ in self._sizes)
        encoder = sum(count * self._encoder_flops(patches) for count, patches in self._sizes)
        predictor = 2 * 2 * out * self.predictor.hidden
        pairs = self.views * (views - 1)  # of views, whose rows are compared
        head = 3 * (views * (self._projector_flops() + predictor) + pairs * 2 * batch_size * out)
        look_up = self.views * 2 * self.queue_size * out
        return batch_size * (encoder + (len(self.blocks) + 1) * (head + look_up))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen(NNCLR):
    """A head alone: the encoder, an MAE's, stays as it is."""

    learns_features = False
    encoder_in = ("frozen",)
    encoder_of = "mae"

    @classmethod
    def tuned_blocks(cls, config) -> int:
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning(NNCLR):
    """A head and the encoder's upper blocks, whose average is the result."""

    saved = (*NNCLR.saved, "ema")
    encoder_in = ("frozen", "ema")
    rules = NNCLR.rules | {
        "ema_decay": Rule(
            "from 0 to 1, or None, which looks back over a tenth of the updates",
            lambda v, _: v is None or 0 <= v <= 1,
        ),
        "layer_decay": at_most(1),
        "head_base_lr": positive,
        "head_weight_decay": not_negative,
    }  # fmt: skip

    ema_decay: float  # of the encoder's average

    @classmethod
    def last_encoder_params(cls, parts: Mapping) -> dict:
        return cls.encoder_params({**parts, "ema": parts["params"]})

    @classmethod
    def with_encoder(cls, encoder: dict) -> dict:
        """As after tuning with all blocks frozen: the average is the encoder itself."""
        depth = len(encoder["blocks"]["norm1"]["scale"])
        trained, frozen = vit.split_blocks(encoder, depth)
        parts = {"params": trained, "frozen": frozen, "ema": trained}
        return {field: {"encoder": part} for field, part in parts.items()}

    @classmethod
    def frozen_blocks(cls, config) -> int:
        """`frozen_blocks` of the section; for None, half of the blocks."""
        frozen = config[cls.name].frozen_blocks
        return vit.size_of(config.model).depth // 2 if frozen is None else frozen

    @classmethod
    def check(cls, config, devices: int) -> None:
        super().check(config, devices)
        # Behind the blocks of a post-norm encoder there is no norm to tune.
        most = vit.size_of(config.model).depth - config.model.post_norm
        frozen = Rule(
            f"from 0 to {most}, or None, half of the blocks",
            lambda v, _: v is None or 0 <= v <= most,
        )
        configs.check(config, cls.name, {"frozen_blocks": frozen})

    @classmethod
    def _parts(cls, config, steps: int, classes: int) -> dict:
        section, head = config[cls.name], cls._group(config, "head_")
        encoder = cls._group(config, layer_decay=section.layer_decay)
        tenth = 1 - 1 / max(steps / 10, 1)
        return super()._parts(config, steps, classes) | dict(
            groups={"encoder": encoder, "projector": head, "predictor": head},
            ema_decay=tenth if section.ema_decay is None else section.ema_decay,
        )

    def _split(self, encoder: dict) -> tuple[dict, dict]:
        return vit.split_blocks(encoder, self.encoder.frozen_blocks)

    def init(self, key: jax.Array, start: dict) -> TrainState:
        state = super().init(key, start)
        # A copy, so that parameter and average never share a buffer.
        return state.replace(ema={"encoder": jax.tree.map(jnp.copy, state.params["encoder"])})

    def update_buffers(self, state: TrainState, aux: dict, finite: jax.Array) -> TrainState:
        """The average of the encoder; running statistics; view 0 enters the queue."""
        encoder = {"encoder": state.params["encoder"]}
        state = state.replace(ema=optim.ema(state.ema, encoder, self.ema_decay))
        return super().update_buffers(state, aux, finite)

    def flops_per_step(self, batch_size: int) -> int:
        """Also the backward pass of the tuned blocks."""
        encoder = self.encoder
        tuned = encoder.depth - encoder.frozen_blocks
        backward = sum(
            count * 2 * base.block_flops(tuned, encoder.width, patches + encoder.extra_tokens)
            for count, patches in self._sizes
        )
        return super().flops_per_step(batch_size) + batch_size * backward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head(Frozen):
    """Stage 2: the head on the frozen encoder, whose own projections look the neighbours up."""

    name = "head"
    number = 1
    title = "a contrastive head on the frozen encoder"
    row = "the encoder under the head"
    starts_from = ("mae", "head", "ct", "refine_head", "refine", "finetune")
    rules = NNCLR.rules | {"warmup_fraction": fraction}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveTuning(Tuning):
    """Stage 3: the encoder's upper blocks and the head."""

    name = "ct"
    number = 2
    title = "contrastive tuning of the upper {} blocks (MAE-CT)"
    row = "the average of the tuned encoder"
    exported = ("target",)
    starts_from = ("head", "ct", "mae", "refine_head", "refine", "finetune")
    takes = NNCLR.hands_on
    head_stage = "head"
    rules = Tuning.rules | {"warmup_fraction": fraction, "target_factor": between(0, 1)}

    # Decay of the target projector, which looks the neighbours up (`config.ct.target_factor`).
    target_momentum: float

    @classmethod
    def _parts(cls, config, steps: int, classes: int) -> dict:
        momentum = config.ct.target_factor
        return super()._parts(config, steps, classes) | {"target_momentum": momentum}

    def init(self, key: jax.Array, start: dict) -> TrainState:
        state = super().init(key, start)
        return state.replace(
            target={"projector": jax.tree.map(jnp.copy, state.params["projector"])}
        )

    def update_buffers(self, state: TrainState, aux: dict, finite: jax.Array) -> TrainState:
        """Also the average of the projector."""
        projector = {"projector": state.params["projector"]}
        state = state.replace(target=optim.ema(state.target, projector, self.target_momentum))
        return super().update_buffers(state, aux, finite)

    def flops_per_step(self, batch_size: int) -> int:
        """Also the target projector."""
        target = batch_size * self.views * self._projector_flops()
        return super().flops_per_step(batch_size) + target
