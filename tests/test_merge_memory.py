"""Merging takes the memory of a layer, and writes the file that safetensors would."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli.merge.stored import bytes_of, entries
from peftcli.merge.tensor_file import TensorForm, tensor_file
from tests.conftest import tiny_llama_config

NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@pytest.fixture
def tensors():
    return {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "half": torch.randn(3).half(),
        "double": torch.randn(2).double(),
        "int": torch.arange(5, dtype=torch.int32),
        "flags": torch.tensor([True, False, True]),
        "counts": torch.arange(4),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "none": torch.empty(0, 4),
        "one": torch.tensor(2.5),
    }


def test_the_bytes_are_those_that_the_library_writes(tensors, tmp_path):
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    forms = {name: TensorForm(NAMES[one.dtype], tuple(one.shape), one.nbytes) for name, one in tensors.items()}
    with tensor_file(tmp_path / "ours", forms, {"format": "pt"}) as file:
        for name in reversed(list(tensors)):  # the order of writing does not matter
            file.write(name, [bytes_of(tensors[name])] if tensors[name].numel() else [])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = load_file(tmp_path / "ours")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_every_entry_is_read_as_the_library_reads_it(tensors, tmp_path):
    save_file(tensors, tmp_path / "file", {"format": "pt"})
    found = entries(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in tensors.items())


PROGRAM = """
import resource, sys
import peftcli.run.merging, transformers.models.llama.modeling_llama
from peftcli import merge, models
from peftcli.checkpoint.adapter import read_adapter
from pathlib import Path
import torch, transformers
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
base, adapter, target = map(Path, sys.argv[1:])
Path(target).mkdir()
skeleton = models.skeleton(transformers.AutoConfig.from_pretrained(base))
before = peak()
merge.merge_files(base, skeleton, read_adapter(adapter), target, None, proof=merge.LayerProof())
print(peak() - before)
"""


def test_it_takes_the_memory_of_one_layer(tmp_path):
    """Of a base of 600 MB in two files, whose largest tensor has 32."""
    from transformers import AutoModelForCausalLM

    from peftcli.checkpoint.adapter import save_adapter
    from tests.methods.building import adapt, origin_of, randomise

    wide = {"hidden_size": 1024, "intermediate_size": 8192, "vocab_size": 128, "num_hidden_layers": 5}
    config = tiny_llama_config(**wide, num_attention_heads=8)
    base = tmp_path / "wide"
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(base, max_shard_size="400MB")
    largest = max(parameter.nbytes for parameter in model.parameters())
    total = sum(parameter.nbytes for parameter in model.parameters())

    method_config, _ = adapt(model, "lora", ".*(q|down)_proj")
    randomise(model)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", model, origin_of("lora", method_config))
    del model
    arguments = [base, tmp_path / "adapter", tmp_path / "merged"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(base.glob("*.safetensors"))) == 2
    assert total > 10 * largest
    assert int(done.stdout) < 3 * largest + 100e6
