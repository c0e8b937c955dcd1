"""The benchmarks: that they measure, not how fast anything is."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import timing
from scripts.bench.__main__ import PARTS
from scripts.bench.table import Table, shown

REPOSITORY = Path(__file__).parents[2]


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "scripts.bench", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )


def test_every_part_is_a_module():
    modules = {path.stem for path in (REPOSITORY / "scripts/bench").glob("*.py")}
    assert set(PARTS) <= modules


def test_an_unknown_part_is_refused_by_name():
    done = bench("end_to_ent")
    assert done.returncode == 2
    assert "end_to_ent" in done.stderr
    assert "end_to_end" in done.stderr


def test_turns_are_taken_and_the_first_rounds_are_not_counted():
    order = []
    found = timing.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abcbcacababc"
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_taken_within_a_round():
    # a machine that slows down tenfold changes no ratio
    assert timing.ratios({"a": [1, 10, 100], "b": [2, 20, 200]}, to="a") == {"a": 1, "b": 2}


def test_a_process_is_measured_in_seconds_and_bytes():
    small = timing.process([sys.executable, "-c", "import time; time.sleep(0.3)"], threads=1)
    large = timing.process([sys.executable, "-c", "x = bytearray(400_000_000); x[::4096] = x[::4096]"], threads=1)
    assert small.seconds >= 0.3
    assert large.peak_gb - small.peak_gb == pytest.approx(0.4, abs=0.4)
    assert large.peak_gb > 0.4


def test_a_process_that_fails_shows_what_it_said():
    with pytest.raises(SystemExit, match="no such thing"):
        timing.process([sys.executable, "-c", "raise ValueError('no such thing')"], threads=1)


def test_a_table_lacks_no_figure():
    table = Table("t", {"first": {"seconds": 1.234567, "ratio": 1.0}, "second": {"seconds": 12345.6, "rows": 3}}, ["n"])
    lines = table.markdown().splitlines()
    assert lines[2:6] == [
        "|  | seconds | ratio | rows |",
        "| --- | ---: | ---: | ---: |",
        "| first | 1.23 | 1.00 | – |",
        "| second | 12,346 | – | 3 |",
    ]


@pytest.mark.parametrize(("cell", "text"), [(None, "–"), (0.01234, "0.0123"), (123.45, "123.5"), (7, "7"), ("x", "x")])
def test_figures_keep_the_digits_that_count(cell, text):
    assert shown(cell) == text


IN_PROCESS = [part for part in PARTS if part != "end_to_end"]
"""The parts that run on small models of their own."""


@pytest.fixture(scope="module")
def smoke():
    """What those parts find, in one process: most of the time goes into its imports."""
    done = bench(*IN_PROCESS, "--smoke", "--json", "--threads", "1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["parts"]


@pytest.mark.parametrize("part", IN_PROCESS)
def test_a_part_measures_something(part, smoke):
    figures = [cell for table in smoke[part] for row in table["rows"].values() for cell in row.values()]
    numbers = [cell for cell in figures if isinstance(cell, int | float)]
    assert numbers
    assert all(math.isfinite(number) for number in numbers)
    assert all(number >= 0 for number in numbers)


def test_the_loss_is_measured_both_ways(smoke):
    (table,) = smoke["loss"]
    (row,) = table["rows"].values()
    assert set(row) == {"plain MB", "chunked MB", "plain seconds", "chunked seconds", "ratio"}
    assert row["ratio"] == pytest.approx(row["chunked seconds"] / row["plain seconds"])
