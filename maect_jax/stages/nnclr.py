"""Stages 2 and 3: nearest-neighbour contrastive learning (NNCLR) on an MAE's encoder.

Stage 2 (`head`) trains projector and predictor on the frozen encoder. Stage 3 (`ct`) also tunes
the encoder's upper blocks, looks its neighbours up with an averaged projector, and averages the
encoder. What the two share is `NNCLR`.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from maect_jax import config as configs
from maect_jax.config import Rule, at_most, between, fraction, not_negative, positive
from maect_jax.data import augment
from maect_jax.errors import UserError
from maect_jax.models import nnclr, vit
from maect_jax.stages import base, losses, optim, support_queue
from maect_jax.stages.base import Stage, over_microbatches
from maect_jax.stages.state import TrainState

_SNAPSHOT_NEIGHBOURS = 3
HEAD_KEYS = ("projector_hidden", "projector_out", "predictor_hidden", "queue_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NNCLR(Stage):
    """A contrastive head on an encoder, with a queue of past projections.

    Of `top_k` neighbours that are found one is drawn. `pool` is how tokens become a feature.
    """

    saved = ("params", "frozen", "batch_stats", "queue")
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
    pool: str
    batch_size: int
    queue_size: int
    top_k: int
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

    @classmethod
    def handover(cls, parts: Mapping) -> dict:
        head = {part: parts["params"][part] for part in ("projector", "predictor")}
        buffers = {part: parts[part] for part in ("batch_stats", "queue")}
        return super().handover(parts) | head | buffers

    # What the two stages do differently

    def _split(self, encoder: dict) -> tuple[dict, dict]:
        """Whole encoder parameters as `(trained, frozen)`."""
        return {}, encoder

    def _averages(self, params: dict) -> dict:
        """The first state's averages of parameters, by field."""
        del params
        return {}

    def _look_up(self, params: dict, target: dict, stats: dict, x: jax.Array, z: jax.Array):
        """What the neighbours of features `x` are looked up with; `z` are their projections."""
        del params, target, stats, x
        return z

    def init(self, key: jax.Array, start: dict) -> TrainState:
        """`start` may hold `encoder` (whole, one stack of blocks), `projector`, `predictor`,
        `batch_stats` and `queue`."""
        encoder_key, projector_key, predictor_key, queue_key, rng = jax.random.split(key, 5)
        features = jnp.zeros((2, self.encoder.width))
        projected = jnp.zeros((2, self.projector.out))
        projector = self.projector.init(projector_key, features, train=True)
        predictor = self.predictor.init(predictor_key, projected, train=True)
        whole = self.encoder.clone(frozen_blocks=0)
        images = jnp.zeros((1, *self.image_shape))
        encoder = start.get("encoder") or whole.init(encoder_key, images)["params"]
        fresh_stats = {
            "projector": projector["batch_stats"],
            "predictor": predictor["batch_stats"],
        }
        params = {
            "projector": start.get("projector") or projector["params"],
            "predictor": start.get("predictor") or predictor["params"],
        }
        trained, frozen = self._split(encoder)
        params |= {"encoder": trained} if trained else {}
        if "queue" in start:
            queue = support_queue.rebatch(start["queue"], self.queue_size, self.batch_size)
        else:
            queue = support_queue.init(
                queue_key, self.queue_size, self.batch_size, self.projector.out
            )
        return self._init_state(
            rng,
            params,
            frozen={"encoder": frozen},
            batch_stats=start.get("batch_stats") or fresh_stats,
            queue=queue,
            # Copies, so that parameter and average never share a buffer.
            **jax.tree.map(jnp.copy, self._averages(params)),
        )

    def features(
        self, params: dict, frozen: dict, views: jax.Array, microbatches: int = 1
    ) -> jax.Array:
        """Pooled features `[B, V, D]` of views `[B, V, H, W, C]`."""
        encoder = {**frozen["encoder"], **params.get("encoder", {})}

        def encode(images):
            return vit.features(self.encoder, encoder, images, self.pool)

        images = views.reshape(-1, *views.shape[2:])
        return over_microbatches(encode, microbatches, images).reshape(*views.shape[:2], -1)

    def head(self, params: dict, batch_stats: dict, target: dict, features: jax.Array):
        """Runs the head on each view by itself, with batch statistics.

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
            z = self._look_up(params, target, stats, x, z)
            projected.append(jax.lax.stop_gradient(support_queue.normalise(z)))
        return jnp.stack(projected, 1), jnp.stack(predicted, 1), stats

    def loss(self, params, state: TrainState, views: jax.Array, batch: dict, key: jax.Array):
        """The symmetric NNCLR loss on two views `[B, 2, H, W, C]`."""
        features = self.features(params, state.frozen, views, self.microbatches)
        projected, predicted, stats = self.head(params, state.batch_stats, state.target, features)
        ids = jnp.repeat(batch["index"], 2)
        queries = projected.reshape(-1, projected.shape[-1])
        found = support_queue.nearest(state.queue, queries, ids, size=self.queue_size, k=self.top_k)
        positions = support_queue.choose(found, key)
        rows, labels = support_queue.take(state.queue, positions)
        rows, labels = rows.reshape(projected.shape), labels.reshape(-1, 2)
        loss = (
            losses.nearest_neighbour(rows[:, 0], predicted[:, 1], self.temperature)
            + losses.nearest_neighbour(rows[:, 1], predicted[:, 0], self.temperature)
        ) / 2
        # Of the images whose label is known.
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
        queue = support_queue.push(
            state.queue, aux["projected"][:, 0], aux["ids"], aux["labels"], keep=finite
        )
        return state.replace(batch_stats=aux["batch_stats"], queue=queue)

    def snapshot(self, state: TrainState, images: jax.Array, ids: jax.Array) -> dict:
        """Looks up the queue neighbours of images uint8 `[Q, H, W, C]`.

        As in training, but with running statistics; rows with the same `ids [Q]` are excluded.

        Returns:
          `neighbours` int32 `[Q, k]`, dataset indices, nearest first, -1 for rows that belong to
          no image.
        """
        x = augment.normalise_pixels(images, self.recipe.mean, self.recipe.std)
        features = self.features(state.params, state.frozen, x[:, None])[:, 0]
        projector = state.target.get("projector", state.params["projector"])
        variables = {"params": projector, "batch_stats": state.batch_stats["projector"]}
        queries = support_queue.normalise(self.projector.apply(variables, features, train=False))
        k = min(_SNAPSHOT_NEIGHBOURS, self.queue_size)
        found = support_queue.nearest(state.queue, queries, ids, size=self.queue_size, k=k)
        return {"neighbours": state.queue.ids.reshape(-1)[found.positions]}

    def _encoder_flops(self) -> int:
        """Of one crop; the frozen blocks have a forward pass only."""
        encoder, tokens = self.encoder, self._patches + 1
        embed = 2 * self._patches * self._patch_pixels * encoder.width
        return embed + base.block_flops(encoder.depth, encoder.width, tokens)

    def _projector_flops(self) -> int:
        hidden, out = self.projector.hidden, self.projector.out
        return 2 * (self.encoder.width * hidden + hidden**2 + hidden * out)

    def flops_per_step(self, batch_size: int) -> int:
        out = self.projector.out
        predictor = 2 * 2 * out * self.predictor.hidden
        look_up = 2 * self.queue_size * out
        logits = 3 * 2 * batch_size * out
        per_crop = (
            self._encoder_flops() + 3 * (self._projector_flops() + predictor) + look_up + logits
        )
        return batch_size * self.views * per_crop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head(NNCLR):
    """Stage 2: the head on the frozen encoder, whose own projections look the neighbours up."""

    name = "head"
    number = 1
    title = "a contrastive head on the frozen encoder"
    row = "the encoder under the head"
    changes_encoder = False
    starts_from = ("mae", "head", "ct", "finetune")

    @staticmethod
    def encoder_params(parts: Mapping) -> dict:
        return parts["frozen"]["encoder"]

    @staticmethod
    def with_encoder(encoder: dict) -> dict:
        return {"frozen": {"encoder": encoder}}

    @classmethod
    def tuned_blocks(cls, config) -> int:
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveTuning(NNCLR):
    """Stage 3: the encoder's upper blocks and the head.

    `target_momentum` (`config.ct.target_factor`) is the decay of the target projector, which looks
    the neighbours up; `ema_decay` that of the encoder's average, which is the result.
    """

    name = "ct"
    number = 2
    title = "contrastive tuning of the upper {} blocks (MAE-CT)"
    row = "the average of the tuned encoder"
    saved = (*NNCLR.saved, "ema")
    exported = ("target",)
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

    target_momentum: float
    ema_decay: float

    @staticmethod
    def encoder_params(parts: Mapping) -> dict:
        """The average of the encoder."""
        return vit.merge_blocks({**parts["frozen"]["encoder"], **parts["ema"]["encoder"]})

    @classmethod
    def last_encoder_params(cls, parts: Mapping) -> dict:
        return vit.merge_blocks({**parts["frozen"]["encoder"], **parts["params"]["encoder"]})

    @staticmethod
    def with_encoder(encoder: dict) -> dict:
        """As after tuning with all blocks frozen: the average is the encoder itself."""
        depth = len(encoder["blocks"]["norm1"]["scale"])
        trained, frozen = vit.split_blocks(encoder, depth)
        return {
            "params": {"encoder": trained},
            "frozen": {"encoder": frozen},
            "ema": {"encoder": trained},
        }

    @classmethod
    def frozen_blocks(cls, config) -> int:
        """`config.ct.frozen_blocks`; for None, half of the blocks."""
        half = vit.size_of(config.model).depth // 2
        return half if config.ct.frozen_blocks is None else config.ct.frozen_blocks

    @classmethod
    def check(cls, config, devices: int) -> None:
        super().check(config, devices)
        depth = vit.size_of(config.model).depth
        frozen = Rule(
            f"from 0 to the depth, {depth}, or None, half of it",
            lambda v, _: v is None or 0 <= v <= depth,
        )
        configs.check(config, "ct", {"frozen_blocks": frozen})
        if "head" in config.stages:
            check_same_head(config.head, config.ct, "config.head")

    @classmethod
    def _parts(cls, config, steps: int, classes: int) -> dict:
        section, head = config.ct, cls._group(config, "head_")
        decay = section.ema_decay
        if decay is None:
            decay = 1 - 1 / max(steps / 10, 1)
        encoder = cls._group(config, layer_decay=section.layer_decay)
        return super()._parts(config, steps, classes) | dict(
            groups={"encoder": encoder, "projector": head, "predictor": head},
            target_momentum=section.target_factor,
            ema_decay=decay,
        )

    def _split(self, encoder: dict) -> tuple[dict, dict]:
        return vit.split_blocks(encoder, self.encoder.frozen_blocks)

    def _averages(self, params: dict) -> dict:
        return {
            "ema": {"encoder": params["encoder"]},
            "target": {"projector": params["projector"]},
        }

    def _look_up(self, params: dict, target: dict, stats: dict, x: jax.Array, z: jax.Array):
        # The running statistics are not read in training.
        variables = {"params": target["projector"], "batch_stats": stats["projector"]}
        return self.projector.apply(variables, x, train=True)

    def update_buffers(self, state: TrainState, aux: dict, finite: jax.Array) -> TrainState:
        """Averages of encoder and projector; running statistics; view 0 enters the queue."""
        encoder = {"encoder": state.params["encoder"]}
        projector = {"projector": state.params["projector"]}
        state = state.replace(
            ema=optim.ema(state.ema, encoder, self.ema_decay),
            target=optim.ema(state.target, projector, self.target_momentum),
        )
        return super().update_buffers(state, aux, finite)

    def _encoder_flops(self) -> int:
        encoder = self.encoder
        tuned = encoder.depth - encoder.frozen_blocks
        backward = 2 * base.block_flops(tuned, encoder.width, self._patches + 1)
        return super()._encoder_flops() + backward

    def flops_per_step(self, batch_size: int) -> int:
        target = batch_size * self.views * self._projector_flops()
        return super().flops_per_step(batch_size) + target


def check_same_head(before, now, where: str) -> None:
    """Raises `UserError` where the section of stage ct has another head than the one before it."""
    for key in HEAD_KEYS:
        if before[key] != now[key]:
            raise UserError(f"config.ct.{key}={now[key]!r}: must be {before[key]!r}, as in {where}")
