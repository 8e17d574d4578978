"""The method in plain PyTorch against this program: both trained, evaluated by the same program.

    OMP_WAIT_POLICY=passive python -m benchmarks.side_by_side [--config=quickstart] [--seeds=0,1,2]
        [--workdir=runs/side_by_side] [--ours=RUN,RUN,RUN] [--limit=7200]

Needs torch and torchvision. PyTorch's side (`benchmarks/torch_training.py`, in fp32) takes the
images, model, updates and schedules of the config; after `mae` and after `ct` it writes an encoder,
which `maect run` imports and evaluates by the config's own evaluation. Our side is `maect run`, or
with `--ours` a run of the config for each seed, which is refused if its config is another. Then
the steps of both are timed in turns, from images to the new weights. Everything is kept in
`--workdir`, the figures in `side_by_side.json`; the same command resumes. Without that variable
PyTorch's threads keep the cores busy while they wait, which the processes that cut images need.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import torch
from absl import flags
from ml_collections import ConfigDict
from PIL import Image
from safetensors.torch import load_file

from benchmarks import cpu_training, published, torch_training
from maect_jax import config as configs
from maect_jax import files
from maect_jax import main as command
from maect_jax.data import arrays
from maect_jax.evals import runner, table

STAGES = (*torch_training.STEPS,)
ROWS = ("mae", "ct")
SIDES = ("maect_jax", "PyTorch")
STEPS, ROUNDS = 50, 5  # that are timed
# What PyTorch's side has no other values of.
NEEDED = {
    "stages": (*STAGES, "eval"), "init_from": "", "data.source": "fashion_mnist",
    "model.dtype": "float32", "model.cls_tokens": 1, "model.registers": 0, "model.rope_theta": None,
    "model.post_norm": False, "model.ln_eps": 1e-6,
    **{f"{stage}.photometric.{key}": (0.0, 0.0)
       for stage in STAGES for key in ("blur", "grayscale", "solarize")},
}  # fmt: skip


def check(config: ConfigDict, folder: Path) -> None:
    """Ends the program where PyTorch's side lacks what a config asks for, or a folder has figures
    of another config; else notes the config there."""
    values, path = configs.flat(config), folder / "config.json"
    for key, value in NEEDED.items():
        if values.get(key) != value:
            has = f"config.{key}={values.get(key)!r}"
            sys.exit(f"{has}: must be {value!r}, as PyTorch's side has nothing else")
    if path.exists() and (changes := configs.differences(configs.read(path), config)):
        sys.exit(f"--workdir={folder}: has figures of another config ({'; '.join(changes)})")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, config.to_dict())


def pictures(config: ConfigDict) -> list[Image.Image]:
    images = arrays.fashion_mnist(config.data.train_split).images
    return [Image.fromarray(image[..., 0]) for image in images]


def train_peer(config: ConfigDict, seed: str, folder: Path) -> None:
    """Trains all stages in PyTorch; writes `mae.safetensors`, which is taken if it is there, and
    `ct.safetensors`, the average."""
    torch.manual_seed(int(seed))
    images, heads = pictures(config), config.model.heads
    trainer = torch_training.Trainer(config, len(images))
    for number, stage in enumerate(STAGES, start=1):
        path = folder / f"{stage}.safetensors"
        if path.exists():
            trainer.encoder.load_state_dict(load_file(path))
            continue
        torch.manual_seed(1000 * number + int(seed))
        start, per_epoch = time.monotonic(), len(images) // config[stage].batch_size
        for i, loss in enumerate(cpu_training.peer(trainer, stage, images), start=1):
            if i % per_epoch == 0:
                line = f"PyTorch, seed {seed}: {stage}, epoch {i // per_epoch}, loss {loss:.4f}"
                print(f"{line}, {time.monotonic() - start:.0f} s", flush=True)
                if not loss.isfinite():
                    sys.exit("the loss is not finite")
        if stage in ROWS:
            torch_training.write(trainer.average, path, heads)


def maect_run(name: str, folder: Path, **settings) -> dict:
    """Runs `maect run`, and returns the results that are in the folder then."""
    overrides = [f"--config.{key.replace('__', '.')}={x}" for key, x in settings.items()]
    arguments = [f"--config={name}", *overrides, f"--workdir={folder}"]
    if subprocess.run([sys.executable, "-m", "maect_jax.main", *arguments]).returncode:
        sys.exit(f"failed: maect run {' '.join(arguments)}")
    return runner.read_results(folder)


def peer_results(name: str, config: ConfigDict, seed: str, folder: Path) -> dict:
    """The results of PyTorch's encoders, by row; trains them unless they are there."""
    folder.mkdir(exist_ok=True)
    if not (folder / f"{ROWS[-1]}.safetensors").exists():
        train_peer(config, seed, folder)
    results = {}
    for row in ROWS:
        (results[row],) = maect_run(
            name, folder / row, seed=seed, stages="eval", init_from=folder / f"{row}.safetensors",
            eval__pixels=False, eval__map="pca", eval__dtype=config.model.dtype,
            eval__pool=config.model.pool,
        ).values()  # fmt: skip
    return results


def speeds(name: str) -> dict[str, dict[str, float]]:
    """Images a second of each stage and side."""
    config = configs.load(name, [f"{stage}.epochs=10000" for stage in STAGES])
    flags.FLAGS.mark_as_parsed()  # grain has some
    command.keep_memory()
    images, found = pictures(config), {}
    for stage in STAGES:
        trainer = torch_training.Trainer(config, len(images))
        sides = cpu_training.ours(config, stage), cpu_training.peer(trainer, stage, images)
        streams = dict(zip(SIDES, sides, strict=True))
        found[stage] = cpu_training.rates(streams, config[stage].batch_size, STEPS, ROUNDS)
    return found


def summary(percent: Mapping[str, Mapping[str, published.Percent]]) -> str:
    """A table of each side, and one of what ours has more, over the seeds that both have."""
    seeds = [seed for seed in percent[SIDES[0]] if seed in percent[SIDES[1]]]
    sides = {side: [percent[side][seed] for seed in seeds] for side in SIDES}
    tables = {side: table.formatted(runs) for side, runs in sides.items()}
    tables[" - ".join(SIDES)] = published.apart(*sides.values())
    return "\n\n".join(f"{title}\n{table.text(rows)}" for title, rows in tables.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="quickstart", metavar="NAME[:ARGUMENT]")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workdir", type=Path, default=Path("runs/side_by_side"))
    parser.add_argument(
        "--ours",
        default="",
        help="runs of the config, one for each seed, which are resumed",
    )
    parser.add_argument(
        "--limit", type=float, default=7200, help="seconds, after which no training starts"
    )
    arguments = parser.parse_args()
    seeds = arguments.seeds.split(",")
    folder, config = arguments.workdir, configs.load(arguments.config)
    runs = [Path(run) for run in arguments.ours.split(",") if run]
    runs = runs or [folder / f"seed{seed}" / "ours" for seed in seeds]
    if len(runs) != len(seeds):
        sys.exit(f"--ours={arguments.ours}: names {len(runs)} runs; must name {len(seeds)}")
    check(config, folder)
    path, deadline = folder / "side_by_side.json", time.monotonic() + arguments.limit
    kept = files.read_json(path) or {
        "environment": {
            "cpu_cores": os.cpu_count(), "python": platform.python_version(),
            "jax": jax.__version__, "torch": torch.__version__,
        },
        "percent": {side: {} for side in SIDES},
    }  # fmt: skip
    name = arguments.config
    for seed, run in zip(seeds, runs, strict=True):
        own = folder / f"seed{seed}"
        own.mkdir(exist_ok=True)
        for side in SIDES:
            if seed in kept["percent"][side]:
                continue
            if time.monotonic() > deadline:
                sys.exit(f"--limit={arguments.limit:g} seconds are over. The same command resumes.")
            if side == "PyTorch":
                results = peer_results(name, config, seed, own / "pytorch")
            else:
                results = maect_run(name, run, seed=seed)
            kept["percent"][side][seed] = table.percentages({r: results[r] for r in ROWS})
            files.write_json(path, kept)
    print(f"\n{summary(kept['percent'])}\n", flush=True)
    if "images_per_second" not in kept:
        files.write_json(path, kept | {"images_per_second": speeds(name)})
        kept = files.read_json(path)
    for stage, both in kept["images_per_second"].items():
        mine, theirs = both.values()
        print(f"{stage:5}{mine:7.0f} / {theirs:.0f} images/s, {mine / theirs:.2f}")


if __name__ == "__main__":
    main()
