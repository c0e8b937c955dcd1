import copy
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peftcli.ops.dropout import dropout
from peftcli.ops.sharing import SharedInput


@pytest.fixture
def shared():
    """A `SharedInput`, and a function that asks it for noise and says whether it was drawn anew."""
    own = SharedInput()

    def drawn(reader, x, key=None):
        calls = []
        own.once(reader, x, key, lambda: calls.append(1) or torch.randn_like(x))
        return bool(calls)

    return SimpleNamespace(own=own, drawn=drawn)


def test_readers_of_one_tensor_get_one_result(shared):
    x = torch.ones(3)
    assert shared.drawn("q", x)
    assert not shared.drawn("k", x)
    assert not shared.drawn("v", x)


def test_who_asks_again_begins_anew_for_all(shared):
    x = torch.ones(3)
    assert shared.drawn("q", x)
    assert shared.drawn("q", x)
    assert not shared.drawn("k", x)


def test_another_tensor_key_version_or_mode_is_another_result(shared):
    x = torch.ones(3)
    assert shared.drawn("q", x)
    assert shared.drawn("k", x.clone())
    assert shared.drawn("q", x, key=1)
    assert shared.drawn("k", x, key=2)
    assert shared.drawn("q", x)
    x.add_(1)
    assert shared.drawn("k", x)
    with torch.no_grad():
        assert shared.drawn("v", x)


def test_a_result_goes_with_its_input(shared):
    x = torch.ones(3)
    shared.drawn("q", x)
    assert shared.own._last is not None
    del x
    gc.collect()
    assert shared.own._last is None


def test_without_a_version_nothing_is_shared(shared):
    with torch.inference_mode():
        x = torch.ones(3)
        assert shared.drawn("q", x)
        assert shared.drawn("k", x)


def test_copies_share_among_themselves_and_begin_without_a_result(shared):
    x = torch.ones(3, requires_grad=True)
    shared.own.once("q", x, None, lambda: x * 2)  # not a leaf, which cannot be copied
    one, other = copy.deepcopy((shared.own, shared.own))
    assert one is other
    assert one is not shared.own
    assert one._last is None
    assert pickle.loads(pickle.dumps(shared.own))._last is None


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_drop_the_same(p, reentrant):
    """The region's own input is what is shared: the same object when it is run again, with a result still there."""

    def gradient(run):
        own = SharedInput()
        torch.manual_seed(0)
        x = torch.ones(40, 8, requires_grad=True)
        weights = torch.randn(3, 40, 8)

        def region(x):
            both = [own.once(reader, x, p, lambda: dropout(x, p)) * weights[i] for i, reader in enumerate("qv")]
            return (sum(both) + dropout(x, p) * weights[2]).square()

        run(region, x).sum().backward()
        return x.grad

    expected = gradient(lambda region, x: region(x))
    found = gradient(lambda region, x: checkpoint(region, x, use_reentrant=reentrant))
    assert torch.equal(found, expected)
