"""Stages 2 and 3: nearest-neighbour contrastive learning on an MAE's encoder.

Stage 2 (`head`) trains projector and predictor on the frozen encoder; stage 3 (`ct`) also tunes
the encoder's upper blocks, looks its neighbours up with an averaged projector, and averages
the encoder. One code path: the stages differ in their settings only.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from maect_jax.data import augment
from maect_jax.data.augment import Recipe
from maect_jax.models import nnclr, vit
from maect_jax.stages import losses, optim, support_queue
from maect_jax.stages.microbatch import over_microbatches
from maect_jax.stages.state import TrainState

_WATCHED_NEIGHBOURS = 3


@dataclasses.dataclass(frozen=True)
class Contrast:
    """What is fixed in stages 2 and 3.

    `ema_decay` (the encoder's) and `target_factor` (the projector's) are `None` in stage 2,
    where the encoder is frozen whole and the neighbours are looked up with the projector
    itself. `top_k` neighbours are found, one is drawn. `image_shape` is (H, W, C). The encoder runs
    over `microbatches` parts of a batch.
    """

    encoder: vit.ViT
    projector: nnclr.Projector
    predictor: nnclr.Predictor
    image_shape: tuple[int, int, int]
    pool: str
    batch_size: int
    queue_size: int
    top_k: int
    temperature: float
    target_factor: float | None
    ema_decay: float | None
    recipe: Recipe
    groups: Mapping[str, optim.Group]
    steps: int
    warmup: int
    microbatches: int = 1

    def optimizer(self, params):
        return optim.adamw(params, self.groups, self.steps, self.warmup)

    @property
    def tunes_encoder(self) -> bool:
        return self.ema_decay is not None

    def init(self, key: jax.Array, start: dict) -> TrainState:
        """The first state. What `start` does not hold is initialised at random.

        `start` may hold `encoder` (whole, one stack of blocks), and for stage 3 `projector`,
        `predictor`, `batch_stats` and `queue`.
        """
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
        if self.tunes_encoder:
            trained, frozen = vit.split_blocks(encoder, self.encoder.frozen_blocks)
            params["encoder"] = trained
        else:
            frozen = encoder
        if "queue" in start:
            queue = support_queue.rebatch(start["queue"], self.queue_size, self.batch_size)
        else:
            queue = support_queue.init(
                queue_key, self.queue_size, self.batch_size, self.projector.out
            )
        # Copies, so that parameter and average never share a buffer.
        ema = {"encoder": params["encoder"]} if self.tunes_encoder else {}
        target = {} if self.target_factor is None else {"projector": params["projector"]}
        ema, target = jax.tree.map(jnp.copy, (ema, target))
        return TrainState(
            step=jnp.int32(0),
            params=params,
            frozen={"encoder": frozen},
            batch_stats=start.get("batch_stats") or fresh_stats,
            opt_state=self.optimizer(params).init(params),
            ema=ema,
            target=target,
            queue=queue,
            rng=rng,
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
            if self.target_factor is not None:
                # The running statistics are not read in training.
                variables = {"params": target["projector"], "batch_stats": stats["projector"]}
                z = self.projector.apply(variables, x, train=True)
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
        carried = dict(
            batch_stats=stats,
            projected=projected,
            predicted=predicted,
            positions=positions.reshape(-1, 2),
            ids=batch["index"],
            labels=batch["label"],
        )
        return loss, (metrics, carried)

    def watch(self, state: TrainState, images: jax.Array, ids: jax.Array) -> dict:
        """Looks up the queue neighbours of some images uint8 `[Q, H, W, C]`.

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
        k = min(_WATCHED_NEIGHBOURS, self.queue_size)
        found = support_queue.nearest(state.queue, queries, ids, size=self.queue_size, k=k)
        return {"neighbours": state.queue.ids.reshape(-1)[found.positions]}

    def advance(self, state: TrainState, carried: dict, finite: jax.Array) -> TrainState:
        """What follows the optimiser: statistics, averages, and view 0 into the queue."""
        ema, target = state.ema, state.target
        if self.tunes_encoder:
            new = {"encoder": state.params["encoder"]}
            ema = optim.average(ema, new, self.ema_decay)
        if self.target_factor is not None:
            new = {"projector": state.params["projector"]}
            target = optim.average(target, new, self.target_factor)
        rows = carried["projected"][:, 0]
        queue = support_queue.push(
            state.queue, rows, carried["ids"], carried["labels"], keep=finite
        )
        return state.replace(
            batch_stats=carried["batch_stats"], ema=ema, target=target, queue=queue
        )
