"""On an accelerator, and what measures it, tried on a CPU.

    MAECT_ACCELERATOR=1 pytest tests/accelerator_test.py -m accelerator -W default

There the reference figures hold in fp32 and in bf16, the queue and the views are those of a CPU,
and cuDNN's attention is XLA's.
"""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax.data import augment
from maect_jax.data.augment import Photometric, Recipe
from maect_jax.models import vit
from tests import bf16_test, parity_test
from tests.helpers import ROOT
from tests.helpers import golden_figures as figures
from tests.stages import support_queue_test

on_accelerator = [
    pytest.mark.accelerator,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="there is no accelerator"),
]


def marked(test):
    for mark in on_accelerator:
        test = mark(test)
    return test


@pytest.fixture
def exact():
    """fp32 products as they are meant: by default an accelerator rounds their factors."""
    with jax.default_matmul_precision("highest"):
        yield


@marked
@pytest.mark.parametrize("case", figures.cases("mae"), ids=str)
def test_mae(exact, case):
    parity_test.test_mae(case)


@marked
@pytest.mark.parametrize("case", figures.cases("ct"), ids=str)
@pytest.mark.parametrize("given", parity_test.GIVEN)
def test_ct(exact, case, given):
    parity_test.test_ct_forward(case, given)
    parity_test.test_ct_gradients(case, given)
    parity_test.test_ct_parameters_and_target_after_each_step(case, given)
    parity_test.test_ct_queue_in_the_end(case, given)


@marked
@pytest.mark.parametrize("case", figures.cases("mae"), ids=str)
def test_mae_in_bf16(exact, case):
    bf16_test.test_mae(case)


@marked
@pytest.mark.parametrize("case", figures.cases("ct")[:1], ids=str)
def test_ct_in_bf16(exact, case):
    bf16_test.test_ct_forward_and_gradients(case)


@marked
@pytest.mark.parametrize("tile", [1, 4096])
def test_the_queue_has_its_order(rng, monkeypatch, tile):
    support_queue_test.test_nearest_and_take_equal_numpy(rng, monkeypatch, (1, 1), 64, 7, tile)


@marked
def test_views_are_those_of_a_cpu(rng):
    colour = Photometric(jitter=0.8, blur=0.5, grayscale=0.2, solarize=0.2)
    recipe = Recipe((32, 40), (0.08, 1.0), (0.0,) * 3, (1.0,) * 3, (colour, colour))
    batch = {
        "image": rng.integers(0, 256, (32, 48, 64, 3), dtype=np.uint8),
        "seed": rng.integers(0, 2**32, (32, 2), dtype=np.uint32),
    }
    views = jax.jit(lambda batch: augment.views(batch, recipe))
    here, cpu = (
        np.asarray(views(jax.device_put(batch, device)))
        for device in (jax.devices()[0], jax.devices("cpu")[0])
    )
    # A pixel may fall on the other side of the threshold of solarize.
    assert np.quantile(np.abs(here - cpu), 0.999) < 1e-3


@marked
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens", [50, 197, 257])
@pytest.mark.parametrize("width", [64, 80])
def test_cudnn_equals_xla(rng, tokens, width):
    """Forward and backward, within bf16's rounding."""
    q, k, v, cotangent = jnp.asarray(rng.normal(size=(4, 8, tokens, 4, width)), jnp.bfloat16)

    def both(attend):
        out, back = jax.vjp(jax.jit(attend), q, k, v)
        return out, *back(cotangent)

    for got, want in zip(
        both(vit.cudnn_attention), both(jax.nn.dot_product_attention), strict=True
    ):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.linalg.norm(got - want) < 4 * 2**-8 * np.linalg.norm(want)


@pytest.mark.slow
def test_the_benchmark_runs_anywhere(tmp_path):
    out = tmp_path / "accelerator.json"
    command = [sys.executable, "-m", "benchmarks.accelerator", "--configs", "mae_vitb16:test",
               "ct_vitb16:test", "--attention", "xla", "cudnn", "--batch_size=16", "--steps=2",
               "--no_peer", f"--out={out}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert [(r["config"], r["side"]) for r in results] == [
        (config, kind) for config in ("mae_vitb16:test", "ct_vitb16:test")
        for kind in ("xla", "cudnn")
    ]  # fmt: skip
    for xla, cudnn in zip(results[::2], results[1::2], strict=True):
        assert xla["images_per_second"] == pytest.approx(16 / xla["seconds"])
        assert 0 < xla["mfu"] < 1
        assert "NVIDIA" in cudnn["error"]
