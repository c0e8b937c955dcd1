import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chat_templates import CHATML, LLAMA3
from tokenizers import AddedToken

from peftcli import locks
from peftcli.data import cache, prepare, read, store
from peftcli.data.dataset import EncodedDataset, Sample
from peftcli.errors import DataError
from peftcli.recipe.schema import DataSection, ModelSection

ROWS = [{"prompt": f"What is {i}?\n", "completion": f" It is {i + 1}, of course." * (1 + i % 5)} for i in range(1200)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": f"fox {i}"}]}
    for i in range(40)
]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """Where the cache of a test is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "peftcli" / "data"


@pytest.fixture
def encode(section, monkeypatch):
    """Encodes and counts the tokenizer's calls: `encode.calls`."""

    def run(content, tokenizer, name="data.jsonl", **settings):
        data = section(content, name, **{"cache": True, **settings})
        calls = []
        real = type(tokenizer).__call__
        with monkeypatch.context() as patch:
            patch.setattr(type(tokenizer), "__call__", lambda *a, **k: calls.append(1) or real(*a, **k))
            prepared = prepare(data, tokenizer, vocab_size=480, max_positions=None, seed=0)
        run.calls = len(calls)
        return prepared

    return run


def entries(home):
    return sorted(path for path in home.iterdir() if path.name != ".locks")


def test_a_second_run_takes_what_the_first_has_left(encode, tokenizer, home):
    fresh = encode(ROWS, tokenizer, cache=False)
    assert encode.calls == 6  # prompts and wholes, of three chunks
    first = encode(ROWS, tokenizer)
    assert encode.calls == 6
    again = encode(ROWS, tokenizer)
    assert encode.calls == 0
    assert fresh.train.fingerprint == first.train.fingerprint == again.train.fingerprint
    assert fresh.train_report == first.train_report == again.train_report
    assert fresh.remarks == ()
    assert "kept for later runs in" in first.remarks[0]
    assert again.remarks == (f"train: encoded before, and taken from {entries(home)[0]}",)


def test_another_path_and_another_part_of_the_recipe_take_the_same(encode, tokenizer):
    encode(ROWS, tokenizer)
    encode(ROWS, tokenizer, name="other.jsonl", padding_free=False)
    assert encode.calls == 0


def test_what_was_held_out_is_kept_by_itself(encode, tokenizer):
    first = encode(ROWS, tokenizer, eval_fraction=0.1)
    again = encode(ROWS, tokenizer, eval_fraction=0.1)
    assert encode.calls == 0
    assert [first.train.fingerprint, first.eval.fingerprint] == [again.train.fingerprint, again.eval.fingerprint]
    assert first.eval_report == again.eval_report
    encode(ROWS, tokenizer, eval_fraction=0.2)
    assert encode.calls


@pytest.mark.parametrize(
    "change",
    [{"max_length": 8}, {"overlong": "drop"}, {"train_on": "all"}, {"format": "text", "columns": {"text": "prompt"}}],
    ids=str,
)
def test_another_field_is_another_entry(change, encode, tokenizer):
    encode(ROWS, tokenizer)
    encode(ROWS, tokenizer, **change)
    assert encode.calls


def test_each_field_of_the_section_is_in_the_key_or_cannot_matter():
    """A new field belongs into one of the two."""
    which_rows = {"train", "eval", "eval_fraction", "format"}  # the rows and their format are in the key themselves
    later = {"cache", "padding_free", "packing"}
    assert {*cache.DECIDING_FIELDS, *which_rows, *later} == set(DataSection.model_fields)


def test_a_changed_row_is_another_entry(encode, tokenizer):
    before = encode(ROWS, tokenizer)
    stamp = Path("data.jsonl").stat()
    text = "".join(json.dumps(row) + "\n" for row in ROWS).replace("It is 700,", "It is 007,")
    after = encode(text, tokenizer)
    os.utime("data.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert encode.calls
    assert before.train.fingerprint != after.train.fingerprint


def test_another_tokenizer_or_template_is_another_entry(encode, make_tokenizer):
    encode(CHATS, make_tokenizer())
    encode(CHATS, make_tokenizer())
    assert encode.calls == 0
    added = make_tokenizer()
    added.add_tokens([AddedToken("Hello", special=False)])
    others = [make_tokenizer(LLAMA3), make_tokenizer(CHATML + " "), make_tokenizer(eos="<s>"), added]
    for other in [*others, make_tokenizer(add_bos=True)]:
        encode(CHATS, other)
        assert encode.calls


def test_a_template_that_writes_the_date_is_asked_each_day(encode, make_tokenizer, monkeypatch):
    class Tomorrow(cache.datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + cache.datetime.timedelta(days=1)

    dated = make_tokenizer("{{ strftime_now('%d') }}" + CHATML)
    encode(CHATS, dated)
    encode(CHATS, dated)
    assert encode.calls == 0
    monkeypatch.setattr(cache.datetime, "datetime", Tomorrow)
    encode(CHATS, dated)
    assert encode.calls


def test_a_changed_encoder_is_another_entry(encode, tokenizer, monkeypatch):
    encode(ROWS, tokenizer)
    monkeypatch.setattr(cache, "code_digest", lambda: "another")
    encode(ROWS, tokenizer)
    assert encode.calls


def damage_byte(entry):
    with (entry / "input_ids.bin").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")


def damage_length(entry):
    with (entry / "supervised.bin").open("r+b") as file:
        file.truncate(100)


def damage_facts(entry, change=lambda facts: facts["report"].pop("rows")):
    facts = json.loads((entry / "facts.json").read_text())
    change(facts)
    (entry / "facts.json").write_text(json.dumps(facts))


DAMAGE = {
    "a byte": damage_byte,
    "a length": damage_length,
    "a file": lambda entry: (entry / "offsets.bin").unlink(),
    "no facts": lambda entry: (entry / "facts.json").write_text("{"),
    "half the facts": damage_facts,
    "another type": lambda entry: damage_facts(entry, lambda facts: facts["arrays"].update(input_ids=["|O", 3])),
    "an array that is none": lambda entry: damage_facts(entry, lambda facts: facts["arrays"].update(x=["<i4", 3])),
    "a list": lambda entry: (entry / "facts.json").write_text("[]"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_made_again(kind, encode, tokenizer, home):
    first = encode(ROWS[:20], tokenizer)
    DAMAGE[kind](entries(home)[0])
    again = encode(ROWS[:20], tokenizer)
    assert encode.calls
    assert "damaged" in again.remarks[0]
    assert first.train.fingerprint == again.train.fingerprint
    encode(ROWS[:20], tokenizer)
    assert encode.calls == 0


def test_what_is_wrong_is_said_each_time_and_leaves_nothing(encode, tokenizer, home):
    rows = [*ROWS[:3], {"prompt": "", "completion": "x"}]
    for _ in range(2):
        with pytest.raises(DataError, match="prompt is empty"):
            encode(rows, tokenizer)
    assert entries(home) == []


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(encode, tokenizer, home):
    home.parent.mkdir(parents=True)
    home.write_text("a file")
    prepared = encode(ROWS[:20], tokenizer)
    assert len(prepared.train) == 20
    assert "not kept for later runs" in prepared.remarks[0]
    assert str(home) in prepared.remarks[0]


def test_large_data_is_kept_without_being_asked(encode, tokenizer, home, monkeypatch):
    encode(ROWS, tokenizer, cache="auto")
    assert not home.exists()
    monkeypatch.setattr(cache, "MIN_BYTES", 1000)
    mapped = encode(ROWS, tokenizer, cache=False).train
    assert list(home.iterdir()) == []
    assert isinstance(mapped.input_ids.base, np.memmap)
    assert encode(ROWS, tokenizer, cache="auto").train.fingerprint == mapped.fingerprint
    assert len(entries(home)) == 1


def test_what_was_not_used_for_longest_goes_first(encode, tokenizer, home, monkeypatch):
    for index, rows in enumerate((ROWS[:10], ROWS[:20], ROWS[:30])):
        encode(rows, tokenizer)
        for entry in entries(home):
            os.utime(entry, (index, index))
    encode(ROWS[:10], tokenizer)  # used again
    monkeypatch.setattr(cache, "MAX_BYTES", 0)
    encode(ROWS[:40], tokenizer)
    assert len(entries(home)) == 1
    encode(ROWS[:40], tokenizer)
    assert encode.calls == 0


def test_what_was_left_unfinished_goes_unless_somebody_is_at_work_on_it(encode, tokenizer, home):
    for name in ("held.tmp", "left.tmp", "left.old.tmp"):
        (home / name).mkdir(parents=True)
    with locks.file_lock(home / ".locks" / "held"):
        encode(ROWS[:10], tokenizer)
    assert [path.name for path in entries(home) if path.suffix] == ["held.tmp"]


def encode_in_a_process(tokenizer, data, start, answers):
    start.wait()
    prepared = prepare(data, tokenizer, vocab_size=480, max_positions=None, seed=0)
    answers.put((prepared.train.fingerprint, prepared.remarks[0].split()[2].strip(",")))


def test_of_two_processes_at_once_one_encodes(section, tokenizer):
    data = section(ROWS, cache=True)
    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    both = [context.Process(target=encode_in_a_process, args=(tokenizer, data, start, answers)) for _ in range(2)]
    for one in both:
        one.start()
    start.set()
    found = [answers.get(timeout=60) for _ in both]
    for one in both:
        one.join()
    assert len({fingerprint for fingerprint, _ in found}) == 1
    assert Counter(said for _, said in found) == {"and": 1, "before": 1}


def encode_and_be_killed(tokenizer, data):
    store.write_facts = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # as late as can be
    prepare(data, tokenizer, vocab_size=480, max_positions=None, seed=0)


def test_who_is_killed_blocks_and_misleads_nobody(encode, section, tokenizer, home):
    killed = multiprocessing.get_context("fork").Process(
        target=encode_and_be_killed, args=(tokenizer, section(ROWS, cache=True))
    )
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    (left,) = entries(home)
    assert (left / "input_ids.bin").stat().st_size
    made = encode(ROWS, tokenizer)
    assert encode.calls
    assert "damaged" not in made.remarks[0]
    assert entries(home) == [left.with_suffix("")]
    encode(ROWS, tokenizer)
    assert encode.calls == 0


def test_every_kind_of_sample_comes_back_as_it_was(tmp_path):
    def part(count, dtype=np.int32, task=0):
        samples = [
            Sample(np.arange(n, dtype=np.int32), np.ones(n, np.uint8), np.arange(n + 1).astype(dtype), None, task)
            for n in range(count)
        ]
        return EncodedDataset.of([one._replace(token_types=one.supervised) for one in samples], "answer")

    for index, parts in enumerate(
        ([part(3), part(0), part(2, task=1)], [part(2)], [part(2, np.float32)], [EncodedDataset.of([])])
    ):
        folder = tmp_path / str(index)
        folder.mkdir()
        assert store.Writer.into(folder).gather(parts).fingerprint == EncodedDataset.join(parts).fingerprint


def test_labels_are_part_of_what_is_encoded(section, make_tokenizer, home):
    tokenizer = make_tokenizer()
    rows = [{"text": "the fox", "label": name} for name in ("a", "b", "b", "a")]
    model = ModelSection(name="m", task="sequence-classification")
    for labels in (rows, [{**row, "label": row["label"] + "x"} for row in rows]):
        data = section(labels, cache=True)
        raw = read(data, 0, model)
        for _ in range(2):
            prepared = prepare(data, tokenizer, vocab_size=480, max_positions=None, seed=0, raw=raw)
        assert "before" in prepared.remarks[0]
    assert "ax" in prepared.train_report.labels
    assert len(entries(home)) == 2


def test_a_hub_dataset_is_known_by_its_rows(tmp_path, tokenizer, section):
    from datasets import Dataset, load_dataset

    digests = []
    for index, rows in enumerate((ROWS[:30], ROWS[:30], [*ROWS[:29], ROWS[31]])):
        folder = tmp_path / f"set{index}"
        Dataset.from_list(rows).to_parquet(folder / "train.parquet")
        data = section("", "unused", cache=True).model_copy(update={"train": section("", "u").train})
        source = data.train[0].model_copy(update={"path": str(folder)})
        digests.append(read(data.model_copy(update={"train": (source,)}), 0).train.digest())
    assert load_dataset
    assert digests[0] == digests[1] != digests[2]


def test_waiting_for_a_lock_ends_when_its_holder_does(home):
    entered = threading.Event()
    with locks.file_lock(home / "lock"):
        other = threading.Thread(target=lambda: _enter(home / "lock", entered))
        other.start()
        assert not entered.wait(0.1)
    other.join(10)
    assert entered.is_set()


def _enter(path, entered):
    with locks.file_lock(path):
        entered.set()
