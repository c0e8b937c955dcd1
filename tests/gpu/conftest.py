"""What needs a GPU: `make test-gpu`. Elsewhere each test is skipped and says what it needs.

With PEFTCLI_TEST_GPU=rehearse the same code runs on the CPU, as far as there is something like it there: it shows that
the tests themselves work, and nothing of a GPU.
"""

import json
import os

import pytest
import torch

from tests.conftest import tiny_llama_config

REHEARSAL = os.environ.get("PEFTCLI_TEST_GPU") == "rehearse"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
BACKEND = "gloo" if REHEARSAL else "nccl"

_COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0
needs_cuda = pytest.mark.skipif(_COUNT < 1 and not REHEARSAL, reason="needs a CUDA device")
needs_two = pytest.mark.skipif(_COUNT < 2 and not REHEARSAL, reason="needs two CUDA devices")
needs_real_cuda = pytest.mark.skipif(_COUNT < 1, reason="needs a CUDA device; a CPU has nothing like it")

WIDE = {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 2}
"""Sizes at which LoRA's A with a rank of 200 has more than the 100,000 numbers that bitsandbytes pages."""


def allocated():
    """Returns the bytes that tensors take on the current GPU; 0 in a rehearsal."""
    return 0 if REHEARSAL else torch.cuda.memory_allocated()


def furthest(one, other):
    """Returns the largest difference between two sets of tensors, relative to the largest number in the second."""
    assert one.keys() == other.keys()
    difference = max(float((one[key] - other[key]).abs().max()) for key in one)
    return difference / max(float(tensor.abs().max()) for tensor in other.values())


def losses(folder):
    """Returns the losses that a run logged, step by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def recipe(recipe_file):
    """Writes a recipe of 12 steps, each logged; attention is eager, whose gradient is the same whenever it is taken."""

    def write(name="recipe.yaml", **sections):
        training = {"max_steps": 12, "warmup_steps": 0, **sections.pop("training", {})}
        model = {"attn_implementation": "eager", **sections.pop("model", {})}
        return recipe_file(name, model=model, training=training, **sections)

    return write


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory, word_tokenizer):
    """A Llama whose adapters are large enough to be paged, as transformers saves it."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("wide-llama")
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(tiny_llama_config(**WIDE)).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder
