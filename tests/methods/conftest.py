import pytest

from tests.methods.building import token_ids


@pytest.fixture
def ids():
    return token_ids()
