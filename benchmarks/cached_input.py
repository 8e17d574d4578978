"""The host's part of the input of a small model: crops from `data.cache`, and from the files.

    python -m benchmarks.cached_input FOLDER [--config=quickstart:photos] [--sides 128 96 ...]

FOLDER contains `train` with images, which are cut for the stages of the config, in its number of
workers: once from pixels that are kept, by the first of the sides, and once decoded for each crop
(`turns`). Then, for each side, how much the pixels of crops and of an evaluation's centre crops
differ, of 255 on average over 480 images. A box that just fits into an image may not fit into the
reduced one, and is another one there.
"""

import argparse
import gc
import tempfile
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import turns
from maect_jax import config as configs
from maect_jax import main as main_command
from maect_jax.data import loader, sources
from maect_jax.data.base import evenly_spaced
from maect_jax.data.cache import Reduced
from maect_jax.evals import runner
from maect_jax.pipeline import training_stages

COMPARED = 480  # images
BATCH = 32


def batches(config, stage, source):
    """Endless batches for a stage."""
    make = stage.example_maker(config, source)
    order = loader.Order(len(source), BATCH, 10**6, make.seed, range(BATCH))
    return loader.train_batches(order, make, config.data.workers)


def differences(config, source, side: int) -> list[str]:
    """Mean absolute differences of each stage's crops, and of those of an evaluation."""
    small, found = Reduced(source, sources.decoding(config), side), []
    makers = {s.name: lambda x, s=s: s.example_maker(config, x) for s in training_stages(config)}
    makers["eval"] = lambda x: runner.record(config, x)
    records = evenly_spaced(len(source), COMPARED)
    for name, maker in makers.items():
        keys = records if name == "eval" else [(0, record) for record in records]
        pairs = [(maker(x)(key)["image"].astype(int) for x in (source, small)) for key in keys]
        found.append(f"{name} {np.mean([np.abs(a - b).mean() for a, b in pairs]):.2f}")
    return found


def main(config, sides: list[int]) -> None:
    source = sources.make(config.data, "train", config.model.channels)
    small = Reduced(source, sources.decoding(config), sides[0])
    with tempfile.TemporaryDirectory() as scratch:
        small.keep(Path(scratch), "train")
        print(f"{len(source)} images, data.cache={sides[0]}: {small.where}")
        for stage in training_stages(config):
            made = {"cache": small, "files": source}
            made = {f"{stage.name}, {k}": batches(config, stage, x) for k, x in made.items()}
            turns.compare(made, BATCH, batches=30)
    for side in sides:
        print(f"data.cache={side}: {', '.join(differences(config, source, side))} of 255")


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # grain's worker processes read them
    gc.set_threshold(main_command.GARBAGE)  # as `maect run`
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--config", default="quickstart:photos")
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 64, 96, 192, 256])
    arguments = parser.parse_args()
    loaded = configs.load(arguments.config, [f"data.path={arguments.folder}"])
    loaded.data.short_side = loaded.data.short_side or 8 * min(loaded.model.image_size) // 7
    main(loaded, arguments.sides)
