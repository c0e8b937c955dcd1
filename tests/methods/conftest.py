import pytest
import torch


@pytest.fixture
def ids():
    """Two rows of token ids without the padding's, which fit every tiny model."""
    return torch.randint(2, 128, (2, 9))
