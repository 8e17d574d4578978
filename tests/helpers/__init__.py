"""What the tests share. This module imports no JAX: `conftest` sets it up first."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SMALL = "data.train_split=train[80%:]"  # 1,600 of the packaged images
# Unoptimised code halves the time that the tests spend compiling, which is most of it.
FAST_COMPILE = "--xla_backend_optimization_level=0"
FAST_RUN = "--xla_backend_optimization_level=1"  # for runs of more than a few steps
