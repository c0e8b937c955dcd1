"""A model with Liger's kernels. They need a GPU: here a stand-in does with torch what they do, writing included."""

from types import MethodType

import pytest
import torch
from torch import nn

from peftcli import inject, methods, recipe
from peftcli.errors import HostError, ModelError, RecipeError
from peftcli.models import liger
from tests.conftest import Recorder, tiny_llama_config
from tests.tolerances import EXACT, LOSS_CURVE

CUDA = torch.device("cuda:0")


class WritingSwiGLU(torch.autograd.Function):
    """silu(a) · b, whose backward pass leaves the gradients where a and b were, behind autograd's back."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return nn.functional.silu(a) * b

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        gate = torch.sigmoid(a)
        da, db = dc * b * gate * (1 + a * (1 - gate)), dc * a * gate
        a.data.copy_(da)
        b.data.copy_(db)
        return a, b


def writing_forward(self, x):
    return self.down_proj(WritingSwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


@pytest.fixture
def kernels(monkeypatch):
    """Stands in for the package; returns what it was asked for."""
    asked = []

    def put_in(model, wanted):
        asked.append(wanted)
        for module in model.modules():
            if type(module).__name__ == "LlamaMLP":
                module.forward = MethodType(writing_forward, module)

    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", put_in)
    monkeypatch.setattr(liger, "version", lambda _: "0.8.5")
    return asked


def llama():
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config(mlp_bias=False)).double().train()


def gradients(model, method, fields):
    """Returns the loss and the gradients of an adapter that no longer is where it starts."""
    own = methods.load(method)
    inject.graft(model, own, own.Config.model_validate({"target_modules": "all-linear", **fields}), seed=0)
    model.double()
    trained = {name: one for name, one in sorted(model.named_parameters()) if one.requires_grad}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in trained.values():
            one.add_(torch.randn(one.shape, generator=generator, dtype=one.dtype), alpha=0.02)
    ids = torch.arange(24).view(2, 12)
    torch.manual_seed(2)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in trained.items()}


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        *((name, {"r": 4}) for name in ("lora", "dora", "vera", "dvora", "hydralora", "split_lora")),
        *((name, {"r": 4, "dropout": 0.2}) for name in ("lora", "dora")),
        ("dora", {"r": 4, "dropout": 0.2, "dropout_mode": "paper"}),
        ("adalora", {"r": 6, "target_r": 4}),
        ("ia3", {}),
    ],
)
def test_every_method_learns_the_same_with_kernels_that_write_over_their_inputs(method, fields, kernels):
    plain, with_kernels = llama(), llama()
    liger.put_in(with_kernels)
    loss, expected = gradients(plain, method, fields)
    found_loss, found = gradients(with_kernels, method, fields)
    assert float(found_loss) == pytest.approx(float(loss), rel=EXACT[torch.float64])
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        difference = float((found[name] - one).abs().max() / one.abs().max())
        assert difference <= EXACT[torch.float64], name


def test_head_and_loss_stay_ours_and_a_line_says_what_was_put_in(kernels):
    assert liger.put_in(llama()) == "Liger 0.8.5 computes 2 of the model's modules"
    assert kernels == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_a_model_without_kernels_is_refused(kernels):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=8))
    with pytest.raises(ModelError, match=r"training.use_liger_kernel: Liger 0.8.5 has no kernels for gpt2 models"):
        liger.put_in(model)


def test_an_adapter_of_a_module_with_kernels_is_refused_and_not_left_out(kernels):
    model = llama()
    liger.put_in(model)
    own = methods.load("adapter")
    with pytest.raises(ModelError, match="its forward was replaced on the instance"):
        inject.graft(model, own, own.Config(target_modules=["mlp"]), seed=0)


def test_kernels_that_cannot_be_imported_are_no_bug_of_ours(kernels, monkeypatch):
    def too_old(model, wanted):
        raise ImportError("liger-kernel >= 0.3.0 is not available")

    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", too_old)
    with pytest.raises(
        HostError, match=r"Liger 0.8.5 cannot be used: liger-kernel >= 0.3.0 is not available"
    ) as caught:
        liger.put_in(llama())
    assert "set training.use_liger_kernel to false" in caught.value.problems[0].hint


def test_a_run_with_kernels_learns_the_same(kernels, monkeypatch, recipe_file, train):
    monkeypatch.setattr(liger, "require", lambda device: None)
    recorders = Recorder(), Recorder()
    path = recipe_file(method={"type": "dora", "r": 4})
    train(path, "output_dir=plain", reporter=recorders[0])
    train(path, "output_dir=kernels", "training.use_liger_kernel=true", reporter=recorders[1])
    plain, with_kernels = (recorder.losses for recorder in recorders)
    assert with_kernels == pytest.approx(plain, rel=LOSS_CURVE)
    said = "Liger 0.8.5 computes 2 of the model's modules"
    assert [said in recorder.notes for recorder in recorders] == [False, True]


def test_a_recipe_that_asks_for_them_on_a_cpu_is_refused(recipe_file, train):
    with pytest.raises(HostError, match=r"training.use_liger_kernel: its kernels are for GPUs"):
        train(recipe_file(training={"use_liger_kernel": True}))


def test_compiled_layers_have_no_use_for_them(recipe_file):
    path = recipe_file(training={"use_liger_kernel": True, "torch_compile": True})
    with pytest.raises(RecipeError, match=r"use_liger_kernel: torch_compile makes kernels of the same") as caught:
        recipe.load(path)
    assert "torch_compile is at" in caught.value.problems[0].hint


def test_without_a_gpu_or_the_package_it_is_refused_before_anything_is_loaded(monkeypatch):
    with pytest.raises(HostError, match="for GPUs, and this run is on the CPU"):
        liger.require(torch.device("cpu"))

    def missing(name):
        raise liger.PackageNotFoundError(name)

    monkeypatch.setattr(liger, "version", missing)
    with pytest.raises(HostError, match="the package liger-kernel is not installed") as caught:
        liger.require(CUDA)
    assert caught.value.problems[0].hint.startswith("pip install liger-kernel, or set training.use_liger_kernel")
    monkeypatch.setattr(liger, "version", lambda _: "0.8.5")
    liger.require(CUDA)
