"""The page of clusters with very many images, in a headless Chromium.

    python -m benchmarks.clusters_page [--images=50000] [--clusters=100]

The images are synthetic, 96 x 96 in colour; their clusters are random. Scrolling is 300 pixels a
frame through all images, for five seconds: each frame shows images that the one before has not.
"""

import argparse
import shutil
import tempfile
import time
from functools import cached_property
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright
from scipy.cluster.hierarchy import linkage

from maect_jax import config as configs
from maect_jax.data import subsets
from maect_jax.data.base import Identity, Source
from maect_jax.evals import assignment
from maect_jax.evals.assignment import Centres, Space
from maect_jax.report import build, clusters

_SCROLL = """
() => new Promise((resolve) => {
  const frames = [], start = performance.now();
  let last = start, nodes = 0;
  requestAnimationFrame(function frame(now) {
    frames.push(now - last);
    last = now;
    nodes = Math.max(nodes, document.querySelectorAll('*').length);
    scrollBy(0, 300);
    if (now - start < 5000) requestAnimationFrame(frame);
    else resolve([frames.slice(1), nodes, scrollY]);
  });
})
"""


class Synthetic(Source):
    """Images of coloured stripes, each another."""

    labelled = False

    def __init__(self, count: int):
        self.labels, self.classes = np.full(count, -1, np.int32), []
        self._grid = np.mgrid[:96, :96]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, record: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng(record)
        phase = np.tensordot(rng.uniform(-0.3, 0.3, (3, 2)), self._grid, 1) + rng.uniform(0, 6)
        return (127 + 100 * np.sin(phase)).astype(np.uint8).transpose(1, 2, 0), -1

    def name(self, record: int) -> str:
        return f"/synthetic/{record // 1000:03}/image_{record:06}.jpg"

    @cached_property
    def identity(self) -> Identity:
        return Identity(len(self), "synthetic")


def clustered(images: int, k: int) -> clusters.Clustered:
    """Synthetic images in clusters of various sizes, with random neighbours."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(k, 64)).astype(np.float32)
    x = centres[rng.integers(0, k, images) ** 2 // k] + rng.normal(0, 0.5, (images, 64))
    places, distance, margin = assignment.nearest(x.astype(np.float32), centres)
    used, places = np.unique(places, return_inverse=True)
    space = Space(False, np.zeros(64, np.float32), np.zeros((0, 64), np.float32))
    own = dict(numbers=used.astype(np.int32), places=places, distance=distance)
    found = Centres.of(space, centres[used], **own).arrays()
    found |= dict(index=np.arange(images), clusters=used[places], distance=distance, margin=margin)
    near = dict(neighbours=rng.integers(0, images, (images, 10), np.int32), far=distance)
    near |= dict(outlier=distance > np.quantile(distance, 0.99))
    near |= dict(pairs=rng.integers(0, images, (500, 2), np.int32), cosine=np.ones(500, np.float32))
    near |= dict(same=np.ones(500, bool))
    found |= dict(rank=subsets.ranks(places, distance))
    found |= dict(merges=linkage(centres[used], "average"))
    return clusters.Clustered(Synthetic(images), found, near, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--clusters", type=int, default=100)
    arguments = parser.parse_args()
    config = configs.load("quickstart", ["model.channels=3"])
    template = build.TEMPLATES.get_template("clusters.html")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        run, made = Path(folder), clustered(arguments.images, arguments.clusters)
        for when in ("first", "again, with the same images"):
            start = time.perf_counter()
            clusters.write(run, made, config, template)
            print(f"written {when}: {time.perf_counter() - start:.1f} s", flush=True)
        for kind in ("*.js", "sprites*"):
            size = sum(path.stat().st_size for path in (run / "clusters").glob(kind))
            print(f"{kind}: {size / 2**20:.1f} MiB")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=1280, height=800))
        start = time.perf_counter()
        page.goto((run / "clusters.html").as_uri())
        page.wait_for_selector(".card")
        seconds = time.perf_counter() - start
        painted = page.evaluate(
            "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        )
        print(f"first view: {seconds:.2f} s; first paint {painted:.0f} ms")
        for view in ("cluster/0", "borderline", "find/", "cluster/0 of two groups"):
            if view.endswith("groups"):
                page.evaluate("location.hash = '#/'")
                page.locator("#level").press("Home")
            view, start = view.split(" ")[0], time.perf_counter()
            page.evaluate("view => { location.hash = `#/${view}`; }", view)
            page.wait_for_selector(".tile")
            seconds = time.perf_counter() - start
            frames, nodes, scrolled = page.evaluate(_SCROLL)
            p95, longest = np.quantile(frames, 0.95), max(frames)
            print(
                f"{view}: opened in {1e3 * seconds:.0f} ms; scrolled {scrolled:,.0f} pixels in "
                f"{len(frames)} frames: median {np.median(frames):.0f} ms, 95 % {p95:.0f}, longest "
                f"{longest:.0f}, above 50 ms {np.mean(np.array(frames) > 50):.1%}; at most {nodes} "
                "elements",
                flush=True,
            )
        browser.close()


if __name__ == "__main__":
    main()
