"""Two GPUs over NCCL: what two processes on a CPU show over gloo, and what only GPUs can."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.distributed.conftest import Workplace, environment
from tests.distributed.test_failures import Run
from tests.gpu.conftest import BACKEND, REHEARSAL, furthest, losses, needs_real_cuda, needs_two
from tests.gpu.spread import STORAGES
from tests.tolerances import EXACT, HALF

pytestmark = [needs_two, pytest.mark.timeout(600)]
LORA = {"type": "lora", "r": 4}
SGD = {"optim": "sgd", "learning_rate": 0.3}
STRATEGIES = ("ddp", "fsdp2")
HALVES = ["training.per_device_train_batch_size=2"]
BASES = {
    "fp32": ["training.mixed_precision=no"],
    "bf16": ["training.mixed_precision=bf16"],
    "nf4": ["training.mixed_precision=no", "quantization.type=nf4", "quantization.compute_dtype=bfloat16"],
}
TOLERANCE = {"fp32": EXACT[torch.float32], "bf16": HALF[torch.bfloat16], "nf4": HALF[torch.bfloat16]}
SOON = 30 + 15
"""Seconds within which a run must have ended after one process failed. One that waits in a kernel of NCCL hears no
signal, and is given 30 seconds before it is killed."""


def two_devices():
    """Returns an environment that shows the first two of the GPUs that this process sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else ["0", "1"]
    return environment(**({} if REHEARSAL else {"CUDA_VISIBLE_DEVICES": ",".join(names[:2])}))


def train(workplace, name, recipe, *overrides, alone=False):
    """Runs `peftcli train` as a person types it, which uses both devices unless one is named."""
    options = ["--device=cuda:0"] if alone else []
    if REHEARSAL:
        options = ["--device=cpu", f"--num-processes={1 if alone else 2}"]
    command = ["train", str(recipe), *overrides, f"output_dir={workplace.folder / name}", *options]
    done = subprocess.run(
        [sys.executable, "-m", "peftcli", *command],
        env=two_devices(),
        cwd=workplace.folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, word_tokenizer, rows):
    return Workplace(tmp_path_factory.mktemp("two-gpus"), word_tokenizer, rows)


@pytest.fixture(scope="module")
def alone(workplace):
    """Makes a run on one device, once for each base."""

    def make(base):
        recipe = workplace.recipe(base, LORA, **SGD)
        if not (workplace.folder / f"{base}-one").exists():
            train(workplace, f"{base}-one", recipe, *BASES[base], alone=True)
        return recipe

    return make


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("base", BASES)
def test_two_train_what_one_does(base, strategy, workplace, alone):
    recipe, name = alone(base), f"{base}-{strategy}"
    said = train(workplace, name, recipe, *BASES[base], *HALVES, f"distributed.strategy={strategy}")
    assert ("fsdp2: " in said) == (strategy == "fsdp2")
    facts = workplace.manifest(name)
    assert (facts["processes"], facts["backend"]) == (2, BACKEND)
    assert furthest(workplace.adapter(name), workplace.adapter(f"{base}-one")) <= TOLERANCE[base]
    found, expected = (losses(workplace.folder / one) for one in (name, f"{base}-one"))
    assert found == pytest.approx(expected, rel=TOLERANCE[base])


@needs_real_cuda
def test_both_skip_the_same_steps(workplace):
    """One loss scale on two devices: an overflow on either is one on both."""
    recipe = workplace.recipe("fp16", LORA, **SGD, mixed_precision="fp16")
    train(workplace, "fp16-one", recipe, alone=True)
    train(workplace, "fp16-ddp", recipe, *HALVES)
    assert furthest(workplace.adapter("fp16-ddp"), workplace.adapter("fp16-one")) <= HALF[torch.bfloat16]
    states = [
        json.loads((workplace.folder / run / "checkpoint-12" / "state.json").read_text())["progress"]["loss_scale"]
        for run in ("fp16-one", "fp16-ddp")
    ]
    assert states[0] == states[1]


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """What two processes found of spread models, for each storage: a list with an entry for each process."""
    folder = tmp_path_factory.mktemp("spread")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*start, "-m", "tests.gpu.spread", str(folder)],
        env=two_devices(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    both = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    return {storage: [one[storage] for one in both] for storage in STORAGES}


@pytest.mark.parametrize("storage", STORAGES)
def test_packed_bytes_arrive_as_they_were(storage, spread):
    """On the way forward and back; bytes among them that are NaNs to whoever takes them for numbers."""
    for found in spread[storage]:
        assert found["wrong"] == []
        assert found["looked_at"] == 2 * found["packed"] > 0


@needs_real_cuda
@pytest.mark.parametrize("storage", STORAGES)
def test_each_device_holds_half_of_the_base(storage, spread):
    """In the allocator's own count, with the adapters and how the packed weights are to be read beside the shares."""
    for found in spread[storage]:
        assert 0.45 < found["held"] / found["whole"] < 0.65


class OnBoth(Run):
    """A run on both devices of which one process is to fail."""

    def command(self, *options):
        where = ["--device=cpu"] if REHEARSAL else ["--device=cuda"]
        return ["train", str(self.recipe), *self.changes, *where, *options]


def test_a_process_that_dies_ends_the_run_soon(workplace, alone):
    recipe = alone("fp32")
    run = OnBoth(workplace, "killed", "killed", 7, *BASES["fp32"])
    code, said, seconds = run.ended()
    assert code == 6, said
    assert said.count("error:") == 1, said
    assert "process 1 of the run was killed by SIGKILL" in said
    assert seconds < SOON
    assert recipe.exists()
    assert furthest(run.goes_on(), workplace.adapter("fp32-one")) <= TOLERANCE["fp32"]


def test_a_process_that_hangs_ends_the_run(workplace):
    """NCCL's own watchdog ends the one that waits: it may be heard of by its signal alone."""
    run = OnBoth(workplace, "hangs", "hangs", 7, *BASES["fp32"], "distributed.timeout=10")
    code, said, seconds = run.ended(180)
    assert code == 6, said
    assert said.count("error:") == 1, said
    assert seconds < 10 + 2 * SOON
