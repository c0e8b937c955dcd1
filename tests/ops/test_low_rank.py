import math
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peftcli.ops.decomposition import Rescaling
from peftcli.ops.low_rank import (
    add_expanded,
    add_low_rank,
    add_low_rank_reference,
    forward_low_rank,
    low_rank,
    merged_low_rank,
    projected_gradient,
    projected_gradient_reference,
    read,
)
from tests.methods.building import assert_close
from tests.tolerances import EXACT, HALF

I, O, R, S = 6, 10, 3, 1.7  # noqa: E741


def factors(dtype=torch.float64):
    return torch.randn(R, I, dtype=dtype), torch.randn(O, R, dtype=dtype)


@pytest.mark.parametrize("shape", [(), (4,), (2, 4), (0,), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_add_low_rank_equals_its_reference(shape, dtype):
    A, B = factors(dtype)
    x, y = torch.randn(*shape, I, dtype=dtype), torch.randn(*shape, O, dtype=dtype)
    expected = add_low_rank_reference(y.clone(), x, A, B, S)
    found = add_low_rank(y, x, A, B, S)
    assert found.shape == expected.shape
    assert found.data_ptr() == y.data_ptr(), "a copy of y was made"
    if shape != (0,):
        assert_close(found, expected, EXACT[dtype])


def test_y_that_cannot_be_written_into_gives_the_same():
    A, B = factors()
    x, y = torch.randn(2, 4, I, dtype=torch.float64), torch.randn(O, 4, 2, dtype=torch.float64).permute(2, 1, 0)
    assert not y.is_contiguous()
    kept = y.clone()
    assert_close(add_low_rank(y, x, A, B, S), add_low_rank_reference(kept, x, A, B, S), EXACT[torch.float64])
    assert torch.equal(y, kept)


def test_an_input_whose_rows_lie_apart():
    A, B = factors()
    x = torch.randn(I, 4, 2, dtype=torch.float64).permute(2, 1, 0)
    y = torch.randn(2, 4, O, dtype=torch.float64)
    expected = add_low_rank_reference(y.clone(), x, A, B, S)
    assert_close(add_low_rank(y, x, A, B, S), expected, EXACT[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_its_dtype_and_computes_the_update_in_the_factors(dtype):
    A, B = factors(torch.float32)
    x, y = torch.randn(5, I).to(dtype), torch.zeros(5, O, dtype=dtype)
    found = add_low_rank(y, x, A, B, S)
    assert found.dtype == dtype
    assert torch.equal(found, low_rank(x, A, B, S).to(dtype))  # only the last rounding is y's
    assert_close(found.float(), add_low_rank_reference(y.float(), x.float(), A, B, S), HALF[dtype])


def test_low_rank_is_the_update_alone():
    A, B = factors()
    x = torch.randn(5, I, dtype=torch.float64)
    zero = torch.zeros(5, O, dtype=torch.float64)
    assert_close(low_rank(x, A, B, S), add_low_rank_reference(zero, x, A, B, S), EXACT[torch.float64])


def test_gradients():
    A, B = (factor.requires_grad_() for factor in factors())
    W = torch.randn(O, I, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: add_low_rank(t[0] @ t[3].T, t[0], t[1], t[2], S), (x, A, B, W))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merging_rounds_once(dtype):
    A, B = factors(torch.float64 if dtype == torch.float64 else torch.float32)
    W = torch.randn(O, I).to(dtype)
    kept = W.clone()
    merged = merged_low_rank(W, A, B, S)
    assert merged.dtype == dtype
    assert torch.equal(W, kept), "the base weight was written into"
    if dtype in EXACT:
        assert_close(merged, W + S * B @ A, EXACT[dtype])
    else:
        assert torch.equal(merged, merged_low_rank(W.float(), A, B, S).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_projected_gradient_equals_its_reference(dtype):
    A, gradient = torch.randn(R, I, dtype=dtype), torch.randn(O, R, dtype=dtype)
    kept = A.clone()
    found = projected_gradient(gradient, A, S)
    assert_close(found, projected_gradient_reference(gradient, A, S), EXACT[dtype])
    assert torch.equal(A, kept)
    assert found.dtype == dtype


def test_the_projected_gradient_of_an_a_without_full_rank_does_not_pass_as_a_number():
    found = projected_gradient(torch.ones(O, 2), torch.zeros(2, I), S)
    assert float(found.abs().min()) > 1e6 or not torch.isfinite(found).any()


# ---- written in place, with gradients ----


@pytest.mark.parametrize("shape", [(5,), (2, 4)], ids=str)
@pytest.mark.parametrize("frozen", ["none", "u", "B"])
def test_gradients_of_what_is_written_in_place(shape, frozen):
    y, u = torch.randn(*shape, O, dtype=torch.float64), torch.randn(*shape[::-1], R, dtype=torch.float64)
    u = u.transpose(0, -2) if len(shape) == 2 else u  # rows that lie apart
    B = factors()[1]
    tensors = {"y": y, "u": u, "B": B}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != frozen)
    assert torch.autograd.gradcheck(lambda y, u, B: add_expanded(y * 1, u, B, S), (y, u, B))


def test_a_result_may_be_used_twice_and_written_into_again():
    A, B = (factor.requires_grad_() for factor in factors())
    x = torch.randn(2, 4, I, dtype=torch.float64, requires_grad=True)

    def twice(x, A, B):
        y = add_low_rank(x.new_zeros(2, 4, O), x, A, B, S)
        return add_low_rank(y * y, x, A, B, S) + add_expanded(x.new_ones(2, 4, O), x @ A.T, B, 1.0)

    assert torch.autograd.gradcheck(twice, (x, A, B))


def test_only_the_input_and_the_thin_side_are_kept(kept_shapes):
    """Nothing of the output's size, and of the inputs' what A's gradient needs."""
    A, B = (factor.requires_grad_() for factor in factors())
    W = torch.randn(O, I, dtype=torch.float64)
    x = torch.randn(2, 4, I, dtype=torch.float64, requires_grad=True)
    floor = kept_shapes(lambda: torch.nn.functional.linear(x, W))
    found = kept_shapes(lambda: add_low_rank(torch.nn.functional.linear(x, W), x, A, B, S))
    expected = [*floor, x.shape, A.shape, (2, 4, R), B.shape]
    assert sorted(map(math.prod, found)) == sorted(map(math.prod, expected))


def test_an_output_of_a_custom_function_is_left_alone():
    class Packed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * 2

    A, B = factors()
    x = torch.randn(2, 4, I, dtype=torch.float64, requires_grad=True)
    y = Packed.apply(torch.randn(2, 4, O, dtype=torch.float64, requires_grad=True))
    before = y.detach().clone()
    assert_close(add_low_rank(y, x, A, B, S), add_low_rank_reference(before, x, A, B, S), EXACT[torch.float64])
    assert torch.equal(y, before)


def test_under_autocast_the_update_is_rounded_with_what_it_is_added_to():
    A, B = (factor.requires_grad_() for factor in factors(torch.float32))
    x, W = torch.randn(5, I, requires_grad=True), torch.randn(O, I)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.nn.functional.linear(x, W)
        found = add_low_rank(y, x, A, B, S)
    assert found.data_ptr() == y.data_ptr(), "a copy of y was made"
    assert_close(found.float(), add_low_rank_reference(x @ W.T, x, A, B, S), 2 * HALF[torch.bfloat16])
    found.float().sum().backward()
    gradients = torch.autograd.grad(add_low_rank_reference(x @ W.T, x, A, B, S).sum(), (x, A, B))
    for tensor, expected in zip((x, A, B), gradients, strict=True):
        assert tensor.grad.dtype == torch.float32
        assert_close(tensor.grad, expected, 2 * HALF[torch.bfloat16])


# ---- one node for the layer's input and the adapter's ----


class Layer(NamedTuple):
    """A frozen layer; one that is packed, or whatever else it may be, unless its weight is given."""

    forward: Any
    weight: Any = None
    bias: Any = None


def plain(W, b=None):
    """Returns a layer whose product may be part of the op's own node."""
    return Layer(lambda x: F.linear(x, W, b), W, b)


def layer_of(W, gradients):
    """Returns a linear layer that notes the gradients of its input which it hands out."""

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x @ W.T

        @staticmethod
        def backward(ctx, dy):
            gradients.append(dy @ W)
            return gradients[-1]

    return Layer(lambda x: Noted.apply(x) + 0)


@pytest.mark.parametrize("shape", [(5,), (2, 4)], ids=str)
@pytest.mark.parametrize("frozen", ["none", "A", "B", "x"])
@pytest.mark.parametrize("rank", [3, 16])
@pytest.mark.parametrize("kind", [plain, lambda W: Layer(lambda x: x @ W.T)], ids=["plain", "opaque"])
def test_the_gradients_of_an_adapted_layer(shape, frozen, rank, kind):
    W = torch.randn(O, I, dtype=torch.float64)
    tensors = {"x": torch.randn(*shape, I), "A": torch.randn(rank, I), "B": torch.randn(O, rank)}
    leaves = {name: tensor.double().requires_grad_(name != frozen) for name, tensor in tensors.items()}

    def adapted(x, A, B):
        return forward_low_rank(kind(W), x, x, A, B, S)

    assert torch.autograd.gradcheck(adapted, tuple(leaves.values()))
    expected = add_low_rank_reference(leaves["x"] @ W.T, *leaves.values(), S)
    assert_close(adapted(*leaves.values()), expected, EXACT[torch.float64])


def test_the_adapters_share_is_written_into_the_layers_gradient():
    gradients = []
    A, B = (factor.requires_grad_() for factor in factors())
    x = torch.randn(2, 4, I, dtype=torch.float64, requires_grad=True)
    layer = layer_of(torch.randn(O, I, dtype=torch.float64), gradients)
    forward_low_rank(layer, x, x, A, B, S).sum().backward()
    assert torch.equal(gradients[0], x.grad), "a tensor of x's size was made"


def test_a_gradient_that_cannot_be_written_into_is_added_to():
    A = factors()[0].requires_grad_()
    x = torch.randn(2, 4, I, dtype=torch.float64, requires_grad=True)
    # A sum's gradient is one number, seen as many: to write into it would be to write over itself.
    passed, u = read(x, A)
    (passed.sum() + u.square().sum()).backward()
    assert_close(x.grad, torch.ones_like(x) + 2 * (x.detach() @ A.detach().T) @ A.detach(), EXACT[torch.float64])


def test_either_result_may_go_unused():
    A = factors()[0].requires_grad_()
    x = torch.randn(4, I, dtype=torch.float64, requires_grad=True)
    read(x, A)[0].square().sum().backward()
    assert_close(x.grad, 2 * x.detach(), EXACT[torch.float64])
    assert A.grad is None
    x.grad = None
    read(x, A)[1].sum().backward()
    assert_close(x.grad, A.detach().sum(dim=0).expand_as(x), EXACT[torch.float64])
    assert_close(A.grad, x.detach().sum(dim=0).expand_as(A), EXACT[torch.float64])


def test_an_input_is_kept_only_for_factors_that_train(kept_shapes):
    A, B = factors()
    W = torch.randn(O, I, dtype=torch.float64)
    x = torch.randn(2, 4, I, dtype=torch.float64, requires_grad=True)
    found = kept_shapes(lambda: forward_low_rank(Layer(lambda x: x @ W.T), x, x, A, B.requires_grad_(), S))
    assert tuple(x.shape) not in set(map(tuple, found))
    found = kept_shapes(lambda: forward_low_rank(Layer(lambda x: x @ W.T), x, x, A.requires_grad_(), B, S))
    assert list(map(tuple, found)).count(tuple(x.shape)) == 1


def test_inputs_that_need_no_gradient_get_none():
    """A first layer's, say: passed on as it is, x asks the frozen layer for nothing."""
    A = factors()[0].requires_grad_()
    x = torch.randn(4, I, dtype=torch.float64)
    passed, u = read(x, A)
    assert passed is x
    assert u.requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_it_gives_the_same_gradients(reentrant):
    A, B = (factor.requires_grad_() for factor in factors())
    W = torch.randn(O, I, dtype=torch.float64)

    def gradients(run):
        x = torch.ones(4, I, dtype=torch.float64, requires_grad=True)
        y = run(lambda x: forward_low_rank(Layer(lambda x: x @ W.T), x, x, A, B, S), x)
        return torch.autograd.grad(y.square().sum(), (A, B)) if not reentrant else _through_backward(y, A, B)

    plain, recomputed = gradients(lambda f, x: f(x)), gradients(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


def _through_backward(y, *leaves):
    """Returns gradients by way of `.grad`, the only one that reentrant recomputation knows."""
    y.square().sum().backward()
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


# ---- all of an adapted layer as one node ----


def opaque(W, b=None):
    """Returns the same layer, of which nothing is known but that it is linear."""
    return plain(W, b)._replace(weight=None)


def leaves_of(dtype=torch.float64, frozen=(), tokens=(2, 4)):
    """Returns x, what dropout has made of it, A, B, m and n, which want gradients unless they are `frozen`."""
    shapes = {"x": (*tokens, I), "dropped": (*tokens, I), "A": (R, I), "B": (O, R), "m": (O,), "n": (O,)}
    found = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    found |= {name: found[name].abs() + 0.5 for name in ("m", "n")}
    return {name: tensor.requires_grad_(name not in frozen) for name, tensor in found.items()}


def adapted(layer, x, dropped, A, B, m, n, *, drops=True, rescales=True, kept=False):
    """Returns `forward_low_rank` of what of its inputs is wanted."""
    rescaling = Rescaling(m, n, kept) if rescales else None
    return forward_low_rank(layer, x, dropped if drops else x, A, B, S, rescaling)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize(("rescales", "kept"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("frozen", [(), ("x", "dropped"), ("A",), ("B", "m"), ("n",)], ids=str)
@pytest.mark.parametrize("tokens", [(2, 4), (5,), (), (1, 0)], ids=str)
def test_one_node_is_what_several_are(biased, drops, rescales, kept, frozen, tokens):
    W, b = torch.randn(O, I, dtype=torch.float64), torch.randn(O, dtype=torch.float64) if biased else None
    leaves, how = leaves_of(frozen=frozen, tokens=tokens), {"drops": drops, "rescales": rescales, "kept": kept}
    one, several = (adapted(layer, **leaves, **how) for layer in (plain(W, b), opaque(W, b)))
    assert type(one.grad_fn).__name__ == "_AdaptedBackward"
    assert type(several.grad_fn).__name__ != "_AdaptedBackward"
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    slope = torch.randn_like(one)
    gradients = (torch.autograd.grad(y, wanted, slope, allow_unused=True) for y in (one, several))
    for found, expected in zip((one, *next(gradients)), (several, *next(gradients)), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.shape == expected.shape
            if found.numel():
                assert_close(found, expected, EXACT[torch.float64])


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_the_gradients_of_one_node(drops, kept):
    W, b = torch.randn(O, I, dtype=torch.float64), torch.randn(O, dtype=torch.float64)

    def run(*tensors):
        return adapted(plain(W, b), *tensors, drops=drops, kept=kept)

    assert torch.autograd.gradcheck(run, tuple(leaves_of().values()))


def test_a_row_of_no_length_passes_as_it_is_and_gives_its_magnitude_no_gradient():
    W, leaves = torch.randn(O, I, dtype=torch.float64), leaves_of()
    with torch.no_grad():
        leaves["n"][0] = 0
    results = []
    for layer in (plain(W), opaque(W)):
        y = adapted(layer, **leaves)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaves["m"], leaves["n"]])))
    for one, several in zip(*results, strict=True):
        assert_close(one, several, EXACT[torch.float64])
    assert_close(results[0][0][..., 0], adapted(plain(W), **leaves, rescales=False)[..., 0], EXACT[torch.float64])
    assert results[0][1][0] == results[0][2][0] == 0


def test_what_one_node_keeps(kept_shapes):
    """The weight, which is there; u; the update's input if A trains; of a rescaling one tensor; and no second input."""
    W, leaves = torch.randn(O, I, dtype=torch.float64), leaves_of()
    always = [(O, I), (2, 4, R), (R, I), (O, R)]
    found = kept_shapes(lambda: adapted(plain(W), **leaves, drops=False, rescales=False))
    assert sorted(found) == sorted([*always, (2, 4, I)])
    found = kept_shapes(lambda: adapted(plain(W), **leaves, drops=True, rescales=False))
    assert sorted(found) == sorted([*always, (2, 4, I)])
    found = kept_shapes(lambda: adapted(plain(W), **leaves_of(frozen=("A",)), drops=False, rescales=False))
    assert sorted(found) == sorted(always)
    results = []
    for kept in (True, False):
        found = kept_shapes(lambda kept=kept: results.append(adapted(plain(W), **leaves, drops=False, kept=kept)))
        assert sorted(found) == sorted([*always, (2, 4, I), (O,), (O,), (2, 4, O)])


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("rescales", [True, False])
@pytest.mark.parametrize("dtype_of_x", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_one_node_computes_as_several(drops, rescales, dtype_of_x):
    """On a weight in autocast's own dtype: another would have to be rounded, and kept, once more."""
    leaves, W = leaves_of(torch.float32), torch.randn(O, I).bfloat16()
    leaves |= {name: leaves[name].detach().to(dtype_of_x).requires_grad_() for name in ("x", "dropped")}
    results = []
    for layer in (plain(W), opaque(W)):
        with torch.autocast("cpu", torch.bfloat16):
            y = adapted(layer, **leaves, drops=drops, rescales=rescales)
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        results.append((y, *torch.autograd.grad(y.float().sum(), wanted, allow_unused=True)))
    assert "_AdaptedBackward" in [type(one[0].grad_fn).__name__ for one in results]
    assert results[0][0].dtype == torch.bfloat16
    for one, several in zip(*results, strict=True):
        assert (one is None) == (several is None)
        if one is not None:
            assert one.dtype == several.dtype
            assert_close(one, several, HALF[torch.bfloat16])


def test_a_layer_that_trains_is_left_to_autograd():
    leaves = leaves_of()
    W = torch.randn(O, I, dtype=torch.float64, requires_grad=True)
    b = torch.randn(O, dtype=torch.float64, requires_grad=True)
    for layer in (plain(W), plain(W.detach(), b)):
        y = adapted(layer, **leaves)
        assert type(y.grad_fn).__name__ != "_AdaptedBackward"
        trained = layer.weight if layer.bias is None else layer.bias
        assert torch.autograd.grad(y.sum(), trained)[0].abs().sum() > 0


def test_a_weight_in_another_dtype_is_left_to_autograd():
    leaves = leaves_of(torch.float32)
    W = torch.randn(O, I).bfloat16()
    layer = plain(W)._replace(forward=lambda x: F.linear(x, W.float()))
    assert type(adapted(layer, **leaves).grad_fn).__name__ != "_AdaptedBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert type(adapted(plain(W.float()), **leaves).grad_fn).__name__ != "_AdaptedBackward"
