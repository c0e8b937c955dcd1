import pytest
import torch

from peftcli import inject
from peftcli.ops.dropout import dropout
from tests.methods.building import Holder, adapt, adapted_holder, assert_close, config_for, inputs, trainable
from tests.methods.skeletons import count, llama_7b
from tests.tolerances import EXACT

FP64 = EXACT[torch.float64]
KINDS = ("linear", "conv1d")


def parts(holder):
    """Returns A, B, b, d, m, and V, n and W' by the formula; all detached."""
    dvora, shared = holder.target.adapter, inject.shared_part(holder)
    b, d, m = (tensor.detach() for tensor in (dvora.vera.b, dvora.vera.d, dvora.decomposition.m))
    V = holder.W + torch.diag(b) @ shared.B @ torch.diag(d) @ shared.A
    n = (V**2).sum(1).sqrt()
    return shared.A, shared.B, b, d, m, V, n, torch.diag(m / n) @ V


def without_adapter(holder):
    return {key: value for key, value in holder.state_dict().items() if "adapter" not in key}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detach_norm", [True, False])
def test_the_output_is_that_of_the_dense_weight(kind, detach_norm):
    holder = adapted_holder("dvora", kind, detach_norm=detach_norm)
    merged = parts(holder)[-1]
    x = inputs(kind, torch.float64)
    assert_close(holder(x), holder.plain(x, merged), FP64)
    assert_close(holder.target.adapter.merged(holder.W), merged, FP64)
    m = holder.target.adapter.decomposition.m
    assert_close(merged.norm(dim=1), m.detach().abs(), FP64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detach_norm", [True, False])
def test_the_gradients_are_those_of_both_papers(kind, detach_norm):
    holder = adapted_holder("dvora", kind, detach_norm=detach_norm)
    A, B, b, d, m, V, n, merged = parts(holder)
    x = inputs(kind, torch.float64).requires_grad_()
    y = holder(x)
    g = torch.randn_like(y)
    y.backward(g)
    G = g.flatten(0, 1).T @ x.detach().flatten(0, 1)  # ∂L/∂W'
    along = (G * V).sum(1) / n
    dV = (m / n)[:, None] * (G if detach_norm else G - (along / n)[:, None] * V)
    dvora = holder.target.adapter
    assert_close(dvora.decomposition.m.grad, along, FP64)
    assert_close(dvora.vera.b.grad, (dV * (B @ torch.diag(d) @ A)).sum(1), FP64)
    assert_close(dvora.vera.d.grad, torch.diag(B.T @ torch.diag(b) @ dV @ A.T), FP64)
    assert_close(x.grad, g @ merged, FP64)


def test_gradcheck_of_the_norm_that_is_not_detached():
    holder = adapted_holder("dvora", detach_norm=False)
    x = inputs("linear", torch.float64, length=2)
    tensors = tuple(trainable(holder).values())
    assert len(tensors) == 3
    assert torch.autograd.gradcheck(lambda *_: holder(x), tensors, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_with_magnitudes_equal_to_the_norms_it_is_vera(kind):
    holder, vera = adapted_holder("dvora", kind), Holder(kind, torch.float64)
    vera.load_state_dict(without_adapter(holder))
    adapt(vera, "vera")
    for part in inject.parts(vera).values():
        part.double()
    x = inputs(kind, torch.float64)
    with torch.no_grad():
        vera.target.adapter.b.copy_(holder.target.adapter.vera.b)
        vera.target.adapter.d.copy_(holder.target.adapter.vera.d)
        assert not torch.allclose(holder(x), vera(x))
        holder.target.adapter.decomposition.m.copy_(parts(holder)[6])
        assert_close(holder(x), vera(x), FP64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["branch", "paper"])
def test_it_is_a_dora_with_scaled_factors_in_its_dropout_too(kind, mode):
    fields = {"dropout": 0.4, "dropout_mode": mode}
    holder, dora = adapted_holder("dvora", kind, **fields).train(), Holder(kind, torch.float64)
    dora.load_state_dict(without_adapter(holder))
    adapt(dora, "dora", r=4, alpha=4.0, **fields)
    dora.target.adapter.double().train()
    A, B, b, d, m, V, n, _ = parts(holder)
    with torch.no_grad():
        for tensor, value in (("lora.A", d[:, None] * A), ("lora.B", b[:, None] * B), ("decomposition.m", m)):
            dora.target.adapter.get_parameter(tensor).copy_(value)
    x = inputs(kind, torch.float64)
    torch.manual_seed(3)
    found = holder(x)
    torch.manual_seed(3)
    assert_close(found, dora(x), FP64)
    torch.manual_seed(3)
    dropped = dropout(x, 0.4)
    rescaled = dropped if mode == "paper" else x
    update = dropped @ (V - holder.W).T
    expected = holder.plain(x, holder.W) + (m / n - 1) * (rescaled @ holder.W.T) + (m / n) * update
    assert_close(found, expected, FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_of_the_base_learn_without_nan(kind):
    holder = Holder(kind)
    with torch.no_grad():
        holder.W[::3] = 0
    x = inputs(kind)
    expected = holder(x)
    adapt(holder, "dvora")
    assert torch.equal(holder(x), expected)
    holder(x).square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in trainable(holder).values())


def test_the_pair_is_that_of_vera(make_model):
    pairs = []
    for name in ("vera", "dvora"):
        model = make_model()
        adapt(model, name, ["q_proj", "down_proj"], projection_prng_key=3)
        pairs.append(inject.shared_part(model).peft_tensors())
        assert not list(inject.shared_part(model).parameters())
    for key in ("vera_A", "vera_B"):
        assert torch.equal(pairs[0][key], pairs[1][key])


def test_the_published_number_of_parameters():
    """0.04 % of LLaMA-7B, of base and adapter together: VeRA's and a magnitude for each output."""
    trained = count(llama_7b(), "dvora", "all-linear", r=1024)
    assert trained == 1_589_248 + 32 * 42_496
    assert round(100 * trained / (6_738_415_616 + trained), 2) == 0.04


def test_bad_input_is_that_of_vera():
    with pytest.raises(ValueError, match="d_initial: b starts at 0"):
        config_for("dvora", d_initial=0.0)
