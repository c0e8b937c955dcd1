"""Runs, checkpoints and merges that are broken on purpose, as `python -m scripts.torture` does in earnest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.torture.__main__ import CRASHES
from scripts.torture.calls import out_of_order
from scripts.torture.disk import WAYS

REPOSITORY = Path(__file__).parents[2]


def torture(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "scripts.torture", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a short torture found; a process of its own, since it forks and must not have computed before."""
    done = torture(*CRASHES, "--json", "--folder", str(tmp_path_factory.mktemp("torture")))
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("part", CRASHES)
def test_nothing_is_lost(part, found):
    assert found[part]["failures"] == []
    assert found[part]["rows"]


def test_something_was_tried(found):
    """A torture that does nothing finds nothing."""
    total = {part: found[part]["rows"]["all"] for part in CRASHES}
    assert total["kills"]["kills"] >= 24
    assert total["kills"]["resumes"] > 0
    assert all(row["runs"] for row in found["kills"]["rows"].values())
    assert total["faults"]["failed"] == 26
    assert all(found["faults"]["rows"][way]["calls"] > 100 for way in WAYS)
    assert total["corruption"]["damages"] == 150
    assert total["rotation"]["events"] == 500
    assert total["merges"]["kills"] >= 16


def test_an_unknown_part_is_refused_by_name():
    done = torture("kils")
    assert done.returncode == 2
    assert "kils" in done.stderr


CALLS = """
mkdir checkpoint-4.tmp
save_file checkpoint-4.tmp/adapter_model.safetensors
fsync checkpoint-4.tmp/adapter_model.safetensors
open checkpoint-4.tmp/adapter_config.json.tmp
write checkpoint-4.tmp/adapter_config.json.tmp
fsync checkpoint-4.tmp/adapter_config.json.tmp
replace checkpoint-4.tmp/adapter_config.json
open checkpoint-4.tmp/state.json.tmp
write checkpoint-4.tmp/state.json.tmp
fsync checkpoint-4.tmp/state.json.tmp
replace checkpoint-4.tmp/state.json
fsync checkpoint-4.tmp
rename checkpoint-4
fsync .
rename checkpoint-2.tmp
unlink checkpoint-2.tmp/state.json
""".strip().splitlines()


def test_the_right_order_of_calls_passes():
    assert out_of_order(CALLS) == []
    assert out_of_order([]) == ["no checkpoint appears"]


@pytest.mark.parametrize("number", [number for number, call in enumerate(CALLS) if call.startswith(("fsync", "mkdir"))])
def test_a_call_that_is_missing_is_noticed(number):
    assert out_of_order(CALLS[:number] + CALLS[number + 1 :])


@pytest.mark.parametrize(
    ("call", "to"),
    [
        ("rename checkpoint-2.tmp", 0),  # rotated first
        ("rename checkpoint-2.tmp", 13),  # before the new one is on the disk
        ("fsync checkpoint-4.tmp", 10),  # before the last name is in it
        ("fsync checkpoint-4.tmp/adapter_model.safetensors", 10),  # after state.json vouches for it
        ("save_file checkpoint-4.tmp/adapter_model.safetensors", 2),  # flushed before it is written
    ],
)
def test_a_call_in_another_place_is_noticed(call, to):
    others = [one for one in CALLS if one != call]
    assert out_of_order([*others[:to], call, *others[to:]])
