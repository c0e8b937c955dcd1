import numpy as np
import pytest
from chat_templates import CHATML
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from peftcli.data import format_prompt, prepare
from peftcli.data.dataset import EncodedDataset, Sample
from peftcli.data.preview import render_sample
from peftcli.errors import DataError, ModelError, RecipeError


def encode(data, tokenizer, **settings):
    return prepare(data, tokenizer, **{"vocab_size": 480, "max_positions": None, "seed": 0, **settings})


def test_text_is_supervised_and_ends_in_eos(tokenizer, section, marked):
    prepared = encode(section([{"text": "Hello there"}]), tokenizer)
    assert prepared.format == "text"
    assert marked(prepared.train, tokenizer) == ["Hello⟦ there<|im_end|>⟧"]


def test_bos_comes_first_once_and_unsupervised(make_tokenizer, section, marked):
    tokenizer = make_tokenizer(add_bos=True)
    rows = [{"text": "fox"}, {"text": "<s>fox"}, {"text": "fox<|im_end|>"}]
    assert marked(encode(section(rows), tokenizer).train, tokenizer) == ["<s>⟦fox<|im_end|>⟧"] * 3


def test_the_answer_and_its_eos_are_supervised_where_padding_is_eos(make_tokenizer, section, marked):
    tokenizer = make_tokenizer(add_bos=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = section([{"prompt": "Hello <|im_end|>", "completion": " you<|im_end|> fox"}])
    assert marked(encode(data, tokenizer).train, tokenizer) == ["<s>Hello <|im_end|>⟦ you<|im_end|> fox<|im_end|>⟧"]


def test_a_token_across_the_boundary_is_supervised_and_counted(tokenizer, section, marked):
    rows = [{"prompt": "The qu", "completion": "ick brown"}, {"prompt": "The", "completion": " quick"}]
    prepared = encode(section(rows), tokenizer)
    assert marked(prepared.train, tokenizer) == ["The⟦ quick brown<|im_end|>⟧", "The⟦ quick<|im_end|>⟧"]
    assert prepared.train_report.straddling == 1
    assert "1 row with a token across the end of the prompt" in prepared.train_report.lines()[1]


def test_train_on_all_supervises_the_prompt(tokenizer, section, marked):
    data = section([{"prompt": "The quick", "completion": " fox"}], train_on="all")
    assert marked(encode(data, tokenizer).train, tokenizer) == ["The⟦ quick fox<|im_end|>⟧"]


def test_instructions_use_the_alpaca_prompt(tokenizer, section, marked):
    rows = [
        {"instruction": "Add {these}.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "Hi"},
        {"instruction": "Say hi.", "input": None, "output": "Hi"},
    ]
    prepared = encode(section(rows), tokenizer)
    with_input, *without = marked(prepared.train, tokenizer)
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {these}.\n\n### Input:\n1 2\n\n"
        "### Response:\n⟦3<|im_end|>⟧"
    )
    assert (
        without
        == [
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nSay hi.\n\n### Response:\n⟦Hi<|im_end|>⟧"
        ]
        * 2
    )


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("prompt-completion", {"prompt": "Hello", "completion": " fox"}),
        ("instruction", {"instruction": "Hello", "output": "fox"}),
    ],
)
def test_inference_feeds_what_comes_before_the_answer(form, row, make_tokenizer, section):
    tokenizer = make_tokenizer(add_bos=True)
    sample = encode(section([row]), tokenizer).train[0]
    prompt = format_prompt("Hello", form, tokenizer)
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert sample.supervised.tolist() == [0] * len(prompt) + [1] * (len(sample.input_ids) - len(prompt))


ROWS = [{"prompt": "a" * 9, "completion": "b" * n} for n in (1, 5, 20)]  # 11, 15 and 30 tokens with EOS


def test_truncation_keeps_the_left_part(tokenizer, section, marked):
    report = (prepared := encode(section(ROWS, max_length=14), tokenizer)).train_report
    assert prepared.train.lengths.tolist() == [11, 14, 14]
    assert marked(prepared.train, tokenizer)[1:] == ["aaaaaaaaa⟦bbbbb⟧"] * 2
    assert (report.truncated, report.dropped_overlong, report.dropped_unsupervised) == (2, 0, 0)
    assert report.lines() == [
        "3 rows gave 3 samples of 39 tokens, 12 of them supervised (30.8 %).",
        "2 samples cut to data.max_length = 14 tokens (the longest has 30).",
    ]


def test_overlong_rows_are_dropped_on_demand(tokenizer, section):
    report = encode(section(ROWS, max_length=14, overlong="drop"), tokenizer).train_report
    assert (report.rows, report.samples, report.dropped_overlong) == (3, 1, 2)
    with pytest.raises(DataError, match=r"every sample is longer than data\.max_length = 8"):
        encode(section(ROWS, max_length=8, overlong="drop"), tokenizer)


def test_overlong_rows_are_refused_on_demand(tokenizer, section):
    with pytest.raises(DataError) as caught:
        encode(section(ROWS, max_length=14, overlong="error"), tokenizer)
    assert [problem.where for problem in caught.value.problems] == ["data.jsonl:2", "data.jsonl:3"]
    assert caught.value.problems[1].message.startswith("30 tokens, but data.max_length is 14")


def test_rows_cut_before_their_answer_are_dropped_and_counted(tokenizer, section):
    rows = [*ROWS, {"prompt": "a" * 40, "completion": "b"}]
    report = encode(section(rows, max_length=14), tokenizer).train_report
    assert (report.samples, report.dropped_unsupervised) == (3, 1)
    assert "1 sample dropped: no supervised token within data.max_length = 14" in report.lines()[-1]


def test_a_dataset_without_answers_is_refused_and_shown(tokenizer, section):
    rows = [{"prompt": "The fox", "completion": "b"}] * 700
    with pytest.raises(DataError) as caught:
        encode(section(rows, max_length=2), tokenizer)
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "data.jsonl:1: nothing to learn in any of 700 rows. This one, as the model would see it: 'The' 'Ġfox' ...; its "
        "answer starts at token 3, and data.max_length is 2\n  hint: raise data.max_length; this row needs 4"
    )


def test_a_template_that_leaves_answers_out_is_refused(make_tokenizer, section):
    tokenizer = make_tokenizer("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}<|im_end|>{% endfor %}")
    rows = [{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}]
    with pytest.raises(DataError, match=r"data\.jsonl:1: the model's chat template leaves this answer out"):
        encode(section(rows), tokenizer)


def test_a_tokenizer_that_knows_none_of_the_text(section):
    backend = Tokenizer(models.BPE({"f": 0, "</s>": 1}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(DataError, match=r"nothing to learn in any of 1 rows.*'</s>'; the tokenizer has no tokens"):
        encode(section([{"text": "Hello"}]), tokenizer)


def test_ids_that_the_model_does_not_have(tokenizer, section):
    with pytest.raises(ModelError, match=r'data\.jsonl:2: the tokenizer makes id \d+ ("."|.)*embedding has 270 rows'):
        encode(section([{"text": "%"}, {"text": "fox"}]), tokenizer, vocab_size=270)


def test_more_positions_than_the_model_has(tokenizer, section):
    with pytest.raises(RecipeError, match=r"data\.max_length: 1,024 tokens are more than the model's 512 positions"):
        encode(section([{"text": "x"}]), tokenizer, max_positions=512)


def test_many_rows_keep_their_order_over_chunks(tokenizer, section, marked):
    rows = [{"prompt": f"{i}", "completion": f" {i}"} for i in range(1100)]
    prepared = encode(section(rows), tokenizer)
    assert marked(prepared.train, tokenizer) == [f"{i}⟦ {i}<|im_end|>⟧" for i in range(1100)]
    assert prepared.train.input_ids.dtype == np.int32
    assert prepared.train.supervised.dtype == np.uint8


def test_held_out_rows_are_those_missing_from_training(tokenizer, section, marked):
    data = section([{"text": f"row {i}"} for i in range(20)], eval_fraction=0.25)
    prepared = encode(data, tokenizer)
    texts = [decoded(sample, tokenizer) for part in (prepared.train, prepared.eval) for sample in part]
    assert (len(prepared.train), len(prepared.eval)) == (15, 5)
    assert sorted(texts) == sorted(f"row {i}<|im_end|>" for i in range(20))
    assert prepared.eval_report.rows == 5


def decoded(sample, tokenizer):
    return "".join(segment.text for segment in render_sample(sample, tokenizer))


def test_the_fingerprint_follows_every_part_of_a_sample():
    def dataset(ids, supervised, offsets):
        return EncodedDataset(np.array(ids, np.int32), np.array(supervised, np.uint8), np.array(offsets))

    base = dataset([1, 2, 3], [0, 1, 1], [0, 3])
    others = [([1, 2, 4], [0, 1, 1], [0, 3]), ([1, 2, 3], [0, 0, 1], [0, 3]), ([1, 2, 3], [0, 1, 1], [0, 1, 3])]
    assert base.fingerprint == dataset([1, 2, 3], [0, 1, 1], [0, 3]).fingerprint
    assert len({base.fingerprint, *(dataset(*other).fingerprint for other in others)}) == 4


def test_samples_by_index():
    samples = [Sample(np.arange(n, dtype=np.int32), np.ones(n, np.uint8)) for n in (2, 1, 3)]
    dataset = EncodedDataset.of(samples)
    assert len(dataset) == 3
    assert dataset.lengths.tolist() == [2, 1, 3]
    assert [sample.input_ids.tolist() for sample in dataset] == [[0, 1], [0], [0, 1, 2]]
    assert dataset[-1].input_ids.tolist() == [0, 1, 2]
    with pytest.raises(IndexError):
        dataset[3]


def test_slow_tokenizers_cannot_mark_chats(tokenizer, section, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}]
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
    assert tokenizer.chat_template == CHATML
    with pytest.raises(ModelError, match="cannot say which characters a token covers"):
        encode(section(rows), tokenizer)
