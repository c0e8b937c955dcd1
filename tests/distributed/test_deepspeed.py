"""Half of the frozen base on each of two processes, spread by DeepSpeed's ZeRO-3: the adapter that one process trains.

`make test-deepspeed` runs these, with what they need. Where deepspeed is not installed, those that need it are skipped.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from peftcli import inject, methods
from peftcli.errors import HostError, ModelError
from peftcli.training import zero
from peftcli.training.zero_settings import ZeroSettings
from tests.distributed.conftest import ROOT, environment, furthest
from tests.distributed.test_same_adapter import NAMES, NF4, SETTINGS, TOLERANCE, fields_of
from tests.distributed.test_same_settings import DROPOUT, RECOMPUTED
from tests.tolerances import SAME_ON_RANKS

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'peftcli[deepspeed]'"
)
MIXED = ("bitfit", "full")
"""What trains parts of modules, or all of them."""
CASES = [(name, "fp32", "sgd") for name in NAMES if name not in MIXED]
CASES += [(name, "nf4", "sgd") for name in ("lora", "dora", "vera", "prompt")]
CASES += [("lora", "fp32", "adamw"), ("lora", "nf4", "adamw")]
FURTHER = {
    "accumulated": ["training.gradient_accumulation_steps=2"],
    "checkpointed": [RECOMPUTED],
    "dropout": [DROPOUT],
}
AT_ONCE = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""Every weight is let go of as soon as its module has computed; by default a tiny model's would stay."""


@pytest.fixture(scope="module")
def runs(workplace):
    """All the runs of this file, made once."""
    folder = workplace.folder
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": AT_ONCE}))
    (folder / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))

    def halves(file=folder / "zero3.json", size=2):
        sizes = [f"training.per_device_train_batch_size={size}"]
        return [*sizes, "distributed.strategy=deepspeed", f"distributed.deepspeed_config={file}"]

    def resumed(made, goes_on, *changes):
        target = f"{made}-then-{goes_on}"
        shutil.copytree(folder / f"lora-nf4-adamw-{made}", folder / target)
        shutil.rmtree(folder / target / "checkpoint-12")
        return workplace.job(target, folder / "lora.yaml", *SETTINGS["adamw"], NF4, *changes, resume=True)

    alone, together = [], []
    for name, base, optimizer in CASES:
        path = workplace.recipe(name, fields_of(name))
        own = [*SETTINGS[optimizer], *([NF4] if base == "nf4" else [])]
        alone.append(workplace.job(f"{name}-{base}-{optimizer}-one", path, *own))
        together.append(workplace.job(f"{name}-{base}-{optimizer}-two", path, *own, *halves()))
    path = workplace.recipe("further", fields_of("lora"), optim="sgd", learning_rate=0.3)
    alone.append(workplace.job("further-one", path))
    for label, changes in FURTHER.items():
        cut = halves(size=1) if "accumulated" in label else halves()
        together.append(workplace.job(f"further-{label}", path, *cut, *changes))
    example = ROOT / "configs" / "deepspeed_zero3.json"
    together.append(workplace.job("further-example", path, *halves(example)))
    together.append(workplace.job("further-zero2", path, *halves(folder / "zero2.json")))
    workplace.alone(alone)
    together.append(resumed("one", "two", *halves()))
    workplace.together(together)
    workplace.alone([resumed("two", "one")])
    return workplace


@needs_deepspeed
@pytest.mark.parametrize(("name", "base", "optimizer"), CASES)
def test_two_processes_train_what_one_does(name, base, optimizer, runs):
    case = f"{name}-{base}-{optimizer}"
    assert furthest(runs.adapter(f"{case}-one"), runs.adapter(f"{case}-two")) <= TOLERANCE[optimizer]


@needs_deepspeed
@pytest.mark.parametrize("label", ["accumulated", "checkpointed", "example", "zero2"])
def test_however_it_is_done(label, runs):
    assert furthest(runs.adapter("further-one"), runs.adapter(f"further-{label}")) <= SAME_ON_RANKS


@needs_deepspeed
def test_processes_draw_noise_of_their_own(runs):
    drawn = runs.adapter("further-dropout")
    assert furthest(runs.adapter("further-one"), drawn) > 100 * SAME_ON_RANKS


@needs_deepspeed
@pytest.mark.parametrize("which", ["one-then-two", "two-then-one"])
def test_checkpoints_of_any_number(which, runs):
    assert furthest(runs.adapter("lora-nf4-adamw-one"), runs.adapter(which)) <= TOLERANCE["adamw"]
    assert [entry["step"] for entry in runs.metrics(which) if "loss" in entry] == list(range(1, 13))


@needs_deepspeed
def test_they_say_the_same_on_the_way(runs):
    one, two = (runs.metrics(f"dora-nf4-sgd-{which}") for which in ("one", "two"))
    assert len(one) == len(two)
    for mine, theirs in zip(one, two, strict=True):
        for key in set(mine) - {"tokens_per_second", "memory_gb"}:
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4), key


@needs_deepspeed
def test_half_of_the_base_lies_on_each(tmp_path):
    """And no more after a step; nothing is on stdout, and no library is compiled."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*start, "-m", "tests.distributed.zero_worker", str(tmp_path)],
        env=environment(TORCH_EXTENSIONS_DIR=str(tmp_path / "compiled"), CXX="/bin/false"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == ""
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for one in found:
        assert one["gathered_before"] == one["gathered_after"] == 0
        assert one["whole"] == one["adapters"] > 0
        assert one["share"] == pytest.approx(one["base"] / 2, abs=one["tensors"])  # an odd one is padded
        assert one["said"].startswith(f"deepspeed: {one['tensors']} tensors are spread, ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json"]


@pytest.fixture
def grafted(make_model):
    def graft(name, **changes):
        model = make_model(**changes)
        method = methods.load(name)
        inject.graft(model, method, method.Config.model_validate(fields_of(name)), 0)
        return model, {parameter for parameter in model.parameters() if parameter.requires_grad}

    return graft


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MIXED])
def test_deepspeed_sees_only_what_is_frozen(name, grafted):
    """And the model is the same again after it, whatever modules it holds twice."""
    model, trains = grafted(name)
    model.model.again = model.model.layers[0]  # as T5 does with its embedding
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    adapters = {parameter for part in inject.parts(model).values() for parameter in part.parameters()}
    with zero._taken_out(model, trains):
        zero._refuse_mixed(model)
        assert not set(model.parameters()) & (trains | adapters)
        assert len(list(model.parameters())) > 20
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(("name", "what"), [("bitfit", "beside frozen weights"), ("full", "no weight is frozen")])
def test_what_cannot_be_split_is_refused(name, what, grafted):
    model, trains = grafted(name)
    with zero._taken_out(model, trains), pytest.raises(ModelError, match=what) as raised:
        zero._refuse_mixed(model)
    assert "fsdp2" in raised.value.problems[0].hint


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(HostError, match="needs the package deepspeed") as raised:
        zero.begin(ZeroSettings(tmp_path / "ds.json", {}, 3, ()), torch.device("cpu"))
    assert "peftcli[deepspeed]" in raised.value.problems[0].hint
