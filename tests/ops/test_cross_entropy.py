"""The chunked cross-entropy against all logits at once: values, every gradient, and what is alive on the way."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftcli.ops.cross_entropy import (
    FEWEST_ROWS,
    Work,
    chunked_cross_entropy,
    chunked_cross_entropy_reference,
    rows_for,
)
from tests.methods.building import assert_close
from tests.tolerances import EXACT, HALF, LOSS

N, D, V = 13, 8, 37


def made(dtype=torch.float64, rows=4, count=N, *, trains=True):
    """Returns hidden states that want a gradient, a linear layer that does where `trains`, and the work."""
    hidden = torch.randn(count, D, dtype=dtype, requires_grad=True)
    head = nn.Linear(D, V, dtype=dtype).requires_grad_(trains)
    return hidden, head, Work(torch.randint(V, (count,)), head, rows)


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, *(one for one in head.parameters() if one.requires_grad)])


@pytest.mark.parametrize("trains", [True, False], ids=["head trains", "head is frozen"])
@pytest.mark.parametrize("rows", [1, 3, 4, N - 1, N, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_equals_its_reference_whatever_the_chunks(dtype, rows, trains):
    hidden, head, work = made(dtype, rows, trains=trains)
    expected = chunked_cross_entropy_reference(work, hidden)
    found, correct = chunked_cross_entropy(work, hidden, list(head.parameters()))
    assert_close(found, expected, EXACT[dtype])
    assert int(correct) == 0
    pairs = zip(gradients(3 * found, hidden, head), gradients(3 * expected, hidden, head), strict=True)
    for mine, its in pairs:
        assert_close(mine, its, EXACT[dtype])
        assert its.abs().max() > 0
    with torch.no_grad():
        assert_close(chunked_cross_entropy(work, hidden)[0], expected, EXACT[dtype])


@pytest.mark.parametrize("rows", [2, N])
def test_gradients(rows):
    hidden, head, work = made(rows=rows)

    def loss(hidden, weight, bias):
        own = replace(work, project=lambda h: torch.tanh(F.linear(h, weight, bias)))
        return chunked_cross_entropy(own, hidden, [weight, bias])[0]

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("count", [0, 1])
def test_one_row_and_none(count):
    hidden, head, work = made(count=count)
    found, _ = chunked_cross_entropy(work, hidden, list(head.parameters()))
    assert_close(found, chunked_cross_entropy_reference(work, hidden), EXACT[torch.float64])
    own, weight, bias = gradients(found, hidden, head)
    assert own.shape == hidden.shape
    assert bool(weight.any()) == bool(bias.any()) == bool(count)  # zeros where nothing was to be learned, but there


def test_a_row_is_right_where_its_target_has_the_highest_logit():
    hidden, head, _ = made()
    best = head(hidden).argmax(-1)
    targets = torch.where(torch.arange(N) < 5, best, (best + 1) % V)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            _, correct = chunked_cross_entropy(Work(targets, head, 4, count_correct=True), hidden)
        assert int(correct) == 5
        assert not correct.requires_grad


def test_what_is_not_in_the_projection_gets_no_gradient():
    hidden, _, work = made()
    other = torch.ones(3, requires_grad=True)
    found, _ = chunked_cross_entropy(work, hidden.detach(), [other, *work.project.parameters()])
    found.backward()
    assert other.grad is None
    assert hidden.grad is None
    assert work.project.weight.grad is not None


def test_the_backward_pass_may_be_run_twice_but_not_differentiated():
    hidden, head, work = made()
    found, _ = chunked_cross_entropy(work, hidden, list(head.parameters()))
    first = torch.autograd.grad(found, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(found, hidden, retain_graph=True)[0], first)
    (slope,) = torch.autograd.grad(found, hidden, create_graph=True)
    assert not slope.requires_grad  # so that whoever wants a second derivative is told


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(dtype, rows):
    hidden, head, work = made(torch.float32, rows)
    low, narrow = hidden.detach().to(dtype).requires_grad_(), nn.Linear(D, V, dtype=dtype)
    narrow.load_state_dict(head.state_dict())
    found, _ = chunked_cross_entropy(replace(work, project=narrow), low, list(narrow.parameters()))
    expected = chunked_cross_entropy_reference(work, hidden)
    assert found.dtype == torch.float32
    assert_close(found, expected, HALF[dtype])
    # The factor is a loss scale's, beyond float16's largest number, and divided by what a step's tokens may be.
    scale = 131072.0 / 2048
    for mine, its in zip(gradients(scale * found, low, narrow), gradients(scale * expected, hidden, head), strict=True):
        assert mine.dtype == dtype
        assert_close(mine.float(), its, 2 * HALF[dtype])


def test_a_loss_scale_beyond_float16_itself():
    hidden, head, work = made(torch.float32)
    low, narrow = hidden.detach().half().requires_grad_(), head.half()
    found, _ = chunked_cross_entropy(replace(work, project=narrow), low)
    small = torch.autograd.grad(found * 1.0, low, retain_graph=True)[0]
    large = torch.autograd.grad(found * 2.0**17 * 2.0**-14, low)[0]
    assert_close(large.float(), 8 * small.float(), HALF[torch.float16])
    assert torch.isfinite(large).all()


def test_float16_keeps_what_small_probabilities_teach():
    """2,000 classes of probability 5e-8 each: without the boost, their gradient would round to 0."""
    count = 2000
    weight = torch.zeros(count + 1, 1)
    weight[1:] = 1.0
    bias = torch.full((count + 1,), -16.8)
    bias[0] = 0.0
    targets = torch.zeros(1, dtype=torch.long)

    def slope(dtype):
        h = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
        project = lambda x: F.linear(x, weight.to(dtype), bias.to(dtype))  # noqa: E731
        found, _ = chunked_cross_entropy(Work(targets, project, 4), h)
        return torch.autograd.grad(found * 256, h)[0].item()

    assert slope(torch.float32) > 0.02
    assert slope(torch.float16) == pytest.approx(slope(torch.float32), rel=0.05)


@pytest.mark.parametrize("rows", [3, 100])
def test_autocast_applies_to_every_chunk(rows):
    hidden, head, work = made(torch.float32, rows)
    seen = []

    def project(h):
        seen.append(head(h))
        return seen[-1]

    with torch.autocast("cpu", torch.bfloat16):
        found, _ = chunked_cross_entropy(replace(work, project=project), hidden, list(head.parameters()))
    assert {z.dtype for z in seen} == {torch.bfloat16}
    expected = chunked_cross_entropy_reference(work, hidden)
    assert_close(found, expected, HALF[torch.bfloat16])
    for mine, its in zip(gradients(found, hidden, head), gradients(expected, hidden, head), strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, its, 2 * HALF[torch.bfloat16])


class Alive(TorchDispatchMode):
    """Counts the bytes of all that operations return and that is still there, and the most of it.

    Attributes:
        now: Bytes alive.
        most: The most bytes that were alive at a time.
    """

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self.note(one.untyped_storage())
        return result

    def note(self, storage):
        place = storage.data_ptr()
        if not storage.nbytes() or place in self.known:
            return
        self.known.add(place)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.gone, place, storage.nbytes())

    def gone(self, place, size):
        self.known.discard(place)
        self.now -= size


@pytest.mark.parametrize(("cap", "chunks"), [(None, 3), (30.0, 6)])
def test_no_more_than_a_few_chunks_are_alive(cap, chunks):
    count, width, classes, budget = 1024, 16, 2048, 256_000
    head = nn.Linear(width, classes).requires_grad_(False)
    project = head if cap is None else lambda h: torch.tanh(head(h) / cap) * cap
    hidden, targets = torch.randn(count, width, requires_grad=True), torch.randint(classes, (count,))

    def peak(compute):
        with Alive() as alive:
            compute().backward()
        hidden.grad = None
        return alive.most

    work = Work(targets, project, rows_for(classes, budget))
    chunked = peak(lambda: chunked_cross_entropy(work, hidden)[0])
    plain = peak(lambda: chunked_cross_entropy_reference(work, hidden))
    logits = 4 * count * classes
    assert plain >= 2 * logits
    assert chunked <= chunks * budget + 3 * hidden.nbytes
    assert chunked < logits / 4


@pytest.mark.parametrize(("classes", "rows"), [(1000, 25), (100_000_000, FEWEST_ROWS)])
def test_chunks_are_as_large_as_the_budget_lets_them(classes, rows):
    assert rows_for(classes, 100_000) == rows


def test_chunks_are_about_equally_large():
    sizes = [rows.stop - rows.start for rows in Work(torch.zeros(101), nn.Identity(), 50).chunks()]
    assert sizes == [34, 34, 33]


def test_the_loss_agrees_with_itself_in_any_order():
    hidden, _, work = made(torch.float32, 5)
    order = torch.randperm(N)
    found = [chunked_cross_entropy(replace(work, targets=work.targets[i]), hidden[i])[0] for i in (order, slice(None))]
    assert found[0].item() == pytest.approx(found[1].item(), rel=LOSS)
