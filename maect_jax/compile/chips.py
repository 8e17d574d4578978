"""TPU chips as published, and their slices.

Figures per chip are from the Cloud TPU documentation of each generation (v4, v5e, v5p, v6e, and
https://docs.cloud.google.com/tpu/docs/tpu7x). The link bandwidth is of one direction, half of what
is published for both; of two published figures (v6e) it is the larger, because it serves lower
bounds on time.
"""

from typing import NamedTuple

from maect_jax.errors import UserError


class Chip(NamedTuple):
    """Peak FLOP/s in bf16; bytes of memory; bytes/s of the memory, and of all links that leave the
    chip; the shapes of its slices, and the options that the compiler needs for them; how many
    devices JAX makes of it."""

    flops: float
    hbm: int
    hbm_bandwidth: float
    link_bandwidth: float
    topologies: tuple[str, ...]
    options: dict[str, str] = {}  # noqa: RUF012
    devices: int = 1

    def device(self) -> "Chip":
        """The share of one device. It keeps the links of its chip: of what the devices send around
        a ring, only what one of a chip's devices sends leaves it."""
        return self._replace(
            flops=self.flops / self.devices,
            hbm=self.hbm // self.devices,
            hbm_bandwidth=self.hbm_bandwidth / self.devices,
            devices=1,
        )


GIB = 2**30
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_MEGACORE = {"chip_config_name": "megacore"}  # one device for each chip
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, _CUBES, _MEGACORE),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, _FLAT),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, _CUBES, _MEGACORE),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9, _FLAT),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 600e9, _CUBES, devices=2),
}


def find(topology: str) -> Chip:
    """The chip of a topology such as "v5e:4x4". Raises `UserError` if it is unknown."""
    chip, _, shape = topology.partition(":")
    if chip not in CHIPS or shape not in CHIPS[chip].topologies:
        known = "; ".join(f"{name}: {' '.join(c.topologies)}" for name, c in CHIPS.items())
        raise UserError(f"--topology={topology}: must be CHIP:SHAPE, one of {known}")
    return CHIPS[chip]
