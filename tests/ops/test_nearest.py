import pytest
import torch

from peftcli.ops import nearest
from peftcli.ops.nearest import nearest_tokens, nearest_tokens_reference
from tests.tolerances import EXACT

P_ROWS, E_ROWS, WIDTH = 5, 61, 7


def tensors(dtype=torch.float32):
    return torch.randn(P_ROWS, WIDTH).to(dtype), torch.randn(E_ROWS, WIDTH).to(dtype)


@pytest.mark.parametrize("chunk", [4, 61, 1000])
@pytest.mark.parametrize("k", [1, 6, 61])
def test_the_nearest_are_those_of_all_distances(chunk, k, monkeypatch):
    monkeypatch.setattr(nearest, "CHUNK_ROWS", chunk)
    P, E = tensors(torch.float64)
    distances, rows = nearest_tokens(P, E, k)
    expected, at = nearest_tokens_reference(P, E, k)
    assert torch.equal(rows, at)
    assert torch.allclose(distances, expected, rtol=0, atol=EXACT[torch.float64])
    assert (distances.diff(dim=1) >= 0).all()


def test_a_row_of_the_table_is_nearest_to_itself_at_no_distance():
    _, E = tensors(torch.bfloat16)
    distances, rows = nearest_tokens(3 * E[[4, 60, 0]].float(), E, 2)
    assert rows[:, 0].tolist() == [4, 60, 0]
    assert distances[:, 0].max() <= EXACT[torch.float64]
    assert distances[:, 1].min() > 0.001


def test_opposite_rows_are_furthest_and_right_angles_in_the_middle():
    E = torch.tensor([[-2.0, 0.0], [0.0, 5.0], [0.1, 0.0]])
    distances, rows = nearest_tokens(torch.tensor([[3.0, 0.0]]), E, 3)
    assert rows.tolist() == [[2, 1, 0]]
    assert torch.allclose(distances, torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64))


def test_a_row_of_zeros_is_at_distance_one():
    _, E = tensors()
    E[3] = 0
    distances, _ = nearest_tokens(torch.zeros(1, WIDTH), E, 4)
    assert distances.tolist() == [[1.0] * 4]
    distances, rows = nearest_tokens(E[:1], E, E_ROWS)
    assert distances[rows == 3] == 1


def test_no_more_neighbours_than_rows():
    P, E = tensors()
    assert nearest_tokens(P, E[:3], 5)[1].shape == (P_ROWS, 3)


def test_nothing_of_the_size_of_all_pairs_of_rows_and_features_is_made(monkeypatch):
    monkeypatch.setattr(nearest, "CHUNK_ROWS", 8)
    P, E = tensors()
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), named=None):
            nonlocal largest
            result = function(*arguments, **(named or {}))
            for one in result if isinstance(result, tuple) else (result,):
                if isinstance(one, torch.Tensor) and one is not E:
                    largest = max(largest, one.numel())
            return result

    with Watch():
        nearest_tokens(P, E, 3)
    assert 0 < largest <= max(8 * WIDTH, P_ROWS * 3 * WIDTH)
