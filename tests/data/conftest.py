import json
import socket

import pytest
from chat_templates import CHATML, SPECIAL_TOKENS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from peftcli.data.preview import render_sample
from peftcli.recipe.schema import DataSection

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello there, how are you today? I am fine, thank you.",
    "What is the capital of France? Paris is the capital of France.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a test of the data package used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def _in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def _post_processor(tokenizer, add_bos, trim_offsets):
    parts = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if add_bos:
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        parts.append(processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos]))
    return processors.Sequence(parts)


@pytest.fixture(scope="session")
def make_tokenizer():
    """A byte-level BPE tokenizer of 480 tokens; by default ChatML, with `<|im_end|>` as EOS and as padding."""

    def make(template=CHATML, eos="<|im_end|>", pad="<|im_end|>", add_bos=False, trim_offsets=False):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = [AddedToken(token, special=True) for token in SPECIAL_TOKENS]
        trainer = trainers.BpeTrainer(
            vocab_size=480, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(SENTENCES * 4, trainer)
        tokenizer.post_processor = _post_processor(tokenizer, add_bos, trim_offsets)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=pad)
        fast.chat_template = template
        return fast

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def section(tmp_path):
    """Writes a file and returns the data section that trains on it; rows are written as JSON Lines."""

    def make(content, name="data.jsonl", **settings):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return DataSection(train=name, **settings)

    return make


@pytest.fixture
def marked():
    """The text of samples with each supervised stretch in ⟦brackets⟧."""

    def mark(samples, tokenizer):
        return [
            "".join(f"⟦{part.text}⟧" if part.supervised else part.text for part in render_sample(sample, tokenizer))
            for sample in samples
        ]

    return mark
