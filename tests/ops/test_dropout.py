import pytest
import torch

from peftcli.ops.dropout import RARE, WORD_VALUES, dropout, rare_places
from tests.methods.building import assert_close
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


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_are_dropped_independently(p):
    """Four decisions share one random word, or one place follows from the one before: none may tell its neighbours."""
    n = 2**16
    kept = (dropout(torch.ones(n, 4), p) != 0).double() - (1 - p)
    correlation = kept.T @ kept / (n * p * (1 - p)) - torch.eye(4)
    correlation.fill_diagonal_(0)
    assert float(correlation.abs().max()) <= STANDARD_ERRORS / n**0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_each_call_draws_anew_and_a_seed_repeats_it(p):
    x = torch.ones(64)
    torch.manual_seed(3)
    first, second = dropout(x, p), dropout(x, p)
    torch.manual_seed(3)
    assert not torch.equal(first, second)
    assert torch.equal(dropout(x, p), first)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("length", range(6))
def test_lengths_that_are_no_multiple_of_a_words_decisions(length, p):
    assert dropout(torch.ones(length), p).shape == (length,)


def test_zero_draws_nothing():
    x = torch.ones(8)
    state = torch.get_rng_state()
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_an_input_that_is_not_contiguous(p):
    x = torch.randn(50, 60).t()
    y = dropout(x, p)
    assert 0 < int((y == 0).sum()) < x.numel()
    assert torch.equal(y[y != 0], (x * (1 / (1 - p)))[y != 0])


@pytest.mark.parametrize("p", [RARE, 0.25])
def test_the_gradient_has_the_mask_of_the_output(p):
    x = torch.randn(16, 64, dtype=torch.float64).t().requires_grad_()
    y = dropout(x, p)
    weights = torch.randn(16, 64, dtype=torch.float64).t()
    (y * weights).sum().backward()
    assert_close(x.grad, (y != 0) * weights / (1 - p), EXACT[torch.float64])


# ---- few, told by their places ----


@pytest.mark.parametrize("p", [1e-9, 0.01, RARE, 0.5])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_places_are_in_order_and_within(count, p):
    for _ in range(50):
        places = rare_places(count, p)
        assert places.dtype == torch.int64
        assert (places.diff() > 0).all()
        assert ((places >= 0) & (places < count)).all()


@pytest.mark.parametrize("p", [0.05, RARE])
def test_every_place_is_hit_as_often_as_any_other(p):
    """The first and the last too, and those that a second round of draws decides, which one in fifty takes."""
    count, draws = 40, 20000
    hits = torch.zeros(count, dtype=torch.float64)
    for _ in range(draws):
        hits.index_add_(0, places := rare_places(count, p), torch.ones(len(places), dtype=torch.float64))
    deviation = (hits / draws - p) / (p * (1 - p) / draws) ** 0.5
    assert float(deviation.abs().max()) <= STANDARD_ERRORS


def test_distances_are_geometric():
    p, count = 0.1, 2**20
    gaps = rare_places(count, p).diff()
    for k in range(1, 30):
        share, expected = float((gaps == k).double().mean()), p * (1 - p) ** (k - 1)
        assert abs(share - expected) <= STANDARD_ERRORS * (expected / len(gaps)) ** 0.5
