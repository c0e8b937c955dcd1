"""What two processes add up, checked in both: run by `test_processes.py` under torchrun."""

import os
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from peftcli import inject, manifest, processes, quantization, recipe, sharding
from peftcli.errors import HostError, ModelError, PeerLostError
from peftcli.training import checks, distributed
from tests.conftest import tiny_llama_config
from tests.methods.building import adapt


def check_sums(group):
    rank = group.place.rank
    assert group.sums(1 + rank, torch.tensor(0.5), rank == 1) == [3.0, 1.0, 1.0]
    assert group.sums(2**53 - 1 if rank else 0) == [2**53 - 1]  # counts are not rounded to float32


def check_rows(group):
    rank = group.place.rank
    mine = torch.arange(3 * (rank + 1)).reshape(rank + 1, 3) + 100 * rank
    assert group.rows(mine).tolist() == [[0, 1, 2], [100, 101, 102], [103, 104, 105]]
    none = torch.zeros(0, 2, dtype=torch.float64) if rank else torch.ones(2, 2, dtype=torch.float64)
    assert group.rows(none).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert group.rows(none).dtype == torch.float64
    assert group.of_first(7 - rank) == 7


def check_alike(group):
    """Processes that have read other data, or another model, do not train together."""
    model = nn.Linear(3, 2)
    torch.manual_seed(1)
    nn.init.normal_(model.weight)
    nn.init.zeros_(model.bias)
    checks.all_are_alike(group, "the same", model)
    with pytest.raises(HostError, match="training data of this run is not the same"):
        checks.all_are_alike(group, f"of {group.place.rank}", model)
    with torch.no_grad():
        model.weight[0, 1] += 0.001 * group.place.rank
    with pytest.raises(HostError, match="model of this run is not the same"):
        checks.all_are_alike(group, "the same", model)


def check_gradients(group, bucket_size):
    distributed.BUCKET_SIZE = bucket_size
    rank = group.place.rank
    names = ("both", "only here", "nowhere", "wide")
    parameters = {name: nn.Parameter(torch.zeros(2, 3)) for name in names}
    parameters["wide"] = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    parameters["both"].grad = torch.full((2, 3), 1.0 + rank)
    parameters["wide"].grad = torch.full((4,), 2.0 * rank, dtype=torch.float64)
    if rank == 1:
        parameters["only here"].grad = torch.full((2, 3), 8.0)
    group.add_gradients(parameters)
    found = {name: one.grad for name, one in parameters.items()}
    assert found["both"].tolist() == [[1.5] * 3] * 2
    assert found["only here"].tolist() == [[4.0] * 3] * 2
    assert found["nowhere"] is None
    assert found["wide"].tolist() == [1.0] * 4
    assert found["wide"].dtype == torch.float64


def check_what_was_asked():
    """As many processes as the recipe says, or none."""
    for asked, fits in (("auto", True), (2, True), (3, False)):
        section = recipe.DistributedSection(num_processes=asked)
        if fits:
            distributed._require_as_asked(section, processes.here())
        else:
            with pytest.raises(HostError, match="3 were asked for, and 2 were started"):
                distributed._require_as_asked(section, processes.here())


def check_losses():
    """How a torn connection is told from an error of our own."""
    for text, kind in (
        ("[gloo] Connection closed by peer [127.0.0.1]:1", PeerLostError),
        ("[gloo] Timed out waiting 5000ms for recv operation to complete", HostError),
        ("The size of tensor a (3) must match", RuntimeError),
        ("peer access is not supported between these two devices", RuntimeError),
    ):
        with pytest.raises(kind) as caught, distributed.losses_explained(5):
            raise RuntimeError(text)
        assert type(caught.value) is kind


def tiny(**changes):
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(tiny_llama_config(**changes)).eval()


def check_spreading(group, *, packed):
    """The base is spread, what trains is not, and the answers are to the bit those of the whole model."""
    model, ids = tiny(), torch.arange(2, 20)[None]
    if packed:
        assert quantization.quantize(model, recipe.QuantizationSection(), {"lm_head"}) == 14
    adapt(model, "vera", "all-linear")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    counts = manifest.parameter_counts(model)
    assert sharding.shard(model, group.device, group.count) == 3  # two layers and the rest
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    sharding.reshard(model)
    own = {f"{path}.{name}" for path, part in inject.parts(model).items() for name, _ in part.named_parameters()}
    spread = {name: one for name, one in model.named_parameters() if sharding.is_spread(one)}
    assert set(spread) == set(whole) - own
    assert all(torch.equal(sharding.whole(one.detach()), whole[name]) for name, one in spread.items())
    count, size = sharding.shares(model)
    total = sum(whole[name].nbytes for name in spread)
    assert count == len(spread)
    assert total / 2 <= size <= total / 2 + 64 * len(spread)  # odd sizes are filled up
    assert f"fsdp2: {count} tensors are spread" in checks.what_is_spread(model)
    if not packed:
        assert manifest.parameter_counts(model) == counts


def check_putting_back():
    """What is read from a file goes to each process's share."""
    model = tiny()
    adapt(model, "full")
    group = distributed.begin(recipe.DistributedSection(), "no", torch.device("cpu"))[1]
    sharding.shard(model, group.device, group.count)
    (name, parameter), *_ = model.named_parameters()
    assert sharding.is_spread(parameter), name
    wanted = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
    with torch.no_grad():
        parameter.copy_(sharding.like(wanted, parameter))
    assert torch.equal(sharding.whole(parameter.detach()), wanted)
    other = torch.zeros(3)
    assert sharding.like(other, parameter) is other, "a step counter is not spread"


def check_no_layers(group):
    with pytest.raises(ModelError, match="cannot find this model's layers"):
        sharding.shard(nn.Linear(2, 2), group.device, group.count)
    with pytest.raises(HostError, match="has spread no parameter"):
        checks.what_is_spread(nn.Linear(2, 2))


def main():
    accelerator, group = distributed.begin(recipe.DistributedSection(), "no", torch.device("cpu"))
    assert (group.count, group.backend, accelerator.num_processes) == (2, "gloo", 2)
    check_sums(group)
    check_rows(group)
    check_alike(group)
    for bucket_size in (1, 7, 10**6):
        check_gradients(group, bucket_size)
    check_what_was_asked()
    check_losses()
    for packed in (False, True):
        check_spreading(group, packed=packed)
    check_putting_back()
    check_no_layers(group)
    assert group.is_own
    assert not distributed.begin(recipe.DistributedSection(), "no", torch.device("cpu"))[1].is_own
    group.end()
    assert not torch.distributed.is_initialized()
    sys.stderr.write("all held\n")


if __name__ == "__main__":
    main()
    os._exit(0)  # torch and gloo now and then abort as the interpreter ends, with all work done
