"""Files from elsewhere, made of the golden figures."""

import subprocess
import sys

import numpy as np

from maect_jax.convert.__main__ import main as convert
from maect_jax.convert.importing import Overrides
from tests.helpers import ROOT
from tests.helpers import golden_figures as figures

MAE, CT = figures.cases("mae")[0], figures.cases("ct")[0]


def stated(case, **own):
    """What the golden figures' odd widths do not tell."""
    decoder = case.meta.get("dec_heads")
    found = dict(
        heads=case.meta["heads"], decoder_heads=decoder, ln_eps=1e-6, image_size=case.image_size,
        pool="cls", dtype="float32",
    )  # fmt: skip
    return Overrides(**found | own)


def flags(case):
    height, width = case.image_size
    found = [f"--heads={case.meta['heads']}", "--ln_eps=1e-6", "--dtype=float32", "--pool=cls"]
    found.append(f"--image_size={height},{width}")
    return found + (
        [f"--decoder_heads={case.meta['dec_heads']}"] if "dec_heads" in case.meta else []
    )


def run_convert(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert()


def with_class_row(x, row=0.0):
    return np.concatenate([np.full_like(x[:, :1], row), x], axis=1)


def mae_file(case, row=0.0):
    """The tensors of an MAE as its own code names them."""
    encoder, decoder = case.under("encoder/"), case.under("decoder/")
    encoder["pos_embed"] = with_class_row(encoder["pos_embed"], row)
    decoder["pos_embed"] = with_class_row(decoder["pos_embed"])
    named = {n if n == "mask_token" else f"decoder_{n}": x for n, x in decoder.items()}
    return encoder | named


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


# The high-water mark of the process itself: that of getrusage is the parent's at the start.
PEAK = """
import re, sys
from maect_jax.convert import __main__
import jax; jax.devices()
if sys.argv[2].endswith(".pth"):
    import torch  # whose own memory is not the file's
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
sys.argv = ["convert", *sys.argv[1:]]
__main__.main()
print(before, peak())
"""


def assert_peak_of_import_below(kilobytes, path, run):
    """Imports a file of an odd width in a process of its own, and reads what that took."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "import", str(path), str(run), "--heads=10", "--ln_eps=1e-6"],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.splitlines()[-1].split())
    assert kilobytes / 4 < peak - before < kilobytes
