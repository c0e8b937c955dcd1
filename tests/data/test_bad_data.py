"""Every way in which data is wrong ends in a message that names the file, the row and the field."""

import io
import json
import struct
import zlib

import pytest

from peftcli.data import prepare, read
from peftcli.errors import DataError, PeftcliError, RecipeError
from peftcli.recipe import ModelSection


def chat(*turns):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


GOOD = '{"prompt": "a", "completion": "b"}\n'
GOOD_CHAT = chat(("user", "a"), ("assistant", "b")) + "\n"


def parquet(**columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    given = {
        name: pa.array(values, pa.binary()) if name == "image" else pa.array(values) for name, values in columns.items()
    }
    if isinstance(columns.get("text", [None])[0], bytes):  # bytes that say that they are text
        given["text"] = pa.Array.from_buffers(pa.string(), len(columns["text"]), given["text"].buffers())
    buffer = io.BytesIO()
    pq.write_table(pa.table(given), buffer)
    return buffer.getvalue()


def png(width, height):
    """Returns a PNG's header, which claims a size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">II", zlib.crc32(chunk), 0) + b"IDAT"


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) (r) file\n"
BOMB = png(40_000, 40_000)
LABELLED, IMAGES = {"task": "sequence-classification"}, {"task": "image-classification"}

# name: (file, content, settings, what the message starts with, what else is in it)
BAD = {
    "empty file": ("d.jsonl", "", {}, "d.jsonl: the file is empty", ""),
    "blank file": ("d.csv", " \n\n", {}, "d.csv: the file is empty", ""),
    "header only": ("d.csv", "prompt,completion\n", {}, "d.csv: data.train: there are no rows", ""),
    "empty array": ("d.json", "[]", {}, "d.json: data.train: there are no rows", ""),
    "latin 1": ("d.jsonl", (GOOD + '{"text": "caf\xe9"}\n').encode("latin1"), {}, "d.jsonl:2: not UTF-8", "byte 14"),
    "latin 1 csv": ("d.csv", "text\na\ncaf\xe9\n".encode("latin1"), {}, "d.csv:3: not UTF-8: byte 0xe9", "byte 4"),
    "utf 16": ("d.jsonl", GOOD.encode("utf-16"), {}, "d.jsonl:1: not UTF-8 but UTF-16", "iconv -f UTF-16"),
    "half a character": (
        "d.jsonl",
        '{"text": "ok \\ud83d"}\n',
        {},
        "d.jsonl:1: text holds half a character, \\ud83d, at position 4",
        "",
    ),
    "broken json": ("d.jsonl", GOOD + '{"prompt": "a"\n', {}, "d.jsonl:2: not JSON: Expecting ',' delimiter", ""),
    "two objects": ("d.jsonl", GOOD.strip() + GOOD, {}, "d.jsonl:1: not JSON: Extra data at column 35", ""),
    "a list in a line": ("d.jsonl", GOOD + "\n[1]\n", {}, "d.jsonl:3: a list, where each line must hold an object", ""),
    "broken array": ("d.json", '[{"text": "a"},\n{"text": }]', {}, "d.json:2: not JSON: Expecting value", ""),
    "text in an array": ("d.json", '[{"text": "a"}, "b"]', {}, "d.json row 2: text, not an object", ""),
    "pretty-printed object": ("d.json", '{\n"text": "a"\n}', {}, "d.json:1: not JSON", ""),
    "deep json": ("d.jsonl", '{"text": ' + "[" * 200_000 + "\n", {}, "d.jsonl:1: the JSON is nested too deeply", ""),
    "wrong number of values": (
        "d.csv",
        'prompt,completion\n"a\nb",c\na,b,c\n',
        {},
        "d.csv:4: 3 values for the 2 columns prompt, completion",
        "double quotes",
    ),
    "open quote": ("d.csv", 'text\n"a\n', {}, "d.csv:2: not CSV: unexpected end of data", ""),
    "semicolons": ("d.csv", "prompt;completion\na;b\n", {}, "d.csv:1: the columns seem to be separated by ';'", ""),
    "no header": (
        "d.csv",
        "Hi,Hello\na,b\n",
        {},
        "d.csv: data.format: the columns are Hi, Hello",
        "first line of a CSV",
    ),
    "unnamed column": ("d.csv", "prompt,,completion\n1,a,b\n", {}, "d.csv:1: a column has no name", ""),
    "column named twice": ("d.csv", "text,text\na,b\n", {}, 'd.csv:1: the header names "text" twice', ""),
    "not parquet": ("d.parquet", "PAR1", {}, "d.parquet: not Parquet", ""),
    "unknown suffix": ("d.xlsx", "x", {}, 'd.xlsx: the suffix ".xlsx" is not one that can be read', ".jsonl"),
    "misspelled field": (
        "d.jsonl",
        GOOD + '{"prompt": "a", "completions": "b"}\n',
        {},
        "d.jsonl:2: completion is missing",
        'did you mean "completions"?',
    ),
    "missing field": (
        "d.jsonl",
        GOOD + '{"prompt": "a"}\n',
        {},
        "d.jsonl:2: completion is missing",
        "the row has prompt;",
    ),
    "null": ("d.jsonl", GOOD + '{"prompt": "a", "completion": null}\n', {}, "d.jsonl:2: completion is null, not", ""),
    "empty answer": ("d.jsonl", GOOD + '{"prompt": "a", "completion": ""}', {}, "d.jsonl:2: completion is empty", ""),
    "blank prompt": ("d.csv", "prompt,completion\n  ,b\n", {}, "d.csv:2: prompt is empty", ""),
    "mixed types": (
        "d.jsonl",
        GOOD + '{"prompt": "a", "completion": 7}\n',
        {},
        "d.jsonl:2: completion is a number, not text",
        "",
    ),
    "empty output": ("d.json", '[{"instruction": "a", "output": " "}]', {}, "d.json row 1: output is empty", ""),
    "input is a list": (
        "d.jsonl",
        '{"instruction": "a", "input": [], "output": "b"}',
        {},
        "d.jsonl:1: input is a list, not text",
        "",
    ),
    "unknown role": (
        "d.jsonl",
        GOOD_CHAT + chat(("user", "a"), ("asistant", "b")),
        {},
        'd.jsonl:2: messages[1].role is "asistant"',
        'did you mean "assistant"?',
    ),
    "no role": ("d.jsonl", '{"messages": [{"content": "a"}]}', {}, "d.jsonl:1: messages[0].role is null", "user"),
    "no assistant": ("d.jsonl", chat(("user", "a")), {}, "d.jsonl:1: messages has no assistant turn", ""),
    "no messages": ("d.jsonl", '{"messages": []}', {}, "d.jsonl:1: messages has no assistant turn", ""),
    "assistant first": (
        "d.jsonl",
        chat(("system", "s"), ("assistant", "a")),
        {},
        "d.jsonl:1: messages[1] is from assistant; the first turn must be the user's",
        "",
    ),
    "empty turn": (
        "d.jsonl",
        chat(("user", "a"), ("assistant", "")),
        {},
        "d.jsonl:1: messages[1].content is empty",
        "",
    ),
    "content is null": (
        "d.jsonl",
        '{"messages": [{"role": "user"}]}',
        {},
        "d.jsonl:1: messages[0].content is null",
        "",
    ),
    "content is a list": (
        "d.jsonl",
        '{"messages": [{"role": "user", "content": []}]}',
        {},
        "d.jsonl:1: messages[0].content is a list, not text",
        "",
    ),
    "messages as text": ("d.jsonl", '{"messages": "a"}', {}, "d.jsonl:1: messages is text, not a list", ""),
    "a turn as text": ("d.jsonl", '{"messages": ["a"]}', {}, "d.jsonl:1: messages[0] is text, not an object", ""),
    "sharegpt role": (
        "d.jsonl",
        '{"conversations": [{"from": "bing", "value": "a"}]}',
        {},
        'd.jsonl:1: conversations[0].role is "bing"',
        "",
    ),
    "tools": ("d.jsonl", GOOD_CHAT.replace("{", '{"tools": "[", ', 1), {}, "d.jsonl:1: tools is not JSON", ""),
    "unknown columns": (
        "d.jsonl",
        '{"Question": "a", "answer": "b", "id": 1}',
        {},
        "d.jsonl: data.format: the columns are Question, answer, id, but",
        "`columns: {prompt: Question, completion: answer}`",
    ),
    "two formats": (
        "d.jsonl",
        '{"instruction": "a", "output": "b", "text": "c"}',
        {},
        "d.jsonl: data.format: the columns instruction, output, text fit instruction and text",
        "`format: instruction`",
    ),
    "columns of another format": (
        "d.jsonl",
        GOOD,
        {"format": "instruction"},
        "d.jsonl: data.format: the columns are prompt, completion, but instruction reads instruction, output",
        "`columns: {instruction: prompt, output: completion}`",
    ),
    "mapped column that is not there": (
        "d.jsonl",
        '{"question": "a", "completion": "b"}',
        {"columns": {"prompt": "qestion"}},
        'd.jsonl: data.columns.prompt: there is no column "qestion"; the columns are question, completion',
        'did you mean "question"?',
    ),
    "role that is a list": (
        "d.jsonl",
        '{"conversations": [{"from": ["human"], "value": "a"}]}',
        {},
        "d.jsonl:1: conversations[0].role is a list",
        "user",
    ),
    "role that garbles a terminal": (
        "d.jsonl",
        chat(("user\x1b]0;x\x07", "a")),
        {},
        'd.jsonl:1: messages[0].role is "user\\x1b]0;x\\x07"',
        "",
    ),
    "integer without end": (
        "d.jsonl",
        GOOD + '{"prompt": "a", "completion": ' + "9" * 5000 + "}",
        {},
        "d.jsonl:2: not JSON that can be read",
        "4300",
    ),
    "parquet of other bytes": ("d.parquet", parquet(text=[b"a", b"caf\xe9"]), {}, "d.parquet row 2: text", ""),
    "damaged parquet": ("d.parquet", parquet(text=["a"])[:4] + b"x" * 60 + b"PAR1", {}, "d.parquet: not Parquet", ""),
    "no label": (
        "d.jsonl",
        '{"text": "a", "label": "x"}\n{"text": "b"}',
        LABELLED,
        "d.jsonl:2: label is missing",
        "the row has text;",
    ),
    "null label": (
        "d.jsonl",
        '{"text": "a", "label": "x"}\n{"text": "b", "label": null}',
        LABELLED,
        "d.jsonl:2: label is null",
        "",
    ),
    "label beyond numbers": (
        "d.jsonl",
        '{"text": "a", "label": 0.5}\n{"text": "b", "label": 1e39}',
        LABELLED,
        "d.jsonl:2: label is 1e+39, not a finite number",
        "",
    ),
    "label of thousands of digits": (
        "d.jsonl",
        '{"text": "a", "label": 0.5}\n{"text": "b", "label": ' + "9" * 400 + "}",
        LABELLED,
        "d.jsonl:2: label is 999",
        "not a finite number",
    ),
    "tags of another length": (
        "d.jsonl",
        '{"tokens": ["a"], "tags": ["X"]}\n{"tokens": ["a", "b"], "tags": ["X"]}',
        {"task": "token-classification"},
        "d.jsonl:2: 2 tokens, but 1 tags",
        "",
    ),
    "word that is a number": (
        "d.jsonl",
        '{"tokens": ["a", 1], "tags": ["X", "X"]}',
        {"task": "token-classification"},
        "d.jsonl:1: tokens[1] is a number, not text",
        "",
    ),
    "image that is none": ("d.csv", "image,label\nd.csv,x\nd.csv,y\n", IMAGES, "d.csv:2: image is in no format", "PNG"),
    "image that is not there": (
        "d.csv",
        "image,label\n../x.png,x\n",
        IMAGES,
        "d.csv:2: image ../x.png cannot",
        "folder",
    ),
    "image without end": (
        "d.csv",
        "image,label\n/dev/zero,x\n",
        IMAGES,
        "d.csv:2: image /dev/zero cannot",
        "no such file",
    ),
    "image that starts a program": (
        "d.parquet",
        parquet(image=[EPS], label=["x"]),
        IMAGES,
        "d.parquet row 1: image is in no format that can be read",
        "PNG",
    ),
    "image of a billion pixels": (
        "d.parquet",
        parquet(image=[BOMB], label=["x"]),
        IMAGES,
        "d.parquet row 1: image has more pixels than an honest one",
        "",
    ),
    "split without rows": (
        "d.jsonl",
        GOOD,
        {"eval_fraction": 0.5},
        "data.eval_fraction: 0.5 of 1 rows leaves none",
        "",
    ),
}


def made(data, task, tokenizer):
    raw = read(data, 0, ModelSection(name="m", task=task))
    return prepare(
        data,
        None if task == "image-classification" else tokenizer,
        vocab_size=480,
        max_positions=None,
        seed=0,
        raw=raw,
    )


@pytest.mark.parametrize("case", BAD)
def test_bad_data(case, tokenizer, section):
    name, content, settings, start, rest = BAD[case]
    task = settings.get("task", "causal-lm")
    data = section(content, name, **{key: value for key, value in settings.items() if key != "task"})
    with pytest.raises(DataError) as caught:
        made(data, task, tokenizer)
    message = str(caught.value)
    assert message.startswith(start), message
    assert rest in message
    assert caught.value.exit_code == 3
    assert "\x1b" not in message


BAD_SETTINGS = {
    "a column that nothing reads": ({"columns": {"promt": "prompt"}}, 'did you mean "prompt"?'),
    "a column that the format does not read": (
        {"columns": {"text": "prompt"}, "format": "prompt-completion"},
        'no column "text" is read in format prompt-completion',
    ),
    "a split of a file": ({"train": {"path": "d.jsonl", "split": "test"}}, 'has no split "test"'),
    "a slice that is none": ({"train": {"path": "d.jsonl", "split": "train[x]"}}, 'split "train[x]" of d.jsonl'),
    "a configuration of a file": ({"train": {"path": "d.jsonl", "name": "main"}}, "d.jsonl is a file"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings(case, tokenizer, section):
    settings, expected = BAD_SETTINGS[case]
    data = section(GOOD, "d.jsonl")
    data = type(data).model_validate({"train": data.train, **settings})
    with pytest.raises(RecipeError) as caught:
        prepare(data, tokenizer, vocab_size=480, max_positions=None, seed=0)
    assert expected in str(caught.value)


def test_several_bad_rows_are_named_at_once_but_not_all(tokenizer, section):
    rows = [{"prompt": "a", "completion": "b" * (i % 2)} for i in range(2000)]
    with pytest.raises(PeftcliError) as caught:
        prepare(section(rows), tokenizer, vocab_size=480, max_positions=None, seed=0)
    assert [problem.where for problem in caught.value.problems] == [f"data.jsonl:{i}" for i in (1, 3, 5, 7, 9)]


def test_several_broken_lines_are_named_at_once(tokenizer, section):
    with pytest.raises(DataError) as caught:
        prepare(section(GOOD + "x\n" + GOOD + "y\n"), tokenizer, vocab_size=480, max_positions=None, seed=0)
    assert [problem.where for problem in caught.value.problems] == ["data.jsonl:2", "data.jsonl:4"]


def test_evaluation_data_needs_the_format_of_the_training_data(tokenizer, section):
    section(GOOD_CHAT, "chat.jsonl")
    data = section(GOOD, "d.jsonl", eval="chat.jsonl")
    with pytest.raises(DataError, match=r"chat\.jsonl: data\.format: the columns are messages, but prompt-completion"):
        prepare(data, tokenizer, vocab_size=480, max_positions=None, seed=0)
