import pytest
import torch

from peftcli.ops.wavelet import HALF_POWER, exchanged, from_bands, inverse, inverse_reference, to_bands
from tests.methods.building import assert_close
from tests.tolerances import EXACT

FP64 = EXACT[torch.float64]
SHAPES = [(2, 2), (6, 10), (10, 6), (8, 8), (2, 12)]


def haar(n):
    """Returns T_n [n, n], written entry by entry."""
    T = torch.zeros(n, n, dtype=torch.float64)
    for j in range(n // 2):
        T[j, 2 * j] = T[j, 2 * j + 1] = T[j + n // 2, 2 * j] = 0.5**0.5
        T[j + n // 2, 2 * j + 1] = -(0.5**0.5)
    return T


def exchange(S):
    """Returns S̃, quadrant by quadrant."""
    m, n = (side // 2 for side in S.shape)
    return torch.cat([torch.cat([S[:m, :n], S[m:, :n]], 1), torch.cat([S[:m, n:], S[m:, n:]], 1)])


def swapped(S):
    """Returns S̃ through the places that `exchanged` gives."""
    rows, columns = (index.flatten() for index in torch.meshgrid(*map(torch.arange, S.shape), indexing="ij"))
    out = torch.full_like(S, torch.nan)
    out[exchanged(rows, columns, *S.shape)] = S.flatten()
    return out


@pytest.mark.parametrize("n", [2, 6, 10])
def test_both_directions_are_those_of_the_matrix(n):
    T, x = haar(n), torch.randn(n, 3, dtype=torch.float64)
    assert_close(T @ T.T, torch.eye(n, dtype=torch.float64), FP64)
    assert_close(to_bands(x) * HALF_POWER**0.5, T @ x, FP64)
    assert_close(from_bands(x) * HALF_POWER**0.5, T.T @ x, FP64)
    assert_close(from_bands(to_bands(x)) * HALF_POWER, x, FP64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_inverse_is_the_closed_form(shape):
    """Each coefficient of the four quadrants touches one block of two by two."""
    S = torch.randn(shape, dtype=torch.float64)
    m, n = (side // 2 for side in shape)
    expected = torch.empty_like(S)
    for i in range(m):
        for j in range(n):
            a, h, v, d = S[i, j], S[i, j + n], S[i + m, j], S[i + m, j + n]
            expected[2 * i, 2 * j] = (a + h + v + d) / 2
            expected[2 * i, 2 * j + 1] = (a + h - v - d) / 2
            expected[2 * i + 1, 2 * j] = (a - h + v - d) / 2
            expected[2 * i + 1, 2 * j + 1] = (a - h - v + d) / 2
    assert_close(inverse(swapped(S)), expected, FP64)
    assert_close(inverse_reference(S), expected, FP64)
    assert_close(haar(shape[0]).T @ exchange(S) @ haar(shape[1]), expected, FP64)


def test_without_the_exchange_it_is_another_matrix():
    S = torch.randn(6, 10, dtype=torch.float64)
    assert not torch.allclose(inverse(S), inverse_reference(S))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quadrants_are_exchanged_and_nothing_is_lost(shape):
    S = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(swapped(S), exchange(S))
    assert torch.equal(exchange(exchange(S)), S)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_transform_keeps_energy_and_has_its_transpose_as_inverse(shape):
    """⟨IDWT(S), G⟩ = ⟨S, DWT(G)⟩, which is what the gradient of S rests on."""
    S, G = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    assert_close(inverse(S).norm(), S.norm(), FP64)
    forward = HALF_POWER * to_bands(to_bands(G).T).T
    assert_close((inverse(S) * G).sum(), (S * forward).sum(), FP64)


def test_it_is_what_peft_reconstructs():
    from peft.tuners.waveft.waverec2d import waverec2d

    S = torch.randn(6, 10, dtype=torch.float64)
    (a, h), (v, d) = (half.chunk(2, dim=1) for half in S.chunk(2))
    assert_close(inverse_reference(S), waverec2d((a, (h, v, d)), "db1"), FP64)
