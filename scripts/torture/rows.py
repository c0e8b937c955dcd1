"""Mutants of data files: each is prepared, or refused as data with its place, and nothing else happens."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from peftcli import data
from peftcli.errors import DataError
from peftcli.recipe import DataSection, ModelSection
from scripts.torture.fuzzing import Fuzzing
from scripts.torture.mutations import bytes_mutant, json_mutant, value_mutant
from scripts.torture.outcome import Order, Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNIT, SHORT, LONG = "mutants", 1200, 50_000
VOCABULARY, POSITIONS = 300, 512

TURNS = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
ROWS: Mapping[str, list[dict[str, Any]]] = {
    "prompt-completion": [{"prompt": "a b", "completion": "c"}, {"prompt": "é \U0001f600", "completion": "d e"}],
    "instruction": [
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "input": "c", "output": "b"},
    ],
    "text": [{"text": "a b c"}, {"text": "d\ne"}],
    "messages": [{"messages": TURNS}, {"messages": [{"role": "system", "content": "s"}, *TURNS, *TURNS]}],
    "conversations": [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
    ],
    "tools": [
        {
            "messages": [
                TURNS[0],
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "content": "1"},
                TURNS[1],
            ],
            "tools": json.dumps(TOOLS),
        },
        {"messages": TURNS, "tools": json.dumps(TOOLS)},
    ],
    "classification": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c", "label": "x"}],
    "regression": [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}],
    "multi-label": [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}],
    "token-classification": [{"tokens": ["a", "b"], "tags": ["O", "X"]}, {"tokens": ["c"], "tags": ["O"]}],
}
TASKS = {
    **dict.fromkeys(("classification", "regression", "multi-label"), "sequence-classification"),
    "token-classification": "token-classification",
}
TABLES = ("prompt-completion", "instruction", "text", "classification")
"""The formats whose rows a table of texts can hold."""


def run(order: Order) -> Outcome:
    """Prepares `order.count` mutants, shared out over file types and formats."""
    outcome = Outcome("mutants of data files, each prepared or refused with its place")
    tokenizer, random, fuzzing = make_tokenizer(), order.random("rows"), Fuzzing("rows", outcome, order.count)
    seeds = [(suffix, form) for suffix, (forms, *_) in KINDS.items() for form in forms]
    for at in range(order.count):
        suffix, form = seeds[at % len(seeds)]
        content, file = mutant(suffix, form, random), order.folder / f"d{suffix}"
        file.write_bytes(content)
        task = TASKS.get(form, "causal-lm")
        fuzzing.ask(suffix, content, partial(is_prepared, file, task, tokenizer))
    return fuzzing.finish()


def is_prepared(file: Path, task: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a file becomes samples, and is not refused by name; raises where anything else happens."""
    section = DataSection.model_validate({"train": str(file), "max_length": POSITIONS})
    model = ModelSection.model_validate({"name": "m", "task": task})
    try:
        raw = data.read(section, 0, model)
        made = data.prepare(section, tokenizer, vocab_size=VOCABULARY, max_positions=POSITIONS, seed=0, raw=raw)
    except DataError as error:
        str(error).encode()
        _require_places(error, file)
        return False
    assert len(made.train) > 0
    return True


def _require_places(error: DataError, file: Path) -> None:
    assert all(str(problem).startswith(str(file)) for problem in error.problems), str(error)


def mutant(suffix: str, form: str, random: Random) -> bytes:
    """Returns a file's bytes, with rows, values or bytes changed."""
    _, write, is_structured = KINDS[suffix]
    rows: Any = ROWS[form]
    if is_structured and random.random() < 0.6:
        rows = value_mutant(rows, random)
        if not isinstance(rows, list):
            rows = [rows]
    content = write(rows)
    return content if rows is not ROWS[form] else bytes_mutant(content, random)


def _json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def _json(rows: list[Any]) -> bytes:
    return json.dumps(rows).encode("utf-8", "surrogatepass")


def _table(rows: list[Any], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue().encode()


def _parquet(rows: list[Any]) -> bytes:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    buffer = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), buffer)
    except (pa.ArrowException, AttributeError, OverflowError, TypeError, UnicodeEncodeError):
        return json_mutant(b"{}", Random(0))  # what no Parquet file can hold
    return buffer.getvalue()


def _text(rows: list[Any]) -> bytes:
    return "\n".join(row["text"] for row in rows).encode()


KINDS: dict[str, tuple[tuple[str, ...], Callable[[list[Any]], bytes], bool]] = {
    ".jsonl": (tuple(ROWS), _json_lines, True),
    ".json": (tuple(ROWS), _json, True),
    ".parquet": (tuple(ROWS), _parquet, True),
    ".csv": (TABLES, _table, False),
    ".tsv": (TABLES, lambda rows: _table(rows, "\t"), False),
    ".txt": (("text",), _text, False),
}
"""What each suffix's file can hold, how it is written, and whether values may be of any kind."""


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Returns a byte-level tokenizer with a chat template that uses what templates use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="</s>"
    )
    fast.chat_template = (
        "{% if tools %}{% for t in tools %}{{ t | tojson }}{{ t['function'].name }}{% endfor %}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c['function'].name + '(' }}"
        "{% for k, v in c['function'].arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %}){% endfor %}{% endif %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return fast
