import pytest
import torch

from peftcli.ops.dropout import WORD_VALUES, dropout
from tests.tolerances import EXACT, HALF, STANDARD_ERRORS


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(p):
    n = 2**17
    dropped = float((dropout(torch.ones(n), p) == 0).double().mean())
    assert abs(dropped - p) <= STANDARD_ERRORS * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1e-9, 1 - 1e-9])
def test_an_element_is_dropped_or_divided_by_the_share_that_is_kept(p, dtype):
    x = torch.randn(3, 5, 7, dtype=dtype)
    y = dropout(x, p)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    shares = (x / y)[y != 0].double()
    assert ((shares - (1 - p)).abs() <= 1 / WORD_VALUES + {**EXACT, **HALF}[dtype]).all()


def test_the_expected_value_is_the_input():
    n, p = 2**17, 0.3
    mean = float(dropout(torch.ones(n, dtype=torch.float64), p).mean())
    assert abs(mean - 1) <= STANDARD_ERRORS * (p / (1 - p) / n) ** 0.5


def test_elements_are_dropped_independently():
    """Four decisions share one random word: none may follow from its neighbours."""
    n = 2**16
    kept = (dropout(torch.ones(n, 4), 0.5) != 0).double() - 0.5
    correlation = kept.T @ kept / n * 4 - torch.eye(4)
    assert float(correlation.abs().max()) <= STANDARD_ERRORS / n**0.5


def test_each_call_draws_anew_and_a_seed_repeats_it():
    x = torch.ones(64)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert not torch.equal(first, second)
    assert torch.equal(dropout(x, 0.5), first)


@pytest.mark.parametrize("length", range(1, 6))
def test_lengths_that_are_no_multiple_of_a_words_decisions(length):
    assert dropout(torch.ones(length), 0.5).shape == (length,)


def test_zero_draws_nothing():
    x = torch.ones(8)
    state = torch.get_rng_state()
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_an_input_that_is_not_contiguous():
    x = torch.randn(5, 6).t()
    y = dropout(x, 0.5)
    assert torch.equal(y[y != 0], (x * 2)[y != 0])


def test_the_gradient_has_the_mask_of_the_output():
    x = torch.randn(64, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.25)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0).double() / 0.75)
