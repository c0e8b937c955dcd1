"""What is computed in half precision and what is not, and the loss scale of float16.

Accelerate knows no float16 on a CPU, so peftcli refuses it there. torch has both its autocast and its gradient scaler
on a CPU: with these two put into an Accelerator, the loop's own part of it runs here.
"""

import json
import math
from collections import defaultdict

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from peftcli import methods
from peftcli.checkpoint import state
from peftcli.checkpoint.moments import method_state, optimizer_tensors
from peftcli.errors import HostError, NumericalError
from peftcli.run.execution import mixed_precision
from peftcli.training import checks
from peftcli.training.distributed import alone
from tests.conftest import reset_accelerate
from tests.tolerances import HALF

CPU = torch.device("cpu")
PRODUCTS = ("mm", "addmm")
STATISTICS = {"llama": "rsqrt", "gpt2": "native_layer_norm"}
"""The operation in a family's norms that takes in their statistics."""
ADALORA = {"target_r": 2, "warmup_steps": 1, "final_steps": 1, "interval": 1}


class Operations(TorchDispatchMode):
    """Notes the dtypes that each operation's first tensor has, after autocast has had its say."""

    def __init__(self):
        super().__init__()
        self.dtypes = defaultdict(set)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        first = next((one for one in args if isinstance(one, torch.Tensor) and one.is_floating_point()), None)
        if first is not None:
            self.dtypes[function.overloadpacket.__name__].add(first.dtype)
        return function(*args, **(kwargs or {}))


class Scaling(Accelerator):
    """An Accelerator for float16 on a CPU, with a loss scale that starts at `scale`."""

    def __init__(self, scale, growth_interval=2000):
        super().__init__(cpu=True, mixed_precision="fp16")
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)


def lines_of(trainer):
    return [json.loads(line) for line in (trainer.task.run / "metrics.jsonl").read_text().splitlines()]


def taken(trainer):
    """Returns copies of what trains and of the optimizer's state."""
    parameters = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    moments = optimizer_tensors(trainer.task.model, trainer.optimizer)
    return parameters, {name: tensor.detach().clone() for name, tensor in moments.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---- bfloat16 ----


@pytest.fixture
def half():
    """Makes an Accelerator in bfloat16."""

    def make():
        reset_accelerate()
        return Accelerator(cpu=True, mixed_precision="bf16")

    return make


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bf16_is_for_products_alone(family, attention, make_trainer, make_model, half):
    """The softmax of sdpa is inside its kernel, which torch has accumulate in float32; that of eager can be seen."""
    model = make_model(family, attn_implementation=attention)
    trainer = make_trainer(model=model, accelerator=half(), max_steps=1)
    batch = trainer.task.batcher.batch([0, 1])
    with Operations() as seen, trainer.accelerator.autocast():
        summed = trainer.task.objective(model, batch)
    with seen:
        summed.backward()
    of = seen.dtypes
    assert set().union(*(of[name] for name in PRODUCTS)) == {torch.bfloat16}
    for name in (STATISTICS[family], "_log_softmax"):
        assert of[name] == {torch.float32}, name
    assert of["_softmax"] == ({torch.float32} if attention == "eager" else set())
    assert summed.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in trainer.parameters.values()} == {torch.float32}


def test_linear_layers_answer_in_bf16_and_norms_in_float32(make_trainer, make_model, half):
    model = make_model()
    trainer = make_trainer(model=model, accelerator=half(), max_steps=1)
    answers = defaultdict(set)

    def note(module, _, answer):
        answers[type(module).__name__].add(answer.dtype)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) or "Norm" in type(module).__name__:
            module.register_forward_hook(note)
    trainer.run()
    assert {name: dtypes for name, dtypes in answers.items() if "Norm" in name} == {"LlamaRMSNorm": {torch.float32}}
    linear = [dtypes for name, dtypes in answers.items() if "Norm" not in name]
    assert linear
    assert all(dtypes == {torch.bfloat16} for dtypes in linear)


@pytest.mark.parametrize("optim", ["adamw", "sgd", "adafactor", "adamw_8bit"])
def test_what_trains_stays_in_float32_under_bf16(optim, make_trainer, half):
    trainer = make_trainer(accelerator=half(), max_steps=2, optim=optim)
    trainer.run()
    parameters, moments = taken(trainer)
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float32}
    kept = {tensor.dtype for name, tensor in moments.items() if not name.endswith("|step")}
    assert kept <= {torch.float32}  # no tensor here is large enough for 8 bits
    assert bool(kept) == (optim != "sgd")


def test_evaluation_is_in_the_precision_of_training(make_trainer, half):
    seen = []
    trainer = make_trainer([2.0, 1.0], accelerator=half(), max_steps=2, eval_steps=1)
    evaluate = trainer.task.evaluate

    def noting():
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return evaluate()

    object.__setattr__(trainer.task, "evaluate", noting)
    trainer.run()
    assert seen == [(True, torch.bfloat16)] * 2
    assert not torch.is_autocast_enabled("cpu")


def test_bf16_learns_what_float32_does(make_trainer, half):
    losses = []
    for make in (lambda: None, half):
        trainer = make_trainer(accelerator=make(), max_steps=6)
        trainer.run()
        losses.append(list(trainer.task.reporter.losses.values()))
    assert losses[1] == pytest.approx(losses[0], rel=HALF[torch.bfloat16])
    assert losses[1] != losses[0]
    assert losses[0][-1] < losses[0][0]


# ---- float16 and its loss scale ----


@pytest.fixture
def scaled(make_trainer):
    """Makes a Trainer in float16: `scaled(2.0**10, max_steps=3)`."""

    def make(scale, growth_interval=2000, **settings):
        reset_accelerate()
        accelerator = Scaling(scale, growth_interval)
        return make_trainer(accelerator=accelerator, **{"warmup_steps": 0, "max_grad_norm": 1.0, **settings})

    return make


def overflowing(trainer, steps):
    """Makes the gradient of one parameter overflow in some steps, counted from 0."""
    parameter = list(trainer.parameters.values())[-1]
    parameter.register_hook(lambda gradient: gradient * math.inf if trainer.progress.step in steps else gradient)


@pytest.mark.parametrize("optim", ["adamw", "sgd", "adafactor", "adamw_8bit"])
def test_an_overflow_skips_the_step_and_halves_the_scale(optim, scaled, monkeypatch):
    told, before = [], {}
    monkeypatch.setattr(methods.load("lora"), "after_step", classmethod(lambda *about: told.append(about[-2])))
    trainer = scaled(1024.0, max_steps=3, optim=optim)
    overflowing(trainer, {1})

    def look(step):
        before[step] = (taken(trainer), trainer.accelerator.scaler.get_scale())

    trainer.task.reporter.on_step = look
    trainer.run()
    (first, scale), (second, lowered), (third, _) = before[1], before[2], before[3]
    assert (scale, lowered) == (1024.0, 512.0)
    assert_equal(second[0], first[0])
    assert_equal(second[1], first[1])
    assert any(not torch.equal(third[0][name], tensor) for name, tensor in first[0].items())
    assert told == [1, 3]


def test_an_overflow_in_float16_itself(scaled):
    """A scale beyond what float16 holds, as it may be when a run starts: products overflow on the way back."""
    trainer = scaled(2.0**40, max_steps=45, save_steps=45, logging_steps=9)
    trainer.run()
    scale = trainer.accelerator.scaler.get_scale()
    assert 1 <= scale < 2.0**30
    losses = list(trainer.task.reporter.losses.values())
    skipped = round(40 - math.log2(scale))
    assert skipped > 10
    first_cycle = losses[:4]
    assert losses[4:8] == pytest.approx(first_cycle, rel=0.5)  # nothing was learned yet
    assert losses[-1] < losses[3]


def test_what_was_skipped_is_in_no_average(scaled):
    """JSON has no infinity, and a mean with one in it says nothing."""
    trainer = scaled(1024.0, max_steps=4, logging_steps=2)
    overflowing(trainer, {1, 2, 3})
    result = trainer.run()
    first, second = lines_of(trainer)
    assert math.isfinite(first["grad_norm"])
    assert "grad_norm" not in second
    json.dumps(result.last_log, allow_nan=False)


def test_a_method_measures_no_gradient_that_overflowed(scaled):
    """AdaLoRA's averages of |weight · gradient| would be NaN for the rest of the run."""
    trainer = scaled(1024.0, method="adalora", fields=ADALORA, max_steps=4)
    overflowing(trainer, {0, 1})
    trainer.run()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in method_state(trainer.task.model).values())


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(scaled):
    trainer = scaled(4.0, max_steps=30, save_steps=1)
    overflowing(trainer, range(1, 30))
    with pytest.raises(NumericalError, match=r"step 5: the gradient of .* is not finite; the step was not applied"):
        trainer.run()
    assert trainer.accelerator.scaler.get_scale() == 0.5


def test_a_loss_that_is_not_finite_is_no_overflow(scaled, make_model):
    model = make_model()
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(NumericalError, match="step 1: the loss is nan"):
        scaled(1024.0, model=model, max_steps=3).run()


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("limit", [1e-2, None], ids=["clipped", "unclipped"])
def test_the_scale_is_gone_before_the_step(limit, optim, scaled):
    """A power of two scales without rounding; what is left is where float16 loses the smallest numbers.

    Of AdamW its first moment is compared: the step itself does not tell a large gradient from a small one.
    """
    found = []
    for scale in (1.0, 1024.0):
        trainer = scaled(scale, max_steps=1, max_grad_norm=limit, optim=optim)
        trainer.run()
        parameters, moments = taken(trainer)
        means = {name: tensor for name, tensor in moments.items() if name.endswith("|exp_avg")}
        found.append((means or parameters, [trainer.task.reporter.losses[1], lines_of(trainer)[0]["grad_norm"]]))
    (plain, numbers), (with_scale, scaled_numbers) = found
    assert scaled_numbers == pytest.approx(numbers, rel=HALF[torch.float16])
    assert any(bool(tensor.any()) for tensor in plain.values())
    for name, tensor in plain.items():
        largest = float(tensor.abs().max())
        torch.testing.assert_close(with_scale[name], tensor, rtol=0, atol=HALF[torch.float16] * largest)


def test_float16_learns_what_float32_does(scaled, make_trainer):
    plain = make_trainer(max_steps=6, warmup_steps=0)
    plain.run()
    half = scaled(1024.0, max_steps=6)
    half.run()
    expected, found = (list(one.task.reporter.losses.values()) for one in (plain, half))
    assert found == pytest.approx(expected, rel=HALF[torch.float16])
    assert found != expected


@pytest.mark.parametrize("overflows", [{0}, {0, 1, 2}, {2}], ids=str)
def test_a_resumed_run_has_the_same_scale(overflows, scaled, tmp_path):
    """To the bit, with the count of steps since it last changed; and where no step has been done yet."""
    settings = {"max_steps": 9, "save_steps": 3, "save_total_limit": None, "growth_interval": 4}
    whole = scaled(1024.0, **settings)
    overflowing(whole, overflows)
    whole.run()
    expected = taken(whole)
    kept = whole.accelerator.scaler.state_dict()
    stored = state.read_progress(state.folder_of(tmp_path, 3)).loss_scale
    assert stored["scale"] == 1024.0 / 2 ** len(overflows)
    assert stored["_growth_tracker"] == 2 - max(overflows)

    resumed = scaled(8.0, **settings)  # what it would start with is not what it goes on with
    overflowing(resumed, overflows)
    resumed.resume(state.folder_of(tmp_path, 3))
    resumed.run()
    found = taken(resumed)
    assert_equal(found[0], expected[0])
    assert_equal(found[1], expected[1])
    assert resumed.accelerator.scaler.state_dict() == kept
    assert kept["scale"] > stored["scale"]  # it has grown meanwhile


# ---- what is asked for and what runs ----


def refused(accelerator, precision):
    with pytest.raises(HostError) as caught:
        checks.what_runs(accelerator, alone(CPU), precision)
    assert caught.value.exit_code == 6
    assert caught.value.problems[0].hint
    return str(caught.value)


def test_what_was_asked_for_runs(half):
    checks.what_runs(half(), alone(CPU), "bf16")
    reset_accelerate()
    checks.what_runs(Scaling(1024.0), alone(CPU), "fp16")
    reset_accelerate()
    checks.what_runs(Accelerator(cpu=True), alone(CPU), "no")


def test_autocast_that_is_off_is_noticed():
    assert "bf16 was asked for, and cpu computes with no" in refused(Accelerator(cpu=True), "bf16")


def test_accelerates_silent_fall_back_is_noticed():
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    assert accelerator.scaler is None
    assert "fp16 was asked for, and cpu computes with no" in refused(accelerator, "fp16")


@pytest.mark.parametrize(("asked", "runs"), [("no", "bfloat16"), ("fp16", "bfloat16")])
def test_another_dtype_is_noticed(asked, runs, half):
    assert f"{asked} was asked for, and cpu computes with {runs}" in refused(half(), asked)


def test_a_loss_scale_that_is_missing_or_idle_is_noticed(half):
    accelerator = half()
    accelerator.scaler = torch.amp.GradScaler("cpu")
    assert "only fp16 needs a loss scale" in refused(accelerator, "bf16")
    reset_accelerate()
    accelerator = Scaling(1024.0)
    accelerator.scaler = None
    assert "fp16 needs a loss scale" in refused(accelerator, "fp16").replace("fp16 and only ", "")


class TestOnCuda:
    """What a GPU is asked for, by what torch says of it."""

    @pytest.fixture(params=[True, False], ids=["with bf16", "without bf16"])
    def has_it(self, request, monkeypatch):
        def supported(including_emulation=True):
            return request.param or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        return request.param

    def test_auto(self, has_it):
        assert mixed_precision("auto", torch.device("cuda")) == ("bf16" if has_it else "no")

    def test_bf16(self, has_it):
        if has_it:
            assert mixed_precision("bf16", torch.device("cuda")) == "bf16"
            return
        with pytest.raises(HostError, match="Tesla T4 has no bf16, and would imitate it slowly") as caught:
            mixed_precision("bf16", torch.device("cuda"))
        assert "fp16" in caught.value.problems[0].hint
        assert caught.value.exit_code == 6

    @pytest.mark.parametrize("wanted", ["no", "fp16"])
    def test_what_every_gpu_has(self, wanted, has_it):
        assert mixed_precision(wanted, torch.device("cuda:0")) == wanted
