"""The real tokenizer and chat template of the model that the documentation uses."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from peftcli.data import format_prompt, prepare
from peftcli.data.packing import Packs
from peftcli.recipe.schema import DataSection

FOLDER = Path.home() / ".cache" / "peftcli" / "SmolLM2-135M-Instruct"
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"

pytestmark = pytest.mark.skipif(
    not (FOLDER / "tokenizer.json").is_file(), reason=f"the demo model is not in {FOLDER}; scripts/ can make it"
)


@pytest.fixture(scope="module")
def smollm2():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def test_chat(smollm2, section, marked):
    turns = [("user", "Hi"), ("assistant", "Hello! 😀"), ("user", "Bye"), ("assistant", "See you.")]
    data = section([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    prepared = prepare(data, smollm2, vocab_size=49152, max_positions=8192, seed=0)
    assert marked(prepared.train, smollm2) == [
        SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello! 😀<|im_end|>⟧\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦See you.<|im_end|>⟧\n"
    ]
    prompt = format_prompt("Hi", "messages", smollm2)
    assert prepared.train[0].input_ids[: len(prompt)].tolist() == prompt


def test_prompt_and_completion(smollm2, section, marked):
    data = section([{"prompt": "The capital of France is", "completion": " Paris."}])
    prepared = prepare(data, smollm2, vocab_size=49152, max_positions=8192, seed=0)
    assert marked(prepared.train, smollm2) == ["The capital of France is⟦ Paris.<|im_end|>⟧"]


@pytest.mark.parametrize("max_length", [128, 256, 512, 1024, 2048])
def test_packs_of_the_demo_data_are_full(smollm2, max_length):
    rows = Path(__file__).parents[2] / "recipes" / "data" / "wordnet_train.jsonl"
    section = DataSection.model_validate({"train": str(rows), "max_length": max_length})
    samples = prepare(section, smollm2, vocab_size=49152, max_positions=8192, seed=0).train
    packs = Packs(samples.lengths, max_length, 42)
    fewest = -(-int(samples.lengths.sum()) // max_length)
    assert packs.fill >= 0.97 or len(packs) == fewest
