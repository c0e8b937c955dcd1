"""Looking something up is quick: none of it imports torch."""

import json
import subprocess
import sys
import time

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
HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "numpy", "safetensors")

PROGRAM = """
import json, sys
from peftcli.cli.main import main
found = {}
commands, heavy = json.loads(sys.argv[1])
for command in commands:
    sys.argv = ["peftcli", *command]
    try:
        main()
    except SystemExit as ended:
        loaded = [name for name in heavy if name in sys.modules]
        found[" ".join(command)] = [ended.code, loaded]
print(json.dumps(found), file=sys.stderr)
"""


def test_no_heavy_import(recipe_file, tmp_path):
    recipe_file()
    recipe_file("wrong.yaml", training={"lerning_rate": 1})
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([COMMANDS, HEAVY])],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    seconds = time.monotonic() - started
    found = json.loads(done.stderr.splitlines()[-1])
    expected = {
        " ".join(command): [2 if command[-1] in ("nowhere.yaml", "wrong.yaml") else 0, []] for command in COMMANDS
    }
    assert found == expected
    assert seconds < 10  # torch and transformers alone take about that long on a slow machine


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "peftcli", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "peftcli", "")
