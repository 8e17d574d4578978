"""MIM-Refiner (Alkin et al., 2024, arXiv 2402.10093): contrastive heads on several blocks at once.

In a masked image model the best features lie in the middle, as the last blocks turn to
reconstruction. `refine_head` trains a head on the final feature, and one on the raw feature behind
each of some blocks, on the frozen encoder; `refine` tunes the encoder, too, by the sum of their
losses. Small crops of an image, its local views, are compared with the global ones.

The heads are one stack, as are the layers of an encoder: a leading axis of all their arrays, over
which `jax.vmap` runs what a head of MAE-CT does. That is compiled once, in place of once a head,
and one exchange between devices serves all heads. Their queues are one, too: the heads see the
same images, so that only its rows have the axis.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from operator import gt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax import config as configs
from maect_jax.config import Rule, between, not_negative, or_none
from maect_jax.data.augment import Photometric
from maect_jax.data.transforms import Crops
from maect_jax.errors import UserError
from maect_jax.models import vit
from maect_jax.stages import base, losses, optim
from maect_jax.stages.base import Views
from maect_jax.stages.nnclr import NNCLR, Frozen, Tuning
from maect_jax.stages.state import TrainState
from maect_jax.stages.support_queue import Queue

_QUEUES: Any = Queue(0, None, None, None)  # type: ignore[arg-type]  # the axes of the heads
_PARTS = NNCLR.hands_on[1:]  # of a head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refiner(NNCLR):
    """Heads behind `blocks` and on the final feature, the last one; views of two sizes."""

    hands_on = ("encoder", "heads")
    head_keys = (*NNCLR.head_keys, "blocks")
    together = True
    measured_views = NNCLR.views
    lr_per_view = False
    undecayed = (*optim.UNDECAYED, "cls_token")
    rules = NNCLR.rules | {
        "warmup_epochs": base.WARMUP_EPOCHS,
        "end_lr": not_negative,
        "local.views": between(0, 64),
        "local.crop_scale": base.CROP_SCALE,
        **base.photometric("local.photometric", between(0, 1)),
    }

    @classmethod
    def check(cls, config, devices: int) -> None:
        model, sides = config.model, config.model.image_size
        size = Rule(
            f"(height, width), each a multiple of the patch size {model.patch_size} and at most "
            f"{sides}",
            lambda v, _: vit.are_sides(v, model) and not any(map(gt, v, sides)),
        )
        rules = {"blocks": vit.blocks_rule(model), "local.size": size}
        configs.check(config, cls.name, {key: or_none(rule) for key, rule in rules.items()})
        super().check(config, devices)
        least = min(group.lr for group in cls._parts(config, 1, 0)["groups"].values())
        end_lr = config[cls.name].end_lr
        if end_lr > least:
            raise UserError(
                f"config.{cls.name}.end_lr={end_lr}: must be at most the lowest learning rate, "
                f"{least:g} (a base_lr times batch_size / 256)"
            )

    @classmethod
    def _blocks(cls, config) -> tuple[int, ...]:
        """`blocks` of the section; for None, those from two thirds of the depth to the last but
        one."""
        blocks, depth = config[cls.name].blocks, vit.size_of(config.model).depth
        return tuple(range(2 * depth // 3, depth - 1)) if blocks is None else blocks

    @classmethod
    def view_sets(cls, config) -> tuple[tuple[Crops, tuple[Photometric, ...]], ...]:
        """Also the local views, if there are any."""
        local, patch = config[cls.name].local, config.model.patch_size
        if not local.views:
            return super().view_sets(config)
        # As the authors' 96 pixels for 224, or 98 for patches of 14.
        sides = (max(round(side * 3 / 7 / patch), 1) * patch for side in config.model.image_size)
        crops = Crops(local.size or (*sides,), local.crop_scale, local.views)
        colours = Photometric(**local.photometric.to_dict())
        return *super().view_sets(config), (crops, (colours,) * local.views)

    @classmethod
    def _parts(cls, config, steps: int, classes: int) -> dict:
        parts = super()._parts(config, steps, classes)
        style = dict(activation=vit.gelu, kernel_init=vit.xavier)
        projector = parts["projector"].clone(**style)
        predictor = parts["predictor"].clone(last_norm=True, **style)
        heads = {"projector": projector, "predictor": predictor}
        return parts | heads | {"blocks": cls._blocks(config)}

    @classmethod
    def handover(cls, parts: Mapping) -> dict:
        found = {**parts, **parts["params"]}
        heads = {name: found[name] for name in _PARTS}
        return {"encoder": cls.encoder_params(parts), "heads": heads}

    @property
    def _head_names(self) -> tuple[str, ...]:
        """Of the metrics, in the order of the stack."""
        return (*(f"block{block}" for block in self.blocks), "final")

    def init(self, key: jax.Array, start: dict) -> TrainState:
        """`start` may hold `encoder` and `heads`, the parts of all heads."""
        heads = start.get("heads", {})
        return super().init(key, {k: x for k, x in start.items() if k != "heads"} | heads)

    def _split_key(self, key: jax.Array) -> jax.Array:
        return jax.random.split(key, len(self._head_names))

    def _new_head(self, projector_key: jax.Array, predictor_key: jax.Array) -> dict:
        keys = map(self._split_key, (projector_key, predictor_key))
        return jax.vmap(super()._new_head)(*keys)

    def _new_queue(self, key: jax.Array) -> Queue:
        return jax.vmap(super()._new_queue, out_axes=_QUEUES)(self._split_key(key))

    def _rebatched(self, queue: Queue) -> Queue:
        return jax.vmap(super()._rebatched, in_axes=(_QUEUES,), out_axes=_QUEUES)(queue)

    def loss(self, params, state: TrainState, views: Views, batch: dict, key: jax.Array):
        """The sum of all heads' losses; metrics also tell the heads apart (`_head_names`)."""
        features = self.features(params, state.frozen, views, self.microbatches)
        heads = {name: params[name] for name in ("projector", "predictor")}
        stacked = dict(params=heads, batch_stats=state.batch_stats, target={}, queue=state.queue)
        axes = dict(params=0, batch_stats=0, target=0, queue=_QUEUES)
        contrast = jax.vmap(partial(self._contrast, batch=batch), in_axes=(axes, 2))
        each, accuracies, aux = contrast(stacked, features, key=self._split_key(key))
        metrics = {"nn_accuracy": accuracies.mean()}
        for i, name in enumerate(self._head_names):
            metrics[f"loss_{name}"] = each[i]
            metrics[f"nn_accuracy_{name}"] = accuracies[i]
        return each.sum(), (metrics, aux | dict(ids=batch["index"], labels=batch["label"]))

    def _loss(self, projected: jax.Array, neighbours: jax.Array, predicted: jax.Array):
        """Nearest-neighbour alignment, the mean over pairs of a global and another view.

        A global view is compared with the other one, and with as many views as there are local
        ones. By the paper these are the local views; the authors' code, whose figures are
        published, counts them from view 0 on: they are both global views and all local ones but
        the last two. So it is here.
        """
        views, local = self.views, predicted.shape[1] - self.views
        pairs = np.zeros((views, max(views, local)))  # how often each counts
        pairs[:, :views] = 1 - np.eye(views)
        pairs[:, :local] += 1
        others = predicted[:, : pairs.shape[1]]
        terms = losses.alignment(projected, neighbours, others, temperature=self.temperature)
        return jnp.average(terms, weights=pairs)

    def _push(self, queue: Queue, rows: jax.Array, aux: dict, keep: jax.Array) -> Queue:
        push = partial(super()._push, aux=aux, keep=keep)
        return jax.vmap(push, in_axes=(_QUEUES, 0), out_axes=_QUEUES)(queue, rows)

    def _final_head(self, state: TrainState) -> tuple[dict, Queue]:
        variables, queue = super()._final_head(state)
        last = partial(jax.tree.map, lambda x: x[-1])
        return last(variables), queue.replace(rows=queue.rows[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineHead(Frozen, Refiner):
    """The heads on the frozen encoder."""

    name = "refine_head"
    number = 4
    title = "contrastive heads on the frozen encoder"
    row = "the encoder under the heads"
    starts_from = ("mae", "refine_head", "head", "ct", "refine", "finetune")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refine(Tuning, Refiner):
    """The encoder and the heads."""

    name = "refine"
    number = 5
    title = "contrastive tuning of {} blocks by heads on several (MIM-Refiner)"
    row = "the average of the refined encoder"
    starts_from = ("refine_head", "refine", "mae", "head", "ct", "finetune")
    takes = Refiner.hands_on
    head_stage = "refine_head"
    rules = Tuning.rules | Refiner.rules
