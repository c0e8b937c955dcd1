"""The benchmarks: that they measure, not how fast anything is."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.bench import execution, merging, scaling, startup, timing
from scripts.bench.__main__ import PARTS
from scripts.bench.table import Options, Table, shown

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


def test_no_script_hides_a_module_of_pythons_own():
    """A worker's folder comes first where Python looks for modules."""
    names = {path.stem for path in (REPOSITORY / "scripts").rglob("*.py")}
    assert not names & sys.stdlib_module_names - {"__main__"}


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


def test_a_process_is_timed_to_the_line_that_is_waited_for():
    code = (
        "import time; print('step 0'); time.sleep(0.2); print('step 1', flush=True); time.sleep(0.3); print('step 1')"
    )
    found = timing.process([sys.executable, "-c", code], threads=1, mark="step 1")
    assert 0.2 <= found.marked <= found.seconds - 0.3
    assert timing.medians({"a": [found]}) == {"a": found}
    with pytest.raises(SystemExit, match="no line that begins with 'step 2'"):
        timing.process([sys.executable, "-c", code], threads=1, mark="step 2")


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


STARTS_PROCESSES = ["end_to_end", "merging", "startup"]
"""The parts that run whole commands, on the model that they are told."""
IN_PROCESS = [part for part in PARTS if part not in STARTS_PROCESSES]
"""The parts that run on small models of their own."""
SIGNED = ("growth", "peftcli, µs", "PEFT, µs")
"""Columns whose figures may be below 0 where so little is measured."""


@pytest.fixture(scope="module")
def smoke(model_folder):
    """What all parts find; those in one process in one: most of the time goes into its imports."""
    done = bench(*PARTS, "--smoke", "--json", "--threads", "1", "--model", str(model_folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["parts"]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_measures_something(part, smoke):
    lines = [row for table in smoke[part] for row in table["rows"].values()]
    numbers = [(name, cell) for row in lines for name, cell in row.items() if isinstance(cell, int | float)]
    assert numbers
    assert all(math.isfinite(number) for _, number in numbers)
    assert all(number >= 0 for name, number in numbers if name not in SIGNED)


def test_both_merge_the_same(smoke):
    (table,) = smoke["merging"]
    assert list(table["rows"]) == [merging.OURS, merging.THEIRS]
    # two layers of seven
    assert "LoRA of rank 16 in 14 weights" in table["notes"][0]
    assert float(table["notes"][0].split()[-3]) < 1e-6


def test_a_training_is_timed_to_its_first_step(smoke):
    (table,) = smoke["startup"]
    for name in (startup.TRAIN, startup.BARE):
        row = table["rows"][name]
        assert 0 < row["first step, seconds"] < row["to the end, seconds"]
    assert table["rows"][startup.BARE]["ratio"] == 1
    assert table["rows"]["peftcli --help"]["first step, seconds"] is None


def test_what_would_be_offloaded_is_counted_and_not_timed(smoke):
    (table,) = smoke["execution"]
    row = table["rows"]["lora: activation_offloading"]
    assert row["moved MB"] > 0
    assert row["time"] is None


@pytest.mark.parametrize(
    ("power", "said"),
    [(0.5, "no"), (1.0, "no"), (1.5, "yes"), (2.0, "yes")],
    ids=["square-root", "linear", "3/2", "square"],
)
def test_growth_is_the_power_of_the_size(power, said):
    sizes = (2, 4, 8, 16)
    seconds = np.array([[0.01 * size**power * machine for machine in (1, 3, 2)] for size in sizes])
    found = scaling.growth(sizes, seconds)
    assert found["growth"] == pytest.approx(power, abs=1e-12)
    assert found["a unit, last ÷ first"] == pytest.approx(8 ** (power - 1))
    assert found["worse than linear"] == said


def test_growth_of_noise_is_not_told():
    seconds = np.array([[-0.1, 0.1, -0.1], [0.1, 0.2, 0.1]])  # two of three rounds found less than nothing
    assert scaling.growth((1, 2), seconds)["worse than linear"] == "not told from noise"


def test_rows_are_chosen_by_their_names(tmp_path):
    options = Options(rounds=1, smoke=False, threads=1, model=tmp_path, only="Llama: lora: (torch|both)")
    assert execution.wanted("Llama", options) == [("lora", ["torch_compile"]), ("lora", ["both"])]
    assert execution.wanted("another", options) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("loss", "--only", "x"), "--only chooses rows of execution and scaling"),
        (("scaling", "--only", "("), "unterminated"),
        (("scaling", "--smoke", "--only", "no such row"), "part scaling has no row"),
        (("startup", "--model", "no/such/folder"), "there is no model in no/such/folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, said):
    done = bench(*arguments)
    assert done.returncode
    assert said in done.stderr


def test_the_loss_is_measured_both_ways(smoke):
    (table,) = smoke["loss"]
    (row,) = table["rows"].values()
    assert set(row) == {"plain MB", "chunked MB", "plain seconds", "chunked seconds", "ratio"}
    assert row["ratio"] == pytest.approx(row["chunked seconds"] / row["plain seconds"])
