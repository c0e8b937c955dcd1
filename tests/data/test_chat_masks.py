"""Expected masks are written by hand: ⟦...⟧ is what the model learns."""

import pytest
from chat_templates import CHATML, GEMMA, HASHES, LLAMA3, PHI3, PLAIN, QWEN3, R1

from peftcli.data import format_prompt, prepare
from peftcli.errors import DataError, ModelError

TWO_TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because"},
]

MASKS = {
    "chatml": (
        CHATML,
        TWO_TURNS,
        [
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n⟦Hi<|im_end|>⟧\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n⟦Because<|im_end|>⟧\n"
        ],
    ),
    "system, and a last user turn that is left out": (
        CHATML,
        [{"role": "system", "content": "Be kind"}, *TWO_TURNS[:3]],
        [
            "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
            "<|im_start|>assistant\n⟦Hi<|im_end|>⟧\n"
        ],
    ),
    "an answer that is part of the header and of the marker": (
        CHATML,
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}],
        ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"],
    ),
    "an answer that ends in white space": (
        CHATML,
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b \n"}],
        ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦ b \n<|im_end|>⟧\n"],
    ),
    "an answer that holds a marker": (
        CHATML,
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x<|im_end|>y"}],
        ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦x<|im_end|>y<|im_end|>⟧\n"],
    ),
    "characters of several tokens": (
        CHATML,
        [{"role": "user", "content": "☃"}, {"role": "assistant", "content": "☃ 你好 😀"}],
        ["<|im_start|>user\n☃<|im_end|>\n<|im_start|>assistant\n⟦☃ 你好 😀<|im_end|>⟧\n"],
    ),
    "llama 3: BOS once, trimmed": (
        LLAMA3,
        [{"role": "user", "content": " Hello "}, {"role": "assistant", "content": " Hi\n"}],
        [
            "<s><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hi<|eot_id|>⟧"
        ],
    ),
    "gemma": (
        GEMMA,
        TWO_TURNS,
        [
            "<s><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n⟦Hi<end_of_turn>⟧\n"
            "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n⟦Because<end_of_turn>⟧\n"
        ],
    ),
    "qwen 3: the empty thought is glue, and each answer gets the text that inference shows": (
        QWEN3,
        TWO_TURNS,
        [
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Hi<|im_end|>⟧\n",
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Because<|im_end|>⟧\n",
        ],
    ),
    "qwen 3: an answer that is part of the glue": (
        QWEN3,
        [{"role": "user", "content": "A or k?"}, {"role": "assistant", "content": "k"}],
        ["<|im_start|>user\nA or k?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦k<|im_end|>⟧\n"],
    ),
    "qwen 3: a trimmed answer": (
        QWEN3,
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": " Hi\n"}],
        ["<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Hi<|im_end|>⟧\n"],
    ),
    "qwen 3: a thought in the content": (
        QWEN3,
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi"}],
        ["<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nHi<|im_end|>⟧\n"],
    ),
    "qwen 3: a thought of its own": (
        QWEN3,
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi", "reasoning_content": "hm"}],
        ["<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nHi<|im_end|>⟧\n"],
    ),
    "qwen 3: a tool call": (
        QWEN3,
        [{"role": "user", "content": "Go"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
        [
            "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n"
            '⟦<think>\n\n</think>\n\n<tool_call>{"name": "f"}</tool_call><|im_end|>⟧\n'
        ],
    ),
    "r1: the generation prompt opens the thought": (
        R1,
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "<think>\nhm</think>Hi"}],
        ["<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\n⟦hm</think>Hi<|im_end|>⟧\n"],
    ),
    "phi 3: the EOS that ends the text is not part of the answer": (
        PHI3,
        TWO_TURNS,
        [
            "<|user|>\nHello<|end|>\n<|assistant|>\n⟦Hi<|end|>⟧\n"
            "<|user|>\nWhy?<|end|>\n<|assistant|>\n⟦Because<|end|>⟧\n</s>"
        ],
    ),
    "no marker: EOS after the last answer": (
        PLAIN,
        TWO_TURNS,
        ["User: Hello\nAssistant:⟦ Hi⟧\nUser: Why?\nAssistant:⟦ Because</s>⟧"],
    ),
    "no marker: an answer that ends in a character of several tokens": (
        PLAIN,
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "😀"}, *TWO_TURNS[:2]],
        ["User: a\nAssistant:⟦ 😀⟧\nUser: Hello\nAssistant:⟦ Hi</s>⟧"],
    ),
    "a marker of ordinary text": (
        HASHES,
        TWO_TURNS[:2],
        ["### user\nHello\n### End\n### assistant\n⟦Hi\n### End⟧\n"],
    ),
}


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("case", MASKS)
def test_mask(case, trim_offsets, make_tokenizer, section, marked):
    template, messages, expected = MASKS[case]
    eos = "</s>" if template in (PHI3, PLAIN) else "<|im_end|>"
    tokenizer = make_tokenizer(template, eos=eos, pad=eos, add_bos=True, trim_offsets=trim_offsets)
    data = section([{"messages": messages}])
    prepared = prepare(data, tokenizer, vocab_size=len(tokenizer), max_positions=None, seed=0)
    assert marked(prepared.train, tokenizer) == expected
    assert prepared.format == "messages"


def test_sharegpt_is_read_as_messages(tokenizer, section, marked):
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    data = section([{"conversations": turns, "id": 7}])
    prepared = prepare(data, tokenizer, vocab_size=480, max_positions=None, seed=0)
    assert marked(prepared.train, tokenizer) == [
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n⟦Hi<|im_end|>⟧\n"
    ]


def test_all_tokens_are_supervised_on_demand(tokenizer, section, marked):
    data = section([{"messages": TWO_TURNS[:2]}], train_on="all")
    prepared = prepare(data, tokenizer, vocab_size=480, max_positions=None, seed=0)
    assert marked(prepared.train, tokenizer) == [
        "<|im_start|>⟦user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n⟧"
    ]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, QWEN3, PLAIN])
def test_inference_feeds_what_comes_before_the_answer(template, make_tokenizer, section):
    tokenizer = make_tokenizer(template, add_bos=True)
    prepared = prepare(section([{"messages": TWO_TURNS[:2]}]), tokenizer, vocab_size=480, max_positions=None, seed=0)
    prompt = format_prompt("Hello", "messages", tokenizer)
    sample = prepared.train[0]
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert not sample.supervised[: len(prompt)].any()


def test_tools_reach_the_template(make_tokenizer, section, marked):
    tokenizer = make_tokenizer("{% for t in tools %}{{ t['name'] }}{% endfor %}" + CHATML)
    rows = [{"messages": TWO_TURNS[:2], "tools": tools} for tools in ([{"name": "fox"}], '[{"name": "fox"}]')]
    prepared = prepare(section(rows), tokenizer, vocab_size=480, max_positions=None, seed=0)
    texts = marked(prepared.train, tokenizer)
    assert texts[0] == texts[1]
    assert texts[0].startswith("fox<|im_start|>")


def test_a_system_turn_that_the_template_refuses(make_tokenizer, section):
    rows = [{"messages": TWO_TURNS}, {"messages": [{"role": "system", "content": "x"}, *TWO_TURNS]}]
    with pytest.raises(DataError, match=r"data\.jsonl:2: the model's chat template refuses.*System role not supported"):
        prepare(section(rows), make_tokenizer(GEMMA), vocab_size=480, max_positions=None, seed=0)


def test_no_chat_template(make_tokenizer, section):
    with pytest.raises(DataError, match=r"need a chat template(.|\n)*hint: use the model's instruct variant"):
        prepare(section([{"messages": TWO_TURNS}]), make_tokenizer(None), vocab_size=480, max_positions=None, seed=0)


def test_no_marker_and_no_eos(make_tokenizer, section):
    tokenizer = make_tokenizer(PLAIN, eos=None, pad=None)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        prepare(section([{"messages": TWO_TURNS}]), tokenizer, vocab_size=480, max_positions=None, seed=0)
