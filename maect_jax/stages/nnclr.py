"""Stages 2 and 3: nearest-neighbour contrastive learning (NNCLR) on an MAE's encoder.

Stage 2 (`head`) trains projector and predictor on the frozen encoder. Stage 3 (`ct`) also tunes
the encoder's upper blocks, looks its neighbours up with an averaged projector, and averages the
encoder. What the two share is `NNCLR`.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from maect_jax import config as configs
from maect_jax.config import Rule, at_most, between, fraction, not_negative, positive
from maect_jax.data import augment
from maect_jax.errors import UserError
from maect_jax.models import nnclr, vit
from maect_jax.stages import base, losses, optim, support_queue
from maect_jax.stages.base import Stage, Views
from maect_jax.stages.state import TrainState

_SNAPSHOT_NEIGHBOURS = 3
HEAD_KEYS = ("projector_hidden", "projector_out", "predictor_hidden", "queue_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NNCLR(Stage):
    """A contrastive head on an encoder, with a queue of past projections."""

    saved: ClassVar[tuple[str, ...]] = ("params", "frozen", "batch_stats", "queue")
    hands_on = ("encoder", "projector", "predictor", "batch_stats", "queue")
    rules = base.TRAINING | base.PHOTOMETRIC | {
        **dict.fromkeys((*HEAD_KEYS, "temperature"), positive),
        "top_k": Rule(
            "above 0, and at most the queue size, {queue_size}",
            lambda v, section: 0 < v <= section.queue_size,
        ),
        "warmup_fraction": fraction,
    }  # fmt: skip

    projector: nnclr.Projector
    predictor: nnclr.Predictor
    pool: str  # how tokens become a feature (`vit.features`)
    batch_size: int
    queue_size: int
    top_k: int  # neighbours to find, of which one is drawn
    temperature: float

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

    def init(self, key: jax.Array, start: dict) -> TrainState:
        """`start` may hold `encoder` (whole, one stack of blocks), `projector`, `predictor`,
        `batch_stats` and `queue`."""
        encoder_key, projector_key, predictor_key, queue_key, rng = jax.random.split(key, 5)
        features = jnp.zeros((2, self.encoder.width))
        projected = jnp.zeros((2, self.projector.out))
        projector = self.projector.init(projector_key, features, train=True)
        predictor = self.predictor.init(predictor_key, projected, train=True)
        whole, images = self.encoder.clone(frozen_blocks=0), jnp.zeros((1, *self.image_shape))
        encoder = start.get("encoder") or whole.init(encoder_key, images)["params"]
        trained, frozen = self._split(encoder)
        first = {
            "projector": projector["params"],
            "predictor": predictor["params"],
            "batch_stats": {
                "projector": projector["batch_stats"],
                "predictor": predictor["batch_stats"],
            },
        } | start
        params = {part: first[part] for part in ("projector", "predictor")}
        params |= {"encoder": trained} if trained else {}
        sizes = self.queue_size, self.batch_size
        if "queue" in start:
            queue = support_queue.rebatch(start["queue"], *sizes)
        else:
            queue = support_queue.init(queue_key, *sizes, self.projector.out)
        buffers = dict(frozen={"encoder": frozen}, batch_stats=first["batch_stats"], queue=queue)
        return self._init_state(rng, params, **buffers)

    def features(
        self, params: dict, frozen: dict, views: jax.Array, microbatches: int = 1
    ) -> jax.Array:
        """Pooled features `[B, V, D]` of views `[B, V, H, W, C]`."""
        images = views.reshape(-1, *views.shape[2:])
        features = base.pooled_features(self, params, frozen, images, microbatches=microbatches)
        return features.reshape(*views.shape[:2], -1)

    def head(self, params: dict, batch_stats: dict, target: dict, features: jax.Array):
        """Runs the head on each view by itself, with batch statistics.

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

        for x in jnp.unstack(features, axis=1):
            z = run("projector", self.projector, x)
            predicted.append(run("predictor", self.predictor, z))
            if target:  # the running statistics are not read in training
                variables = {"params": target["projector"], "batch_stats": stats["projector"]}
                z = self.projector.apply(variables, x, train=True)
            projected.append(jax.lax.stop_gradient(support_queue.normalise(z)))
        return jnp.stack(projected, 1), jnp.stack(predicted, 1), stats

    def loss(self, params, state: TrainState, views: Views, batch: dict, key: jax.Array):
        """The symmetric NNCLR loss."""
        assert state.queue is not None
        (x,) = views
        features = self.features(params, state.frozen, x, self.microbatches)
        projected, predicted, stats = self.head(params, state.batch_stats, state.target, features)
        queries, ids = projected.reshape(-1, projected.shape[-1]), jnp.repeat(batch["index"], 2)
        with jax.named_scope("queue"):
            sizes = dict(size=self.queue_size, k=self.top_k)
            found = support_queue.nearest(state.queue, queries, ids, **sizes)
            positions = support_queue.choose(found, key)
            rows, labels = support_queue.take(state.queue, positions)
        rows, labels = rows.reshape(projected.shape), labels.reshape(-1, 2)
        loss = (
            losses.nearest_neighbour(rows[:, 0], predicted[:, 1], self.temperature)
            + losses.nearest_neighbour(rows[:, 1], predicted[:, 0], self.temperature)
        ) / 2
        known = batch["label"] >= 0
        hits = (labels[:, 0] == batch["label"]) & known
        metrics = {"nn_accuracy": hits.sum() / jnp.maximum(known.sum(), 1)}
        aux = dict(
            batch_stats=stats,
            projected=projected,
            predicted=predicted,
            positions=positions.reshape(-1, 2),
            ids=batch["index"],
            labels=batch["label"],
        )
        return loss, (metrics, aux)

    def update_buffers(self, state: TrainState, aux: dict, finite: jax.Array) -> TrainState:
        """Running statistics; view 0 enters the queue."""
        assert state.queue is not None
        with jax.named_scope("queue"):
            new = aux["projected"][:, 0], aux["ids"], aux["labels"]
            queue = support_queue.push(state.queue, *new, keep=finite)
        return state.replace(batch_stats=aux["batch_stats"], queue=queue)

    def snapshot(self, state: TrainState, images: jax.Array, ids: jax.Array) -> dict:
        """`neighbours` in the queue, int32 `[Q, k]`: dataset indices, nearest first, -1 for rows
        that belong to no image.

        As in training, but with running statistics; rows with the same `ids [Q]` are excluded.
        """
        assert state.queue is not None
        x = augment.normalise_pixels(images, self.recipes[0].mean, self.recipes[0].std)
        features = self.features(state.params, state.frozen, x[:, None])[:, 0]
        projector = state.target.get("projector", state.params["projector"])
        variables = {"params": projector, "batch_stats": state.batch_stats["projector"]}
        projected = vit.apply(self.projector, variables, features, train=False)
        queries = support_queue.normalise(projected)
        k = min(_SNAPSHOT_NEIGHBOURS, self.queue_size)
        found = support_queue.nearest(state.queue, queries, ids, size=self.queue_size, k=k)
        return {"neighbours": state.queue.ids.reshape(-1)[found.positions]}

    def _projector_flops(self) -> int:
        hidden, out = self.projector.hidden, self.projector.out
        return 2 * (self.encoder.width * hidden + hidden**2 + hidden * out)

    def flops_per_step(self, batch_size: int) -> int:
        out = self.projector.out
        predictor = 2 * 2 * out * self.predictor.hidden
        head = 3 * (self._projector_flops() + predictor + 2 * batch_size * out)
        look_up = 2 * self.queue_size * out
        return batch_size * self.views * (self._encoder_flops(self._patches) + head + look_up)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head(NNCLR):
    """Stage 2: the head on the frozen encoder, whose own projections look the neighbours up."""

    name = "head"
    number = 1
    title = "a contrastive head on the frozen encoder"
    row = "the encoder under the head"
    learns_features = False
    encoder_in = ("frozen",)
    encoder_of = "mae"
    starts_from = ("mae", "head", "ct", "finetune")

    @classmethod
    def tuned_blocks(cls, config) -> int:
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveTuning(NNCLR):
    """Stage 3: the encoder's upper blocks and the head."""

    name = "ct"
    number = 2
    title = "contrastive tuning of the upper {} blocks (MAE-CT)"
    row = "the average of the tuned encoder"
    saved = (*NNCLR.saved, "ema")
    exported = ("target",)
    encoder_in = ("frozen", "ema")
    starts_from = ("head", "ct", "mae", "finetune")
    takes = NNCLR.hands_on
    rules = NNCLR.rules | {
        "target_factor": between(0, 1),
        "ema_decay": Rule(
            "from 0 to 1, or None, which looks back over a tenth of the updates",
            lambda v, _: v is None or 0 <= v <= 1,
        ),
        "layer_decay": at_most(1),
        "head_base_lr": positive,
        "head_weight_decay": not_negative,
    }  # fmt: skip

    # Decay of the target projector, which looks the neighbours up (`config.ct.target_factor`), and
    # of the encoder's average, which is the result.
    target_momentum: float
    ema_decay: float

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
        """`config.ct.frozen_blocks`; for None, half of the blocks."""
        frozen = config.ct.frozen_blocks
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
        configs.check(config, "ct", {"frozen_blocks": frozen})
        if "head" in config.stages:
            check_same_head(config.head, config.ct, "config.head")

    @classmethod
    def _parts(cls, config, steps: int, classes: int) -> dict:
        section, head = config.ct, cls._group(config, "head_")
        encoder = cls._group(config, layer_decay=section.layer_decay)
        tenth = 1 - 1 / max(steps / 10, 1)
        return super()._parts(config, steps, classes) | dict(
            groups={"encoder": encoder, "projector": head, "predictor": head},
            target_momentum=section.target_factor,
            ema_decay=tenth if section.ema_decay is None else section.ema_decay,
        )

    def _split(self, encoder: dict) -> tuple[dict, dict]:
        return vit.split_blocks(encoder, self.encoder.frozen_blocks)

    def init(self, key: jax.Array, start: dict) -> TrainState:
        state = super().init(key, start)
        # Copies, so that parameter and average never share a buffer.
        copy = jax.tree.map(jnp.copy, state.params)
        ema, target = {"encoder": copy["encoder"]}, {"projector": copy["projector"]}
        return state.replace(ema=ema, target=target)

    def update_buffers(self, state: TrainState, aux: dict, finite: jax.Array) -> TrainState:
        """Averages of encoder and projector; running statistics; view 0 enters the queue."""
        encoder = {"encoder": state.params["encoder"]}
        projector = {"projector": state.params["projector"]}
        state = state.replace(
            ema=optim.ema(state.ema, encoder, self.ema_decay),
            target=optim.ema(state.target, projector, self.target_momentum),
        )
        return super().update_buffers(state, aux, finite)

    def flops_per_step(self, batch_size: int) -> int:
        """Also the backward pass of the tuned blocks, and the target projector."""
        encoder = self.encoder
        tuned = encoder.depth - encoder.frozen_blocks
        tokens = self._patches + encoder.extra_tokens
        backward = 2 * base.block_flops(tuned, encoder.width, tokens)
        more = batch_size * self.views * (backward + self._projector_flops())
        return super().flops_per_step(batch_size) + more


def check_same_head(before, now, where: str) -> None:
    """Raises `UserError` where the section of stage ct has another head than the one before it."""
    for key in HEAD_KEYS:
        if before[key] != now[key]:
            raise UserError(f"config.ct.{key}={now[key]!r}: must be {before[key]!r}, as in {where}")
