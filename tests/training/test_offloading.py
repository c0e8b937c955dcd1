"""What waits in the host's memory: large activations, and no weight. Copies are exercised from a CPU to itself."""

import pytest
import torch

from peftcli.errors import HostError
from peftcli.training import offloading
from tests.methods.building import adapt, randomise, trainable

CPU = torch.device("cpu")


def moved(monkeypatch, model, ids, *, least=1, checkpointing=False):
    """Returns the gradients with activations moved, and what moved them."""
    monkeypatch.setattr(offloading, "MIN_BYTES", least)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    torch.manual_seed(5)
    saving = offloading.Offloading(offloading.policy_of(model, CPU))
    with saving:
        loss = model(ids).logits.float().logsumexp(-1).sum()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}, saving


def expected_of(model, ids):
    model.zero_grad()
    torch.manual_seed(5)
    model(ids).logits.float().logsumexp(-1).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["lora", "dora", "full"])
def test_the_gradients_are_the_same_to_the_bit(name, checkpointing, make_model, monkeypatch):
    model, ids = make_model("llama").train(), torch.randint(2, 128, (3, 7))
    adapt(model, name, "all-linear", **({"dropout": 0.3} if name != "full" else {}))
    randomise(model)
    expected = expected_of(model, ids)
    found, saving = moved(monkeypatch, model, ids, checkpointing=checkpointing)
    assert saving.count > 0
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())
    assert found.keys() == expected.keys()


def test_recomputing_leaves_less_to_move(make_model, monkeypatch):
    """The layers' inputs [3, 7, 48] in float32, two of them, and what is saved outside of layers."""
    model, ids = make_model("llama").train(), torch.randint(2, 128, (3, 7))
    adapt(model, "lora", "all-linear")
    _, all_of_it = moved(monkeypatch, model, ids)
    _, inputs = moved(monkeypatch, model, ids, checkpointing=True)
    assert 2 * 3 * 7 * 48 * 4 <= inputs.num_bytes < all_of_it.num_bytes / 2


def test_weights_and_small_tensors_stay():
    weight, frozen = torch.nn.Parameter(torch.zeros(256, 256)), torch.zeros(256, 256)
    policy = offloading.Policy(CPU, [weight, frozen])
    assert policy.moves(torch.zeros(256, 256))
    assert policy.moves(torch.zeros(128, 128))  # just 64 KiB
    assert not policy.moves(torch.zeros(128, 127))
    for kept in (weight, weight.t(), frozen, frozen.t(), frozen[:128], torch.nn.Parameter(torch.zeros(256, 256))):
        assert not policy.moves(kept)
    gathered = torch.nn.Parameter(torch.zeros(256, 256))  # as a spread weight is, after the policy was made
    assert not policy.moves(gathered.t())
    assert not policy.moves(torch.zeros(256, 256, device="meta"))


def test_a_tensor_comes_back_as_it_was(monkeypatch):
    monkeypatch.setattr(offloading, "MIN_BYTES", 1)
    x = torch.randn(5, 7, dtype=torch.float64).t().requires_grad_()
    saving = offloading.Offloading(offloading.Policy(CPU, []))
    with saving:
        y = x * x
    (kept,) = {y.grad_fn._saved_self.stride(), y.grad_fn._saved_other.stride()}
    assert kept == x.stride()
    assert (saving.count, saving.num_bytes) == (2, 2 * 5 * 7 * 8)
    y.sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_a_cpu_alone_has_nowhere_to_move_them():
    with pytest.raises(HostError, match=r"training.activation_offloading: .* there is no other device") as caught:
        offloading.require_device(CPU)
    assert "gradient_checkpointing" in caught.value.problems[0].hint
    offloading.require_device(torch.device("cuda:0"))
