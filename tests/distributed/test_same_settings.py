"""Settings that must not change what is trained, in two processes as in one: a step cut up, recomputed, compiled.

The rows and steps are those of `test_same_adapter`, which holds the methods and the bases against each other.
"""

import shutil

import pytest

from tests.distributed.conftest import furthest
from tests.tolerances import SAME_ON_RANKS

STRATEGIES = ("ddp", "fsdp2")
NF4 = "quantization.type=nf4"
RECOMPUTED = "training.gradient_checkpointing=true"
COMPILED = "training.torch_compile=true"
# What changes -> the changes, and the circumstances of the worker.
SAME = {
    "a sample at a time": (
        ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2"],
        None,
    ),
    "recomputed": ([RECOMPUTED], None),
    "encoded once": (["data.cache=true"], None),
    "in chunks": ([], "chunks"),  # of which one process of the two has more than the other
    "in chunks, on NF4": ([NF4], "chunks"),
    # FSDP2 gathers a layer before its compiled code runs, and takes it apart again behind it.
    "compiled and recomputed": ([COMPILED, RECOMPUTED], "traced"),
}
PACKING = ["data.packing=true", "data.max_length=24"]
DROPOUT = "method.dropout=0.5"
ADAMW = ["training.learning_rate=0.002", DROPOUT]
RESUMED = {
    "accumulated": [
        *("training.optim=adamw", "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2"),
        *ADAMW,
    ],
    "on NF4, in 8 bits": ["training.optim=adamw_8bit", NF4, *ADAMW],
    "packs": ["training.optim=adamw", *PACKING, *ADAMW],
}
"""Runs that have something to lose: moments, noise, the place within a step and within the packs of an epoch."""


@pytest.fixture(scope="module")
def runs(workplace):
    """All the runs of this file, made once."""
    method = {"type": "lora", "r": 4, "target_modules": "all-linear"}
    path = workplace.recipe("recipe", method, optim="sgd", learning_rate=0.3)
    workplace.alone(
        [
            workplace.job("one", path),
            workplace.job("one-nf4", path, NF4),
            workplace.job("one-packed", path, *PACKING),
        ]
    )
    together = []
    for strategy in STRATEGIES:
        halves = ["training.per_device_train_batch_size=2", f"distributed.strategy={strategy}"]
        for label, (changes, under) in SAME.items():
            together.append(workplace.job(f"{label}-{strategy}", path, *halves, *changes, under=under))
        together.append(workplace.job(f"packed-{strategy}", path, *halves, *PACKING))
        together.append(workplace.job(f"dropout-{strategy}", path, *halves, DROPOUT))
        for label, changes in RESUMED.items():
            together.append(workplace.job(f"{label}-{strategy}", path, *halves, *changes))
    workplace.together(together)
    return workplace


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("label", SAME)
def test_the_same_is_trained(label, strategy, runs):
    one = "one-nf4" if NF4 in SAME[label][0] else "one"
    assert furthest(runs.adapter(one), runs.adapter(f"{label}-{strategy}")) <= SAME_ON_RANKS


def test_both_processes_and_all_runs_share_what_was_encoded(runs):
    kept = [path.name for path in (runs.folder / "cache/peftcli/data").iterdir() if path.name != ".locks"]
    assert len(kept) == 2  # training and evaluation data


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packs_are_shared_out(strategy, runs):
    one, two = runs.manifest("one-packed"), runs.manifest(f"packed-{strategy}")
    assert furthest(runs.adapter("one-packed"), runs.adapter(f"packed-{strategy}")) <= SAME_ON_RANKS
    assert one["result"]["supervised_tokens"] == two["result"]["supervised_tokens"]
    plain = runs.manifest("one")  # of which a step holds fewer samples
    assert one["result"]["supervised_tokens"] > 1.5 * plain["result"]["supervised_tokens"]


def test_processes_draw_noise_of_their_own(runs):
    ddp, fsdp2 = (runs.adapter(f"dropout-{strategy}") for strategy in STRATEGIES)
    assert furthest(ddp, fsdp2) <= SAME_ON_RANKS
    assert furthest(runs.adapter("one"), ddp) > 100 * SAME_ON_RANKS


class TestResuming:
    @pytest.fixture(scope="class")
    @classmethod
    def resumed(cls, runs):
        """The same runs once more, from their sixth step to the end."""
        jobs = []
        for strategy in STRATEGIES:
            halves = ["training.per_device_train_batch_size=2", f"distributed.strategy={strategy}"]
            for label, changes in RESUMED.items():
                target = f"{label}-{strategy}-again"
                shutil.copytree(runs.folder / f"{label}-{strategy}", runs.folder / target)
                shutil.rmtree(runs.folder / target / "checkpoint-12")
                path = runs.folder / "recipe.yaml"
                jobs.append(runs.job(target, path, *halves, *changes, resume=True))
        runs.together(jobs)
        return runs

    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("label", RESUMED)
    def test_two_processes_end_with_the_same_bits(self, label, strategy, resumed):
        through, again = (resumed.folder / f"{label}-{strategy}{end}" for end in ("", "-again"))
        for file in ("adapter_model.safetensors", "checkpoint-12/optimizer.safetensors"):
            assert (again / file).read_bytes() == (through / file).read_bytes(), file
        assert (through / "adapter_model.safetensors").read_bytes() != (
            through / "checkpoint-6" / "adapter_model.safetensors"
        ).read_bytes()
