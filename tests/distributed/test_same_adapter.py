"""One process, two with a base each, two with half a base each: the same adapter, whatever the method and the base.

A step takes four samples either way: one process has them all, of two each has two. The rows do not fill the last
step of an epoch: there one process has a single sample and the other none.
"""

import json
import shutil

import pytest
import torch

from peftcli import methods
from tests.distributed.conftest import furthest
from tests.methods.building import SMALL
from tests.tolerances import SAME_ON_RANKS, SAME_STEPS

NAMES = methods.names()
QUANTISED = ["lora", "dora", "vera", "hydralora", "prompt", "adapter"]
NF4 = "quantization.type=nf4"
STRATEGIES = ("ddp", "fsdp2")
TOLERANCE = {"sgd": SAME_ON_RANKS, "adamw": SAME_STEPS}
SETTINGS = {
    "sgd": ["training.optim=sgd", "training.learning_rate=0.3"],
    # Adam divides by the gradient's own size: of one near 0 it makes a whole step, and of its rounding too.
    "adamw": ["training.optim=adamw", "training.learning_rate=0.002"],
}
CASES = [(name, base, "sgd") for name in NAMES for base in ("fp32", "nf4") if base == "fp32" or name in QUANTISED]
CASES += [("full", "fp32", "adamw")]  # whose optimizer's state is spread too
CASES += [(name, base, "adamw") for name in QUANTISED for base in ("fp32", "nf4")]


def fields_of(name):
    own = methods.load(name).Config.model_fields
    fields = {"type": name, **{key: value for key, value in SMALL.items() if key in own}}
    return fields | ({"target_modules": "all-linear"} if "target_modules" in own else {})


@pytest.fixture(scope="module")
def runs(workplace):
    """All the runs of this file, made once."""
    alone, together = [], []
    for name, base, optimizer in CASES:
        path = workplace.recipe(name, fields_of(name))
        own = [*SETTINGS[optimizer], *([NF4] if base == "nf4" else [])]
        alone.append(workplace.job(f"{name}-{base}-{optimizer}-one", path, *own))
        for strategy in STRATEGIES:
            halves = ["training.per_device_train_batch_size=2", f"distributed.strategy={strategy}"]
            together.append(workplace.job(f"{name}-{base}-{optimizer}-{strategy}", path, *own, *halves))
    workplace.alone(alone)
    workplace.together(together)
    return workplace


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("name", "base", "optimizer"), CASES)
def test_two_processes_train_what_one_does(name, base, optimizer, strategy, runs, record_property):
    if base == "fp32":  # for the table of what every method can do
        record_property("support", [name, strategy, ""])
    case = f"{name}-{base}-{optimizer}"
    one, two = runs.adapter(f"{case}-one"), runs.adapter(f"{case}-{strategy}")
    assert furthest(one, two) <= TOLERANCE[optimizer]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "head"])
def test_they_do_train(name, runs):
    """Otherwise the comparison above would say nothing."""
    logged = runs.metrics(f"{name}-fp32-sgd-ddp")
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert len(losses) == 12
    first, last = (runs.metrics(f"{name}-fp32-sgd-one")[index]["grad_norm"] for index in (0, -2))
    assert first > 0
    assert last > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", QUANTISED)
def test_they_say_the_same_on_the_way(name, strategy, runs):
    """Losses are divided by the tokens of all processes, evaluations shared out and added up."""
    one, two = (runs.metrics(f"{name}-fp32-sgd-{which}") for which in ("one", strategy))
    assert len(one) == len(two)
    for mine, theirs in zip(one, two, strict=True):
        for key in set(mine) - {"tokens_per_second", "memory_gb"}:
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4), key
    facts = [runs.manifest(f"{name}-fp32-sgd-{which}") for which in ("one", strategy)]
    assert facts[0]["result"]["supervised_tokens"] == facts[1]["result"]["supervised_tokens"]
    assert [fact["processes"] for fact in facts] == [1, 2]
    assert facts[0]["parameters"] == facts[1]["parameters"]


class TestCheckpointsOfAnyNumber:
    """What some processes saved, others go on from."""

    @pytest.fixture(scope="class")
    @classmethod
    def resumed(cls, runs):
        """Runs that go on from the sixth step of one that some other number of processes made."""
        alone, together = [], []
        for name in ("lora", "full"):
            path = runs.folder / f"{name}.yaml"
            for made in ("one", *STRATEGIES):
                for goes_on in ("one", *STRATEGIES):
                    target = f"{name}-{made}-then-{goes_on}"
                    shutil.copytree(runs.folder / f"{name}-fp32-sgd-{made}", runs.folder / target)
                    shutil.rmtree(runs.folder / target / "checkpoint-12")
                    halves = ["training.per_device_train_batch_size=2", f"distributed.strategy={goes_on}"]
                    changes = [*SETTINGS["sgd"], *(halves if goes_on != "one" else [])]
                    (alone if goes_on == "one" else together).append(runs.job(target, path, *changes, resume=True))
        runs.alone(alone)
        runs.together(together)
        return runs

    @pytest.mark.parametrize("goes_on", ["one", *STRATEGIES])
    @pytest.mark.parametrize("made", ["one", *STRATEGIES])
    @pytest.mark.parametrize("name", ["lora", "full"])
    def test_they_end_alike(self, name, made, goes_on, resumed):
        through = resumed.adapter(f"{name}-fp32-sgd-one")
        assert furthest(through, resumed.adapter(f"{name}-{made}-then-{goes_on}")) <= SAME_ON_RANKS
        steps = [entry["step"] for entry in resumed.metrics(f"{name}-{made}-then-{goes_on}") if "loss" in entry]
        assert steps == list(range(1, 13))

    def test_the_files_do_not_tell_how_many_there_were(self, runs):
        made = [runs.folder / f"lora-fp32-sgd-{which}" / "checkpoint-6" for which in ("one", *STRATEGIES)]
        names = [sorted(path.name for path in folder.iterdir()) for folder in made]
        assert names[0] == names[1] == names[2]
        configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in made]
        assert configs[0] == configs[1] == configs[2]


def test_what_is_spread_is_the_base_alone(runs):
    """Half of every frozen weight lies on each process; the adapter's files hold all of it."""
    whole = runs.adapter("full-fp32-sgd-one")
    spread = runs.adapter("full-fp32-sgd-fsdp2")
    assert {key: tensor.shape for key, tensor in whole.items()} == {k: t.shape for k, t in spread.items()}
    assert all(torch.isfinite(tensor).all() for tensor in spread.values())
