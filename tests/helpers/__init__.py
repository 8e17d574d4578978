"""What the tests share. This module imports no JAX: `conftest` sets it up first."""

from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SMALL = "data.train_split=train[80%:]"  # 1,600 of the packaged images
# Unoptimised code, and the older of two code generators, halve the time that the tests spend
# compiling, which is most of it. Later versions of JAX have the newer generator alone.
FAST_COMPILE = "--xla_backend_optimization_level=0"
ROUND_ALIKE = {}  # compiler options for two programs that must round a common part in the same way
if version("jaxlib").startswith("0.10."):
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
    ROUND_ALIKE = {"xla_cpu_use_fusion_emitters": True}
FAST_RUN = "--xla_backend_optimization_level=1"  # for runs of more than a few steps
