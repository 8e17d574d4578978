"""The device mesh and the placement of every array on it. Nobody else names the axes.

Two axes: `data` replicates the parameters, `fsdp` shards them; the batch is split over both.
"""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maect_jax.errors import UserError

AXES = ("data", "fsdp")
BATCH = P(AXES)

# Ordered (pattern on the path of a leaf, placement); the first that matches is used. The same
# rules serve parameters, their optimiser moments and their averages. A stacked block kernel is
# [layer, in, out]; an axis that the mesh does not divide stays whole.
RULES = (
    (r"queue/(rows|ids|labels)$", P(None, AXES)),
    (r"blocks/.*(attn/proj|fc2)/kernel$", P(None, None, "fsdp")),
    (r"blocks/.*kernel$", P(None, "fsdp", None)),
    (r"kernel$", P("fsdp", None)),
    (r"", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """A mesh over all devices; one of the two sizes may be -1, "the rest".

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    shape = {"data": data, "fsdp": fsdp}
    known = math.prod(size for size in shape.values() if size != -1)
    if -1 in shape.values() and known > 0 and devices % known == 0:
        shape = {axis: devices // known if s == -1 else s for axis, s in shape.items()}
    if math.prod(shape.values()) != devices or min(shape.values()) < 1:
        raise UserError(
            f"config.mesh=(data={data}, fsdp={fsdp}): the sizes must multiply to the "
            f"{devices} devices; one of them may be -1, the rest"
        )
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def constrain_batch(x: jax.Array) -> jax.Array:
    """Pins the leading axis of an activation to the batch axes; does nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def path_name(path) -> str:
    """A leaf's key path as `a/b/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The placement that `RULES` give an array of this name and shape."""
    spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
    parts = []
    for size, part in zip(shape, spec, strict=False):
        axes = (part,) if isinstance(part, str) else part or ()
        fits = size % math.prod(mesh.shape[axis] for axis in axes) == 0
        parts.append(part if fits else None)
    return P(*parts)


def tree_shardings(tree, mesh: Mesh):
    """A `NamedSharding` for each leaf of a tree of (abstract) arrays."""

    def place(path, leaf):
        return NamedSharding(mesh, spec_of(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, P())


def put_batch(batch, mesh: Mesh):
    """Makes global arrays, split along the leading axis, of this process's rows of a batch."""
    place = NamedSharding(mesh, BATCH)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(place, np.asarray(x)), batch
    )
