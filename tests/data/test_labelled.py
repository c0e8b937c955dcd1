"""Labelled texts, tagged words and answers: from files to samples and batches."""

import numpy as np
import pytest

from peftcli.data import prepare, prepare_eval, read
from peftcli.data.batching import Batcher
from peftcli.data.collation import collate, samples_of
from peftcli.data.dataset import EncodedDataset
from peftcli.data.meaning import Meaning, read_meaning, write_meaning
from peftcli.data.preview import render
from peftcli.errors import DataError, ModelError, RecipeError
from peftcli.recipe.schema import DataSection, ModelSection
from tests.families import BERT_TEMPLATE, T5_TEMPLATE, VOCABULARY, piece_tokenizer

CLS, SEP = VOCABULARY["<s>"], VOCABULARY["</s>"]


def model(task="sequence-classification", **fields):
    return ModelSection(name="tiny", task=task, **fields)


def encode(data, wanted, tokenizer=None):
    raw = read(data, 0, wanted)
    tokenizer = tokenizer or piece_tokenizer(BERT_TEMPLATE)
    return prepare(data, tokenizer, vocab_size=len(VOCABULARY), max_positions=None, seed=0, raw=raw)


def label_rows(*labels):
    return [{"text": "the cat", "label": label} for label in labels]


@pytest.mark.parametrize(
    ("labels", "kind", "names", "targets"),
    [
        (["b", "a", "b"], "single-label", ("a", "b"), [[1], [0], [1]]),
        ([10, 9, 2], "single-label", ("2", "9", "10"), [[2], [1], [0]]),
        (["10", "9"], "single-label", ("9", "10"), [[1], [0]]),
        ([True, False], "single-label", ("false", "true"), [[1], [0]]),
        ([["b"], [], ["a", "b"]], "multi-label", ("a", "b"), [[0, 1], [0, 0], [1, 1]]),
        ([1, 2.5], "regression", ("LABEL_0",), [[1], [2.5]]),
    ],
)
def test_what_labels_are(section, labels, kind, names, targets):
    prepared = encode(section(label_rows(*labels)), model())
    assert (prepared.meaning.labels.kind, prepared.labels) == (kind, names)
    assert [sample.target.tolist() for sample in prepared.train] == targets
    assert prepared.train[0].target.dtype == (np.int32 if kind == "single-label" else np.float32)


def test_the_problem_type_decides_what_cannot_be_told(section):
    rows = label_rows(1, 3)
    assert encode(section(rows), model()).labels == ("1", "3")
    assert encode(section(rows), model(problem_type="regression")).train[1].target.tolist() == [3.0]
    csv = section("text,label\nthe cat,0.5\nthe dog,2\n", "d.csv")
    assert encode(csv, model()).labels == ("0.5", "2")
    assert encode(csv, model(problem_type="regression")).train[0].target.tolist() == [0.5]
    several = encode(section(label_rows([1, 2.5], [0, 0])), model(problem_type="regression"))
    assert several.train[0].target.tolist() == [1, 2.5]


def test_the_number_of_labels_is_checked(section):
    assert encode(section(label_rows(0, 2)), model(num_labels=4)).labels == ("0", "1", "2", "3")
    assert encode(section(label_rows("a", "b")), model(num_labels=2)).labels == ("a", "b")
    with pytest.raises(RecipeError, match=r"model.num_labels is 3, but data.train has 2 labels: a, b"):
        encode(section(label_rows("a", "b")), model(num_labels=3))


@pytest.mark.parametrize(
    ("labels", "problem_type", "message"),
    [
        (["a", 1], "auto", "different kinds: text at data.jsonl:1, a number at data.jsonl:2"),
        (["a", ["b"]], "auto", "different kinds: text at data.jsonl:1, a list at data.jsonl:2"),
        (["a", None], "auto", "data.jsonl:2: label is null"),
        (["a", " "], "auto", "data.jsonl:2: label is empty"),
        ([1.5, "x"], "regression", 'data.jsonl:2: label is "x", not a finite number'),
        ([True, 1.5], "regression", "data.jsonl:1: label is True, not a finite number"),
        ([1.5], "single-label", "data.jsonl:1: label is 1.5, not a whole number"),
        ([["a"], "b"], "multi-label", "data.jsonl:2: label is text, not a list"),
        ([[1.0, 2], [1]], "regression", "data.jsonl:2: label has 1 numbers, and others have 2"),
        ([[], []], "multi-label", "no row has a label"),
    ],
)
def test_bad_labels(section, labels, problem_type, message):
    with pytest.raises(DataError) as caught:
        encode(section(label_rows(*labels)), model(problem_type=problem_type))
    assert message in str(caught.value)


def test_a_label_that_training_does_not_have(section):
    section(label_rows("a", "cat"), "train.jsonl")
    data = DataSection(train="train.jsonl", eval="eval.jsonl")
    section(label_rows("a", "cta"), "eval.jsonl")
    with pytest.raises(DataError, match=r'eval.jsonl:2: label is "cta", .*\n  hint: did you mean "cat"'):
        encode(data, model())


def test_all_bad_rows_at_once(section):
    with pytest.raises(DataError) as caught:
        encode(section([*label_rows("a", None), {"text": "x"}]), model())
    assert [problem.where for problem in caught.value.problems] == ["data.jsonl:2", "data.jsonl:3"]


def test_two_texts_are_told_apart_and_cut_by_the_tokenizer(section):
    rows = [{"text": "the a of and", "text_pair": "cat dog", "label": 0}, {"text": "a", "text_pair": "of", "label": 1}]
    tokenizer = piece_tokenizer(BERT_TEMPLATE)
    prepared = encode(section(rows, max_length=7), model(), tokenizer)
    first = prepared.train[0]
    assert (first.input_ids[0], first.input_ids[-1], len(first.input_ids)) == (CLS, SEP, 7)
    assert first.token_types.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert prepared.train_report.truncated == 1
    assert prepared.train_report.longest == 9
    assert tokenizer.backend_tokenizer.truncation is None  # or it would be saved as one that cuts
    batch = collate(list(prepared.train), 0, "padded", "sample")
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]
    assert batch.model_inputs()["token_type_ids"] is batch.token_type_ids


@pytest.mark.parametrize("overlong", ["drop", "error"])
def test_longer_texts_by_the_recipes_policy(section, overlong):
    data = section([{"text": "the a of and", "label": 0}, {"text": "a", "label": 1}], max_length=5, overlong=overlong)
    if overlong == "error":
        with pytest.raises(DataError, match=r"data.jsonl:1: 6 tokens, but data.max_length is 5"):
            encode(data, model())
    else:
        prepared = encode(data, model())
        assert len(prepared.train) == prepared.train_report.dropped_overlong == 1


def test_tags_are_at_the_first_token_of_each_word(section):
    rows = [{"tokens": ["the", "zap", "cat"], "tags": ["X", "Y", "X"]}]
    prepared = encode(section(rows), model("token-classification"))
    assert prepared.labels == ("X", "Y")
    assert prepared.train[0].target.tolist() == [-100, 0, 1, -100, -100, 0, -100]
    assert prepared.train[0].supervised.tolist() == [0, 1, 1, 0, 0, 1, 0]
    cut = encode(section(rows, max_length=4), model("token-classification")).train[0]
    assert cut.target.tolist() == [-100, 0, 1, -100]
    assert cut.input_ids[-1] == SEP


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["X"]}, "2 tokens, but 1 tags"),
        ({"tokens": "a b", "tags": ["X"]}, "tokens is text, not a list"),
        ({"tokens": [], "tags": []}, "tokens is empty"),
        ({"tokens": ["a", 1], "tags": ["X", "X"]}, r"tokens\[1\] is a number, not text"),
        ({"tokens": ["a"], "tags": [0.5]}, "tags is 0.5, not a whole number"),
    ],
)
def test_bad_words(section, row, message):
    good = {"tokens": ["a"], "tags": ["X"]}
    with pytest.raises(DataError, match=rf"data.jsonl:2: {message}"):
        encode(section([good, row]), model("token-classification"))


def test_words_without_tokens_are_counted(section):
    rows = [{"tokens": ["the", " ", "cat"], "tags": ["X", "Y", "X"]}]
    report = encode(section(rows), model("token-classification")).train_report
    assert report.lines()[-1] == "1 word of which the tokenizer makes no token: not learned."


def test_answers(section):
    rows = [{"prompt": "the cat", "completion": "a dog"}, {"prompt": "a of and to", "completion": "in is that it"}]
    tokenizer = piece_tokenizer(T5_TEMPLATE)
    prepared = encode(section(rows, max_length=4), model("seq2seq-lm"), tokenizer)
    ids = lambda text: [VOCABULARY[word] for word in text.split()]  # noqa: E731
    assert [sample.input_ids.tolist() for sample in prepared.train] == [ids("the cat </s>"), ids("a of and </s>")]
    # The cut answer has no end: a model that learned to end there would stop short.
    assert [sample.target.tolist() for sample in prepared.train] == [ids("a dog </s>"), ids("in is that it")]
    assert prepared.train_report.truncated == 1


def test_tasks_become_numbers(section):
    rows = [{"prompt": "the", "completion": "a", "task": task} for task in ("sum", "add", "sum")]
    prepared = encode(section(rows), model("causal-lm"))
    assert (prepared.meaning.tasks, prepared.num_tasks) == (("add", "sum"), 2)
    samples = list(prepared.train)
    assert collate(samples, 0, "padded").task_ids.tolist() == [1, 0, 1]
    flat = collate(samples, 0, "flat")
    assert flat.task_ids.tolist() == [
        [1] * len(samples[0].input_ids) + [0] * len(samples[1].input_ids) + [1] * len(samples[2].input_ids)
    ]
    assert [sample.task for sample in samples_of(flat)] == [1, 0, 1]
    without = encode(section([{"prompt": "the", "completion": "a"}]), model("causal-lm"))
    assert (without.num_tasks, without.train[0].task) == (1, 0)


def test_a_task_that_training_does_not_have(section):
    section([{"text": "the", "task": 1}], "train.jsonl")
    section([{"text": "the", "task": 2}], "eval.jsonl")
    with pytest.raises(DataError, match=r'eval.jsonl:1: task is "2", which is not in the training data: 1'):
        encode(DataSection(train="train.jsonl", eval="eval.jsonl"), model("causal-lm"))


def test_fingerprints_cover_labels_and_tasks(section):
    def fingerprint(rows, wanted=None):
        return encode(section(rows), wanted or model()).train.fingerprint

    first = fingerprint(label_rows("a", "b"))
    assert fingerprint(label_rows("a", "b")) == first
    assert fingerprint(label_rows("b", "a")) != first
    assert fingerprint([{**row, "task": i} for i, row in enumerate(label_rows("a", "b"))]) != first


def test_evaluation_alone_uses_the_runs_labels(section, tmp_path):
    section(label_rows("a", "b", "c"), "train.jsonl")
    section(label_rows("c", "c"), "eval.jsonl")
    data = DataSection(train="train.jsonl", eval="eval.jsonl")
    prepared = encode(data, model())
    write_meaning(tmp_path, prepared.meaning)
    meaning = read_meaning(tmp_path / "checkpoint-3", "sequence-classification")
    assert meaning == prepared.meaning
    limits = {"vocab_size": len(VOCABULARY), "max_positions": None, "seed": 0}
    alone = prepare_eval(data, piece_tokenizer(BERT_TEMPLATE), **limits, meaning=meaning)
    assert alone.fingerprint == prepared.eval.fingerprint
    assert alone[0].target.tolist() == [2]


def test_labels_that_nobody_wrote_down(tmp_path):
    with pytest.raises(ModelError, match=r"has no labels.json"):
        read_meaning(tmp_path, "token-classification")
    assert read_meaning(tmp_path, "causal-lm") == Meaning("causal-lm")


def test_virtual_ids_come_first_and_are_never_predicted(section):
    causal = encode(
        section([{"text": "the cat"}, {"text": "a"}]), model("causal-lm"), piece_tokenizer(T5_TEMPLATE)
    ).train
    batcher = Batcher(causal, 0, 32, joins=True, always=True, prompts=[(90, 91)])
    flat = batcher.batch([0, 1])
    (ids,), (labels,), (positions,) = flat.input_ids.tolist(), flat.labels.tolist(), flat.position_ids.tolist()
    n, m = (len(sample.input_ids) for sample in causal)
    assert ids == [90, 91, *causal[0].input_ids, 90, 91, *causal[1].input_ids]
    assert positions == [*range(n + 2), *range(m + 2)]
    assert [label for label in labels if label != -100] == [*causal[0].input_ids[1:], *causal[1].input_ids[1:]]
    assert labels[:3] == [-100] * 3
    assert flat.num_tokens == n + m + 4
    words = encode(section([{"tokens": ["the"], "tags": ["X"]}]), model("token-classification")).train
    padded = Batcher(words, 0, 32, joins=False, prompts=[(90,)]).batch([0])
    assert padded.input_ids.tolist() == [[90, CLS, VOCABULARY["the"], SEP]]
    assert padded.labels.tolist() == [[-100, -100, 0, -100]]
    assert padded.attention_mask.tolist() == [[1, 1, 1, 1]]


def test_virtual_tokens_must_fit(section):
    train = encode(section([{"text": "the cat"}]), model("causal-lm")).train
    longest = int(train.lengths.max())
    Batcher(train, 0, 32, joins=False, prompts=[(90, 91)], max_positions=longest + 2)
    with pytest.raises(RecipeError, match=r"with 2 virtual tokens before it.*\n  hint: set data.max_length to"):
        Batcher(train, 0, 32, joins=False, prompts=[(90, 91)], max_positions=longest + 1)


@pytest.mark.parametrize(
    ("wanted", "rows", "shown"),
    [
        (model(), label_rows("a", "b"), [("<s> the cat </s>", False), (" → ", False), ("a", True)]),
        (
            model("token-classification"),
            [{"tokens": ["the", "cat"], "tags": ["X", "X"]}],
            [("<s>", False), (" the/X", True), (" cat/X", True), (" </s>", False)],
        ),
        (
            model("seq2seq-lm"),
            [{"prompt": "the", "completion": "cat"}],
            [("the </s>", False), (" → ", False), ("cat </s>", True)],
        ),
    ],
)
def test_previews(section, wanted, rows, shown):
    tokenizer = piece_tokenizer(T5_TEMPLATE if wanted.task == "seq2seq-lm" else BERT_TEMPLATE)
    prepared = encode(section(rows), wanted, tokenizer)
    found = render(prepared.train, 0, tokenizer, prepared.meaning.labels)
    assert [(part.text, part.supervised) for part in found] == shown


@pytest.mark.parametrize("goal", ["sample", "token", "answer"])
def test_samples_are_read_back_from_a_batch(section, goal):
    rows, task = {
        "sample": (label_rows([], ["a", "b"]), "sequence-classification"),
        "token": ([{"tokens": ["the", "zap"], "tags": [0, 1]}, {"tokens": ["a"], "tags": [1]}], "token-classification"),
        "answer": ([{"prompt": "the a", "completion": "a"}, {"prompt": "a", "completion": "the a"}], "seq2seq-lm"),
    }[goal]
    samples = list(encode(section(rows), model(task)).train)
    again = samples_of(collate(samples, 0, "padded", goal))
    for before, after in zip(samples, again, strict=True):
        assert before.input_ids.tolist() == after.input_ids.tolist()
        assert before.target.tolist() == after.target.tolist()
    assert (
        EncodedDataset.of(samples, goal).fingerprint
        == EncodedDataset.join([EncodedDataset.of([s], goal) for s in samples]).fingerprint
    )
