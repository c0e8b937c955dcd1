"""Commands import what they need: looking something up no torch, and work no library but those it is done with."""

import gc
import json
import subprocess
import sys
import time

import pytest

from peftcli import startup

COMMANDS = (
    ["--help"],
    ["--version"],
    ["train", "--help"],
    ["eval", "--help"],
    ["generate", "--help"],
    ["methods"],
    ["methods", "dora"],
    ["recipes"],
    ["recipes", "quickstart"],
    ["schema"],
    ["validate", "--form-only", "recipe.yaml"],
    ["train", "nowhere.yaml"],
    ["validate", "--form-only", "wrong.yaml"],
)
HEAVY = (
    *("torch", "transformers", "datasets", "accelerate", "peft", "numpy", "safetensors", "bitsandbytes"),
    *("huggingface_hub", "tokenizers", "sympy", "pyarrow", "PIL", "jinja2"),
)

UNUSED = (
    *("datasets", "pyarrow", "pandas", "bitsandbytes", "peft", "deepspeed", "gguf", "tensorboard"),
    *("scipy", "sklearn", "torchvision", "peftcli.data.images"),
)
"""What no recipe needs that trains a language model on a local file, without quantization."""
TRAINS = ("peftcli.run.training", "peftcli.training.loop", "peftcli.training.optimizers", "peftcli.checkpoint.state")
MERGES = ("peftcli.run.merging", "peftcli.merge")
READS = ("peftcli.data.encoding", "peftcli.data.sources")
"""The modules that train, that merge, and that make samples of rows."""

PROGRAM = """
import gc, json, sys
from peftcli.cli.main import main
commands, names = json.loads(sys.argv[1])
found, too_soon = {}, []
gc.callbacks.append(lambda phase, facts: too_soon.append(phase) if "tokenizers" not in sys.modules else None)
for command in commands:
    sys.argv = ["peftcli", *command]
    try:
        main()
    except SystemExit as ended:
        loaded = [name for name in names if name in sys.modules]
        found[" ".join(command)] = [ended.code, loaded]
print(json.dumps([found, too_soon, gc.isenabled(), gc.get_freeze_count()]), file=sys.stderr)
"""


def run(commands, names, folder):
    """Runs `commands` in one process of their own, and returns what that says of itself."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([commands, names])],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    return json.loads(done.stderr.splitlines()[-1])


def test_no_heavy_import(recipe_file, tmp_path):
    recipe_file()
    recipe_file("wrong.yaml", training={"lerning_rate": 1})
    started = time.monotonic()
    found, *_ = run(COMMANDS, HEAVY, tmp_path)
    seconds = time.monotonic() - started
    expected = {
        " ".join(command): [2 if command[-1] in ("nowhere.yaml", "wrong.yaml") else 0, []] for command in COMMANDS
    }
    assert found == expected
    assert seconds < 10  # torch and transformers alone take about that long on a slow machine


def test_commands_import_what_they_need(recipe_file, tmp_path):
    """And no import is searched for garbage, which goes on once the last large one is done."""
    recipe_file(training={"max_steps": 1})
    names = [*UNUSED, *TRAINS, *MERGES, *READS]
    each = [
        run([["validate", "recipe.yaml"], ["train", "recipe.yaml"]], names, tmp_path),
        run([["merge", "run"]], names, tmp_path),
        run([["eval", "run"]], names, tmp_path),
    ]
    assert {command: said for found, *_ in each for command, said in found.items()} == {
        "validate recipe.yaml": [0, list(READS)],
        "train recipe.yaml": [0, [*TRAINS, *READS]],
        "merge run": [0, list(MERGES)],
        "eval run": [0, list(READS)],
    }
    for _, too_soon, collects, num_kept_out in each:
        assert not too_soon
        assert collects
        assert num_kept_out > 100_000  # torch and transformers are many more objects than the command line


@pytest.fixture
def _collector():
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.usefixtures("_collector")
class TestTheCollector:
    def test_it_goes_on_once_and_leaves_out_what_was_there(self):
        startup.begin()
        assert not gc.isenabled()
        kept = [[] for _ in range(100)]
        before = gc.get_freeze_count()
        startup.done()
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(kept)
        count = gc.get_freeze_count()
        new = [[] for _ in range(100)]
        startup.done()
        assert gc.get_freeze_count() == count
        assert all(gc.is_tracked(one) for one in new)

    def test_a_program_that_collects_for_itself_is_left_alone(self):
        gc.unfreeze()
        gc.disable()
        startup.done()
        assert (gc.isenabled(), gc.get_freeze_count()) == (False, 0)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "peftcli", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "peftcli", "")
