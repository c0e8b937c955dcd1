"""A merge goes layer by layer: what proves each, how files come to be, and how much memory it takes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftcli import merge, methods
from peftcli.checkpoint.adapter import save_adapter
from peftcli.errors import HostError, ModelError
from peftcli.merge.proof import LayerProof
from peftcli.merge.stored import entries
from peftcli.merge.tensor_file import TensorForm, tensor_file
from peftcli.sites import make_site
from tests.methods.building import adapt, config_for, origin_of, randomise

MERGEABLE = ("lora", "dora", "vera", "dvora", "ia3", "vblora", "waveft", "adalora")


# ---- files ----


def written(path, tensors, order, metadata=None):
    names = {value: key for key, value in merge.stored.DTYPES.items()}
    forms = {name: TensorForm(names[t.dtype], tuple(t.shape), t.nbytes) for name, t in tensors.items()}
    with tensor_file(path, forms, metadata or {"format": "pt"}) as file:
        for name in order:
            file.write(name, [merge.stored.bytes_of(tensors[name])] if tensors[name].numel() else [])
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_is_the_one_that_the_library_writes(dtype, tmp_path):
    tensors = {f"{name}.weight": torch.randn(3, 5).to(dtype) for name in ("zwei", "a", "größe")}
    tensors |= {"counter": torch.arange(3), "none": torch.zeros(0, 4, dtype=dtype), "one": torch.ones((), dtype=dtype)}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    ours = written(tmp_path / "ours", tensors, reversed(tensors))
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_numbers_of_every_width_are_read_by_the_library_and_by_us(tmp_path):
    tensors = {str(dtype): torch.arange(3).to(dtype) for dtype in merge.stored.DTYPES.values()}
    path = written(tmp_path / "ours", tensors, tensors)
    read, own = load_file(path), entries(path)
    assert read.keys() == own.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert own[name].start % tensor.itemsize == 0
        for found in (read[name], own[name].read()):
            assert found.dtype == tensor.dtype
            assert torch.equal(found.float(), tensor.float())
        assert b"".join(own[name].chunks()) == bytes(merge.stored.bytes_of(tensor))


def test_a_file_that_is_there_is_not_written_into(tmp_path):
    (tmp_path / "x").write_text("here")
    with pytest.raises(HostError, match="cannot write"), tensor_file(tmp_path / "x", {}, {}):
        pass
    assert (tmp_path / "x").read_text() == "here"


def test_a_base_that_shrinks_under_the_merge(tmp_path):
    save_file({"a": torch.ones(9)}, tmp_path / "x")
    (entry,) = entries(tmp_path / "x").values()
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-4])
    for read in (entry.read, lambda: list(entry.chunks())):
        with pytest.raises(ModelError, match="x is missing or damaged: it ends before a does"):
            read()


# ---- the proof of a layer ----


def layer(method="lora", kind="linear", seed=0):
    """Returns a site, its module, its adapter with random tensors, and base and merged weights and biases."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(seed)
    module = {"linear": nn.Linear(16, 8), "conv1d": Conv1D(8, 16), "embedding": nn.Embedding(16, 8)}[kind]
    site = make_site("target", module, frozenset({"key", "mlp-down"}))
    config = config_for(method)
    adapter = methods.load(method)(config, site, 0, methods.load(method).shared(config, [site], 0))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        weight, bias = module.weight.detach(), getattr(module, "bias", None)
        bias = bias.detach() if bias is not None else None
        turned = weight if kind == "linear" else weight.t()
        merged = adapter.merged(turned)
        merged_bias = bias if bias is None else adapter.merged_bias(bias)
    merged = merged if kind == "linear" else merged.t()
    return site, module, adapter, (weight, bias), (merged.detach(), merged_bias)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("method", MERGEABLE)
def test_a_right_merge_is_proven(method, kind):
    if kind not in methods.load(method).kinds:
        pytest.skip(f"{method} adapts no {kind}")
    proof = LayerProof()
    proof.check(*layer(method, kind))
    assert proof.layers == 1
    assert proof.max_difference <= merge.LAYER_TOLERANCE / 4  # with room: real layers are wider


@pytest.mark.parametrize(
    "wrong",
    [
        lambda weight: weight * 1.001,
        lambda weight: weight.flip(0),
        lambda weight: weight.roll(1, 1),
        lambda weight: weight.index_fill(0, torch.tensor([3]), 0),
        lambda weight: weight.index_put((torch.tensor(2), torch.tensor(5)), weight[2, 5] * 1.01),
        lambda weight: weight.index_fill(0, torch.tensor([3]), float("nan")),
        lambda weight: weight.index_fill(0, torch.tensor([3]), float("inf")),
    ],
    ids=["scaled", "rows turned", "columns moved", "a row of zeros", "a number", "a row of NaN", "a row of infinity"],
)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_a_wrong_merge_is_refused(kind, wrong):
    site, module, adapter, old, (merged, bias) = layer("lora", kind)
    with pytest.raises(ModelError, match="target: the merged layer differs from the adapted one by"):
        LayerProof().check(site, module, adapter, old, (wrong(merged), bias))


def test_a_forgotten_merge_or_bias_is_refused():
    site, module, adapter, old, new = layer("ia3")
    for wrong in (old, (new[0], new[1] * 1.01)):
        with pytest.raises(ModelError, match="the merged layer differs"):
            LayerProof().check(site, module, adapter, old, wrong)


def test_the_module_stays_as_it_was():
    site, module, adapter, old, new = layer()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in module.named_parameters()}
    LayerProof().check(site, module.train(), adapter, old, new)
    assert module.training
    assert {name: id(tensor) for name, tensor in module.named_parameters()} == {k: v[0] for k, v in before.items()}


def test_what_is_proven_depends_on_the_name_alone():
    site, *_ = layer()
    first, second = (merge.proof.probe(site, torch.float32) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, merge.proof.probe(replace(site, name="other"), torch.float32))


# ---- memory ----

PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from peftcli import merge, models
from peftcli.checkpoint.adapter import read_adapter
from transformers import AutoConfig

folder = Path(sys.argv[1])
skeleton = models.skeleton(AutoConfig.from_pretrained(folder / "base"))
adapter = read_adapter(folder / "adapter")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.nn.functional.linear(torch.ones(2, 9), torch.ones(3, 9))
before = peak()
count = merge.merge_files(folder / "base", skeleton, adapter, folder / "merged", None, proof=merge.LayerProof())
print(json.dumps([count, peak() - before]))
"""
MEGABYTE = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted in other units elsewhere")
def test_the_working_set_is_a_layer_and_not_a_shard(tmp_path, make_model):
    """The largest tensor three times, and some memory for all else, however large shard and model are."""
    model = make_model(hidden_size=256, intermediate_size=16_000, vocab_size=20_000, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "base", max_shard_size="150MB")
    config, _ = adapt(model, "lora", ["down_proj", "up_proj", "embed_tokens"])
    randomise(model, 0.1)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "merged").mkdir()
    save_adapter(tmp_path / "adapter", model, origin_of("lora", config, base_model=str(tmp_path / "base")))
    sizes = [tensor.nbytes for tensor in model.state_dict().values()]
    del model
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True)
    count, taken = json.loads(done.stdout.splitlines()[-1])
    limit = 3 * max(sizes) + 32 * MEGABYTE
    assert count == 9
    assert limit < 150_000_000 < sum(sizes) - 50_000_000  # a shard would not fit into it, let alone the model
    assert taken <= limit, f"{taken / MEGABYTE:.0f} of {limit / MEGABYTE:.0f} MB"
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
