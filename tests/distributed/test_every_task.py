"""Every task on two processes: the head that trains beside the adapter, and the figures of an evaluation shared out."""

import json

import pytest

from tests.conftest import write_jsonl
from tests.distributed.conftest import furthest
from tests.families import save_family
from tests.run.tasks import FAMILY, sample
from tests.tolerances import SAME_ON_RANKS

TASKS = {
    "seq2seq-lm": lambda i: sample("seq2seq-lm", i),
    "sequence-classification": lambda i: sample("sequence-classification", i),
    "token-classification": lambda i: sample("token-classification", i),
    "regression": lambda i: {**sample("sequence-classification", i), "label": float(i % 5) / 4 + 0.1},
    "multi-label": lambda i: {**sample("sequence-classification", i), "label": [["a"], ["b"], ["a", "b"]][i % 3]},
    "image-classification": None,
}
STRATEGIES = ("ddp", "fsdp2")
NUM_ROWS, NUM_HELD_OUT = 13, 9


def images(folder, count):
    """Writes coloured squares into a folder for each of two labels; returns the folder."""
    from PIL import Image

    for i in range(count):
        path = folder / ("dark" if i % 2 else "light") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (10 * i, 200 - 9 * i, 30 + i)).save(path)
    return folder


def without_dropout(folder):
    """Returns a model's folder, of which dropout would draw other numbers in each process."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: 0.0 if "dropout" in key and value else value for key, value in config.items()}))
    return folder


def recipe(workplace, name):
    """Writes the recipe of a task and returns its path."""
    folder = workplace.folder / f"{name}-data"
    folder.mkdir()
    task = "sequence-classification" if name in ("regression", "multi-label") else name
    family = "vit" if task == "image-classification" else FAMILY[task]
    if task == "image-classification":
        train, held_out = images(folder / "train", NUM_ROWS), images(folder / "eval", NUM_HELD_OUT)
    else:
        train = write_jsonl(folder / "train.jsonl", [TASKS[name](i) for i in range(NUM_ROWS)])
        held_out = write_jsonl(folder / "eval.jsonl", [TASKS[name](i) for i in range(NUM_HELD_OUT)])
    values = {
        "model": {"name": str(without_dropout(save_family(family, folder / family))), "task": task},
        "data": {"train": str(train), "eval": str(held_out)},
        "method": {"type": "lora", "r": 4},
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 2,
            "logging_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "head_learning_rate": 0.05,
        },
    }
    if task != "image-classification":
        values["data"]["max_length"] = 32
    if "classification" not in task:
        del values["training"]["head_learning_rate"]
    path = workplace.folder / f"{name}.yaml"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def runs(workplace):
    alone, together = [], []
    for name in TASKS:
        path = recipe(workplace, name)
        alone.append(workplace.job(f"{name}-one", path))
        for strategy in STRATEGIES:
            halves = ["training.per_device_train_batch_size=2", f"distributed.strategy={strategy}"]
            together.append(workplace.job(f"{name}-{strategy}", path, *halves))
    workplace.alone(alone)
    workplace.together(together)
    return workplace


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", TASKS)
def test_two_processes_train_and_measure_what_one_does(name, strategy, runs):
    assert furthest(runs.adapter(f"{name}-one"), runs.adapter(f"{name}-{strategy}")) <= SAME_ON_RANKS
    one, two = (runs.manifest(f"{name}-{which}")["result"]["eval"] for which in ("one", strategy))
    assert one.keys() == two.keys()
    assert len(one) >= 2
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-3), key  # a correlation of nearly equal numbers


@pytest.mark.parametrize("name", ["sequence-classification", "token-classification", "image-classification"])
def test_the_head_is_in_the_file_whole(name, runs):
    heads = [
        {key: tuple(tensor.shape) for key, tensor in runs.adapter(f"{name}-{which}").items() if "classifier" in key}
        for which in ("one", *STRATEGIES)
    ]
    assert heads[0]
    assert heads[0] == heads[1] == heads[2]
