"""The tests that need a GPU, on a machine without one: they load, say what they need, and their code is not broken."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDS = ("needs a CUDA device", "needs two CUDA devices", "needs a CUDA device; a CPU has nothing like it")


def pytest_on(path, mode):
    """Returns what pytest says of `path` in a process that sees no GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", path],
        env={**os.environ, "PEFTCLI_TEST_GPU": mode, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_without_a_gpu_each_says_what_it_needs():
    said = pytest_on("tests/gpu", "1")
    skipped = re.findall(r"^SKIPPED \[(\d+)\] (tests/gpu/\w+\.py)[^ ]* (.*)$", said, re.MULTILINE)
    assert {reason for _, _, reason in skipped} <= set(NEEDS), said
    assert {ROOT / path for _, path, _ in skipped} == set(ROOT.glob("tests/gpu/test_*.py"))
    count = sum(int(number) for number, _, _ in skipped)
    assert re.search(rf"^{count} skipped in ", said, re.MULTILINE), said


def test_packed_layers_are_rehearsed():
    """The quick ones. PEFTCLI_TEST_GPU=rehearse python -m pytest tests/gpu runs all of them, in some minutes."""
    assert " passed" in pytest_on("tests/gpu/test_packed.py", "rehearse")
