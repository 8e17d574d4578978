"""What a command writes to streams that nobody takes, or that lack a character."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

# A command that prints more than a pipe holds, does its work, and prints again.
_COMMAND = """
import os, sys
from pathlib import Path
from maect_jax import errors

def main():
    print("line \\n" * 100_000, flush=True)
    print("error line", file=sys.stderr, flush=True)
    os.write(2, b"a library's\\n")
    Path("work").write_text("done")
    print("caf\\udce9 \\u56fe")

sys.exit(errors.run_command(main))
"""


def run(folder, shell, **environment):
    (folder / "command.py").write_text(_COMMAND)
    command = f"{sys.executable} command.py"
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {shell}"],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ("| head -n 1", ["error line", "a library's"]),
        ("2>&1 | head -n 0", []),
        (">&-", ["error line", "a library's"]),
        ("2>&- >out", []),
        (">&- 2>&- <&-", []),
        (">/dev/full", ["error: stdout: No space left on device", "error line", "a library's"]),
        ("2>/dev/full | tail -n 1", []),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_streams_that_nobody_takes(tmp_path, shell, said, unbuffered):
    done = run(tmp_path, shell, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == (1 if shell == ">/dev/full" else 0)
    assert [line.partition(";")[0] for line in done.stderr.splitlines()] == said
    assert (tmp_path / "work").read_text() == "done"


def test_the_backend_of_a_notebook_is_not_used(tmp_path):
    """It may not be installed here, and matplotlib then refuses to be imported."""
    command = "from maect_jax import errors; errors.run_command(lambda: __import__('matplotlib'))"
    environment = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "of_a_notebook"}
    done = subprocess.run(
        [sys.executable, "-c", command],
        env=os.environ | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "utf-8:strict"},
    ],
)
def test_characters_that_a_terminal_lacks(tmp_path, environment):
    done = run(tmp_path, "", **environment)
    assert (done.returncode, done.stderr) == (0, "error line\na library's\n")
    wide = "\u56fe" if "utf-8" in str(environment) else r"\u56fe"
    assert done.stdout.splitlines()[-1] == rf"caf\udce9 {wide}"
