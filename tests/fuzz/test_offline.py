"""Without a network, and with secrets in the environment: what runs, what fails and how, and what is said of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from tests.fuzz.auditing import watched

CANARY = "c4n4ry"
SECRETS = {
    "HF_TOKEN": f"hf_{CANARY}AAAAAAAAAAAAAAAAAAAAAAAAAA",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{CANARY}BBBBBBBBBBBBBBBBBBBBBBBBBB",
    "WANDB_API_KEY": f"{CANARY}0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}/aws",
    "HF_ENDPOINT": f"https://user:{CANARY}@hub.invalid",
}
MOST_SECONDS = 5.0
KNOWN = "'uname'"
"""What Python's own `platform` starts, to name the processor in a manifest."""
LOCAL = (
    ["validate", "r.yaml"],
    ["plan", "r.yaml"],
    ["preview", "r.yaml"],
    ["train", "r.yaml"],
    ["eval", "run"],
    ["merge", "run"],
    ["export", "run"],
    ["generate", "run", "the cat", "--max-new-tokens", "2"],
    ["eval", "--adapter", "run/checkpoint-1", "--model", "model", "--data", "eval.jsonl"],
    ["train", "r.yaml", "--resume", "training.max_steps=2"],
    ["env"],
    ["env", "--json"],
    ["recipes"],
)
FAILING = {
    "a hub model": (["validate", "r.yaml", "model.name=nobody/nothing"], 4, "nobody/nothing"),
    "a hub model to train": (["train", "r.yaml", "model.name=nobody/nothing", "output_dir=a"], 4, "nobody/nothing"),
    "a hub dataset": (["validate", "r.yaml", "data.train=nobody/rows"], 3, "nobody/rows"),
    "a base at the hub": (["eval", "--adapter", "run", "--model", "nobody/nothing"], 4, "nobody/nothing"),
    "a model's address": (["validate", "r.yaml", f"model.name=https://me:{CANARY}@host/org/m"], 4, "***@host/org/m"),
    "data's address": (["validate", "r.yaml", f"data.train=https://host/d.jsonl?x=1&token={CANARY}"], 3, "token=***"),
    "a token in the recipe": (
        ["validate", "r.yaml", f"model.token=hf_{CANARY}CCCCCCCCCCCCCCCCCCCCCCC"],
        2,
        "model.token",
    ),
    "a bug": (["train", "r.yaml", "output_dir=b", "--device", f"hf_{CANARY}DDDDDDDDDDDDDDDDDDDDDD"], 2, "--device"),
}


def without_network():
    """Returns what to put before a command to take its network away, where this user may; the hook does so anyway."""
    tool = shutil.which("unshare")
    for words in ([tool, "-n"], [tool, "-rn"]) if tool else ():
        if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
            return words
    return []


@pytest.fixture(scope="module")
def found(tmp_path_factory, model_folder, rows):
    """All commands in one process without a network, each with its exit code and all it said and did."""
    folder = tmp_path_factory.mktemp("offline")
    write_jsonl(folder / "train.jsonl", rows[:16])
    write_jsonl(folder / "eval.jsonl", rows[16:20])
    shutil.copytree(model_folder, folder / "model")
    values = {
        "model": {"name": "./model"},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 64},
        "method": {"type": "lora", "r": 2},
        "training": {"max_steps": 2, "save_steps": 1},
        "output_dir": "run",
    }
    (folder / "r.yaml").write_text(json.dumps(values))
    (folder / "plan.json").write_text(json.dumps([*LOCAL, *(arguments for arguments, *_ in FAILING.values())]))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    places = {"HOME": str(folder / "home"), "HF_HOME": str(folder / "home" / "hf"), "PYTHONDONTWRITEBYTECODE": "1"}
    places["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "tmp")
    (folder / "home").mkdir()
    command = [*without_network(), sys.executable, "-m", "tests.fuzz.offline", str(folder)]
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        command, cwd=root, env={**kept, **places, **SECRETS}, capture_output=True, text=True, check=False, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    results = json.loads((folder / "found.json").read_text())
    return folder, {" ".join(one["arguments"]): one for one in results}


@pytest.mark.parametrize("arguments", LOCAL, ids=" ".join)
def test_local_files_need_no_network(found, arguments):
    one = found[1][" ".join(arguments)]
    assert one["code"] == 0, one["stderr"]
    assert one["network"] == []


@pytest.mark.parametrize("case", FAILING)
def test_what_is_not_here_is_named_at_once(found, case):
    arguments, code, said = FAILING[case]
    one = found[1][" ".join(arguments)]
    assert one["code"] == code, one["stderr"]
    assert said in one["stderr"]
    assert "error:" in one["stderr"]
    assert "Traceback" not in one["stderr"]
    assert one["seconds"] < MOST_SECONDS


def test_nothing_is_run_unpickled_or_written_elsewhere(found):
    for one in found[1].values():
        for what in ("processes", "outside", "pickles", "ran"):
            assert [deed for deed in one[what] if KNOWN not in deed] == [], (one["arguments"], what)


def test_secrets_are_nowhere(found):
    folder, results = found
    for one in results.values():
        assert CANARY not in one["stdout"] + one["stderr"], one["arguments"]
    written = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("plan.json", "found.json")]
    assert any(path.name == "manifest.json" for path in written)
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("override", "code"), [("model.name=nobody/nothing", 4), ("data.train=nobody/rows", 3)], ids=["model", "data"]
)
def test_told_to_be_offline_no_connection_is_tried(cli, recipe_file, tmp_path, override, code):
    """The suite runs with HF_HUB_OFFLINE=1."""
    recipe_file()
    with watched(tmp_path) as seen:
        outcome = cli("train", "recipe.yaml", override)
    assert outcome[0] == code
    assert seen.network == []
