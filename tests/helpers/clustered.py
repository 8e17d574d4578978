"""A small clustering made by hand, and its page."""

import os
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.cluster.hierarchy import linkage

from maect_jax import config as configs
from maect_jax import files
from maect_jax.data import subsets
from maect_jax.data.folder import Folder
from maect_jax.evals import assignment, runner
from maect_jax.evals.assignment import Centres, Space
from maect_jax.report import build, clusters
from tests.helpers import CONFIGS

ROW = "ct"
SIZES = {2: 40, 0: 12, 7: 9, 3: 5}  # images, by the number of the cluster
# What a page must not take for its own text; of cluster 3.
ODD = (
    "3/<b>bold&amp;</b>.png", "3/quotes \"' and, commas.png", "3/a</script>.png",
    "3/__proto__.png", os.fsdecode(b"3/no utf-8 \xe9.png"),
)  # fmt: skip
NAMES = sorted([*ODD, *(f"{k}/{i:02}.png" for k, n in SIZES.items() if k != 3 for i in range(n))])
_COLOURS = ((230, 120, 60), (80, 160, 230), (120, 200, 90), (220, 200, 60))


def make(run: Path) -> Folder:
    """Writes images below a run's folder, and the arrays of their clustering; returns the images.

    A picture is a disk of the colour of its cluster: the larger, the farther from the centre. The
    first two of cluster 2 are copies; its last one is an outlier.
    """
    rng, grid = np.random.default_rng(0), np.hypot(*(np.mgrid[:28, :28] - 13.5))
    places = np.array([list(SIZES).index(int(name[0])) for name in NAMES], np.int32)
    x = 10 * np.eye(len(SIZES), dtype=np.float32)[places]
    for i, name in enumerate(NAMES):
        within = i - int(np.argmax(places == places[i]))
        x[i] += 0.05 * within * rng.choice([-1, 1], len(SIZES))
        pixels = np.full((28, 28, 3), 30, np.uint8)
        pixels[grid < 3 + 0.25 * within] = _COLOURS[places[i]]
        path = run / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, "PNG")
    first, second, last = (NAMES.index(f"2/{i}.png") for i in ("00", "01", SIZES[2] - 1))
    x[second] = x[first]
    means = np.stack([x[places == place].mean(0) for place in range(len(SIZES))])
    found, distance, margin = assignment.nearest(x, means)
    np.testing.assert_array_equal(found, places)
    space = Space(False, np.zeros(4, np.float32), np.zeros((0, 4), np.float32))
    numbers = np.array(list(SIZES), np.int32)
    centres = Centres.of(space, means, numbers=numbers, places=places, distance=distance)
    index, apart = np.arange(len(x), dtype=np.int32), np.linalg.norm(x[:, None] - x, axis=-1)
    np.fill_diagonal(apart, np.inf)
    files.write_arrays(
        runner.folder_of(run, ROW) / "cluster.npz",
        index=index, clusters=centres.numbers[places], labels=np.full(len(x), -1),
        distance=distance, margin=margin, rank=subsets.ranks(places, distance),
        merges=linkage(means, "average"), **centres.arrays(),
    )  # fmt: skip
    files.write_arrays(
        runner.folder_of(run, ROW) / "near.npz",
        index=index, neighbours=np.argsort(apart, 1)[:, :10].astype(np.int32),
        far=np.ones(len(x), np.float32), outlier=index == last,
        pairs=np.array([[first, second]], np.int32), cosine=np.ones(1, np.float32),
        same=np.ones(1, bool),
    )  # fmt: skip
    return Folder(str(run / "images"), labelled=False)


def write(run: Path, source: Folder) -> clusters.Clustered:
    """Writes the page of such a run; returns what it shows."""
    config = configs.load(str(CONFIGS / "quickstart.py"), ["model.channels=3"])
    clustered = clusters.Clustered.read(
        run, ROW, source, entry=runner.read_results(run).get(ROW, {})
    )
    assert clustered
    clusters.write(run, clustered, config, build.TEMPLATES.get_template("clusters.html"))
    return clustered
