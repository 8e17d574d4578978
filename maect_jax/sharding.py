"""The device mesh and the placement of every array on it. No other module names the axes.

Two axes: `data` replicates the parameters, `fsdp` shards them; the batch is split over both.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maect_jax.errors import OTHER_HOST, UserError

AXES = ("data", "fsdp")
BATCH = P(AXES)

# Ordered (pattern searched in the path of a leaf, placement of its last axes); `tree_shardings`
# uses the first that matches. The same rules serve parameters, their optimiser moments and their
# averages, with or without a leading axis of layers or heads, [layer, in, out]; of a block's kernel
# the axis of the encoder's width is split. An axis whose size the mesh axis does not divide is
# replicated, as are biases, norms and tokens.
RULES = (
    (r"queue/rows$", P(AXES, None)),
    (r"queue/(ids|labels)$", P(AXES)),
    (r"blocks/.*(attn/proj|fc2)/kernel$", P(None, "fsdp")),
    (r"kernel$", P("fsdp", None)),
    (r"", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
    """A mesh over all devices, or those given; one of the two sizes may be -1, "the rest". Raises
    `UserError` if the sizes do not multiply to the number of devices."""
    devices = jax.devices() if devices is None else devices
    count, shape = len(devices), {"data": data, "fsdp": fsdp}
    known = math.prod(size for size in shape.values() if size != -1)
    if [*shape.values()].count(-1) == 1 and known > 0 and count % known == 0:
        shape = {axis: count // known if s == -1 else s for axis, s in shape.items()}
    if math.prod(shape.values()) != count or min(shape.values()) < 1:
        raise UserError(
            f"config.mesh=(data={data}, fsdp={fsdp}): the sizes must multiply to the number of "
            f"devices, which is {count}; one of them may be -1, the rest"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=kinds, devices=devices)


def mesh_text(shape: Mapping[str, int]) -> str:
    """A mesh's `shape` for people, `data 4 x fsdp 2`."""
    return " x ".join(f"{axis} {size}" for axis, size in shape.items())


def check_batch(key: str, batch_size: int, devices: int) -> None:
    """Raises `UserError` where the devices cannot share a batch, whose size `key` gives."""
    if batch_size % devices:
        near = max(batch_size // devices, 1) * devices
        raise UserError(
            f"{key}={batch_size}: must be divisible by the number of devices ({devices}), for "
            f"example {near}"
        )


def all_hosts(holds: bool) -> bool:
    """Whether something holds on every process. Each must call it, and waits for the others."""
    if jax.process_count() == 1:
        return holds
    return bool(multihost_utils.process_allgather(np.asarray(holds)).all())


@contextmanager
def together() -> Iterator[None]:
    """A user's error on one host ends all of them, each with a line: none waits for another."""
    failed = None
    try:
        yield
    except UserError as error:
        failed = error
    if not all_hosts(failed is None):
        raise failed or UserError(OTHER_HOST)


@lru_cache
def _jitted_max(mesh: Mesh):
    return jax.jit(jnp.max, out_shardings=replicated_sharding(mesh))


def max_over_hosts(number: int, mesh: Mesh):
    """The highest of all processes' numbers (int32). Each must call it; unlike `all_hosts` it
    works on the devices, and no process waits until the result is read."""
    if jax.process_count() == 1:
        return np.int32(number)
    numbers = jax.make_array_from_callback(
        (mesh.size,), batch_sharding(mesh), lambda index: np.full(1, number, np.int32)
    )
    return _jitted_max(mesh)(numbers)


def of_first_host(text: str) -> str:
    """What the first process has, ASCII. Each must call it with as many characters, and waits for
    the others."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    return multihost_utils.broadcast_one_to_all(content).astype(np.uint8).tobytes().decode()


def gather_set(numbers: set[int]) -> set[int]:
    """All processes' numbers (int32, none negative). Each must call it and waits for the others."""
    if jax.process_count() == 1:
        return numbers
    longest = int(multihost_utils.process_allgather(np.int32(len(numbers))).max())
    if not longest:
        return numbers
    padded = np.full(longest, -1, np.int32)
    padded[: len(numbers)] = list(numbers)
    return set(multihost_utils.process_allgather(padded).ravel().tolist()) - {-1}


def shard_map_batch(
    function: Callable, replicated_args: int = 0, replicated_out: bool = False
) -> Callable:
    """`function` of arrays whose first axis is the batch, run by each device on the rows it holds;
    without a mesh the function itself.

    Args:
      function: of arrays `[B, ...]`.
      replicated_args: how many of the last arguments every device has whole.
      replicated_out: whether the outputs are the same on all devices, thanks to
        `sum_over_devices`; else their first axis is the batch, too.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function

    def run(*arguments):
        specs = (BATCH,) * (len(arguments) - replicated_args) + (P(),) * replicated_args
        out = P() if replicated_out else BATCH
        # `check_vma` rejects a loop that starts from a constant, which is equal on all devices.
        return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)(*arguments)

    return run


def sum_over_devices(tree):
    """Within a function of `shard_map_batch`: the sum of what all devices have, on each of them."""
    return tree if jax.sharding.get_abstract_mesh().empty else jax.lax.psum(tree, AXES)


def constrain_batch(x: jax.Array, axis: int = 0) -> jax.Array:
    """Pins an axis of an activation to the batch axes; does nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*[None] * axis, AXES))


def platform() -> str:
    """What runs that which is traced, "cpu", "gpu" or "tpu": the devices of the current mesh, if
    there is one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def tree_shardings(tree, mesh: Mesh):
    """The `NamedSharding` that `RULES` give each leaf of a tree of (abstract) arrays."""

    def sharding_of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        parts = next(spec for pattern, spec in RULES if re.search(pattern, name))
        fitting = [None] * (len(leaf.shape) - len(parts))
        for size, part in zip(leaf.shape[len(fitting) :], parts, strict=True):
            axes = (part,) if isinstance(part, str) else part or ()
            divides = size % math.prod(mesh.shape[axis] for axis in axes) == 0
            fitting.append(part if divides else None)
        return NamedSharding(mesh, P(*fitting))

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def abstract(tree, mesh: Mesh):
    """Shapes and dtypes of a tree of (abstract) arrays, with the shardings that `RULES` give."""

    def placed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, tree, tree_shardings(tree, mesh))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Every device holds its part of the rows."""
    return NamedSharding(mesh, BATCH)


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that the devices of this process hold, ascending.

    A mesh may order the devices of a TPU slice so that these are several blocks.
    """
    here = [device.process_index == jax.process_index() for device in mesh.devices.flat]
    return np.arange(batch_size).reshape(len(here), -1)[here].ravel()


def put_batch(batch, mesh: Mesh):
    """Makes global arrays, split along the leading axis, of this process's rows of a batch.

    The rows are those of `local_rows`, in that order.
    """
    size = len(jax.tree.leaves(batch)[0]) // len(mesh.local_devices) * mesh.size
    rows = local_rows(size, mesh)

    def put(x):
        x = np.asarray(x)

        def part(index):  # the rows of a device follow each other in those of its process
            wanted = range(size)[index[0]]
            first = int(np.searchsorted(rows, wanted.start))
            return x[first : first + len(wanted)]

        return jax.make_array_from_callback((size, *x.shape[1:]), batch_sharding(mesh), part)

    return jax.tree.map(put, batch)


def _put(x, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def put_rows(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """A global array, split along the first axis, of one that every process has whole; only what
    the devices of a process hold is read. The devices must divide the rows."""
    return _put(x, batch_sharding(mesh))


def replicate(x, mesh: Mesh) -> jax.Array:
    """A global array, whole on every device, of one that every process has."""
    return _put(np.asarray(x), replicated_sharding(mesh))


def place(tree, mesh: Mesh):
    """Arrays that every process has whole, placed by `RULES`."""
    return jax.tree.map(_put, tree, tree_shardings(tree, mesh))


def to_host(tree):
    """Arrays as NumPy arrays, whole on every process; each must call it."""

    def whole(x):
        spread = isinstance(x, jax.Array) and not x.is_fully_addressable
        return multihost_utils.process_allgather(x, tiled=True) if spread else x

    return jax.device_get(jax.tree.map(whole, tree))
