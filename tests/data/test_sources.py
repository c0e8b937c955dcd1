import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peftcli.data.formats import resolve_format
from peftcli.data.sources import read_rows
from peftcli.errors import DataError
from peftcli.recipe.schema import DataSection


def read(*sources):
    rows = read_rows(DataSection(train=sources).train, "data.train")
    return rows, rows.take(range(len(rows)))


def write(name, text):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, newline="")


def test_json_lines_with_blank_lines_bom_and_windows_line_ends():
    write("d.jsonl", '\ufeff{"text": "a"}\r\n\r\n{"text": "b", "n": 1}')
    rows, taken = read("d.jsonl")
    assert taken == [{"text": "a"}, {"text": "b", "n": 1}]
    assert rows.columns == ("text", "n")
    assert [rows.where(i) for i in range(2)] == ["d.jsonl:1", "d.jsonl:3"]


@pytest.mark.parametrize("text", ['[{"text": "a"},\n {"text": "b"}]', '{"text": "a"}\n{"text": "b"}\n'])
def test_json_is_an_array_or_lines(text):
    write("d.json", text)
    assert read("d.json")[1] == [{"text": "a"}, {"text": "b"}]


def test_rows_stay_as_they_are_written():
    row = {"messages": [{"role": "user", "a": 1}, {"role": "tool", "b": [None]}]}
    other = {"messages": [{"a": "text", "b": {"c": None}}]}
    write("d.jsonl", f"{json.dumps(row)}\n{json.dumps(other)}\n")
    assert read("d.jsonl")[1] == [row, other]


def test_csv_values_are_text():
    long = "x" * 200_000
    write("d.csv", f'prompt,completion\r\n"a, ""b""\nc",None\r\n\r\n1,NA\r\n{long},0.10\r\n')
    rows, taken = read("d.csv")
    assert [list(row.values()) for row in taken] == [['a, "b"\nc', "None"], ["1", "NA"], [long, "0.10"]]
    assert [rows.where(i) for i in range(3)] == ["d.csv:2", "d.csv:5", "d.csv:6"]


def test_tsv_and_text():
    write("d.tsv", "prompt\tcompletion\na, b\tc\n")
    write("d.txt", "first\n\n second\u2028still second\n")
    assert read("d.tsv")[1] == [{"prompt": "a, b", "completion": "c"}]
    assert read("d.txt")[1] == [{"text": "first"}, {"text": " second\u2028still second"}]


def test_parquet_objects_have_no_keys_of_other_rows():
    messages = [
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "tool_calls": [{"f": {"x": 1}}, {"f": {"y": 2}}]}],
    ]
    pq.write_table(pa.table({"messages": messages, "id": [1, None]}), "d.parquet")
    rows, taken = read("d.parquet")
    assert taken == [{"messages": messages[0], "id": 1}, {"messages": messages[1], "id": None}]
    assert rows.where(1) == "d.parquet row 2"


def test_several_sources_follow_one_another():
    write("a.jsonl", '{"text": "1"}\n{"text": "2"}\n')
    write("b.csv", "text\n3\n")
    write("c.txt", "4\n5\n6\n")
    rows, taken = read("a.jsonl", "b.csv", {"path": "c.txt", "split": "train[1:]"})
    assert [row["text"] for row in taken] == ["1", "2", "3", "5", "6"]
    assert len(rows) == 5
    assert rows.take([3, 0, 2]) == [{"text": "5"}, {"text": "1"}, {"text": "3"}]
    assert [rows.where(i) for i in (1, 2, 3)] == ["a.jsonl:2", "b.csv:2", "c.txt:2"]
    assert rows.select([3, 1]).where(0) == "c.txt:2"


def test_sources_with_other_columns():
    write("a.jsonl", '{"prompt": "1", "completion": "2"}')
    write("b.jsonl", '{"prompt": "1", "response": "2"}')
    with pytest.raises(
        DataError, match=r"b\.jsonl: .*differ from those of a\.jsonl: it lacks completion and adds resp"
    ):
        read("a.jsonl", "b.jsonl")


def test_a_changed_file_is_read_again():
    """The cache of `datasets` fails this: it goes by the time of modification."""
    for name in ("d.jsonl", "folder/d.jsonl"):
        source = str(Path(name).parent) if "/" in name else name
        write(name, '{"text": "old"}\n')
        before = Path(name).stat()
        assert read(source)[1] == [{"text": "old"}]
        write(name, '{"text": "new"}\n')
        os.utime(name, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert read(source)[1] == [{"text": "new"}]


def test_a_folder_has_splits():
    write("d/train.jsonl", '{"text": "a"}\n')
    write("d/test.jsonl", '{"text": "b"}\n')
    rows, taken = read({"path": "d", "split": "test"})
    assert taken == [{"text": "b"}]
    assert rows.where(0) == "d[test] row 1"
    with pytest.raises(DataError, match='Unknown split "dev"'):
        read({"path": "d", "split": "dev"})


def test_missing_files(tmp_path):
    write("data/train.jsonl", "{}")
    write("a/other.jsonl", "{}")
    for path, hint in {
        "data/trian.jsonl": "did you mean data/train.jsonl?",
        "other.jsonl": f"relative paths start at the current folder, {tmp_path}; there is {tmp_path}/a/other.jsonl",
        "recipes/data/train.jsonl": f"there is {tmp_path}/data/train.jsonl",
        "nowhere/x.jsonl": f"there is no folder {tmp_path}/nowhere either",
        "/nowhere/x.jsonl": "there is no folder /nowhere either",
        "data/zzz.csv": f"relative paths start at the current folder, {tmp_path}",
    }.items():
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: data.train: there is no such file")
        assert hint in str(caught.value)


HUB = """
import sys
from peftcli.data.sources import read_rows
from peftcli.errors import DataError
from peftcli.recipe.schema import DataSection
for path in ("nobody/nothing", "data/train"):
    try:
        read_rows(DataSection(train=path).train, "data.train")
    except DataError as error:
        print(error)
"""


def test_a_hub_dataset_that_cannot_be_reached(tmp_path):
    write("data/train.jsonl", "{}")
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    ran = subprocess.run([sys.executable, "-c", HUB], env=settings, capture_output=True, text=True, check=True)
    first, first_hint, second, second_hint = ran.stdout.splitlines()
    assert first.startswith("nobody/nothing: data.train: Couldn't reach 'nobody/nothing' on the Hub")
    assert "check the name, the network and HF_HUB_OFFLINE" in first_hint
    assert second.startswith("data/train: data.train: Couldn't reach")
    assert second_hint.strip() == "hint: did you mean data/train.jsonl?"
    assert ran.stderr == ""


IMPORTS = """
import sys
import peftcli.data, peftcli.data.encoding, peftcli.data.sources, peftcli.data.sampling, peftcli.data.preview
from peftcli.recipe.schema import DataSection
rows = peftcli.data.sources.read_rows(DataSection(train="d.jsonl").train, "data.train")
print(len(rows), sorted({"torch", "transformers", "datasets", "pyarrow", "jinja2"} & set(sys.modules)))
"""


def test_heavy_libraries_are_imported_when_they_are_needed():
    write("d.jsonl", '{"text": "a"}')
    ran = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert ran.stdout == "1 []\n"


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"text": "a", "id": 1}, {}, "text"),
        ({"prompt": "a", "completion": "b"}, {}, "prompt-completion"),
        ({"instruction": "a", "output": "b"}, {}, "instruction"),
        ({"instruction": "a", "input": "b", "output": "b"}, {}, "instruction"),
        ({"messages": []}, {}, "messages"),
        ({"conversations": []}, {}, "messages"),
        ({"chat": []}, {"messages": "chat"}, "messages"),
        ({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}, "prompt-completion"),
        ({"text": "a", "completion": "b"}, {"prompt": "text"}, "prompt-completion"),
        (
            {"prompt": "a", "completion": "b", "text": "c"},
            {"instruction": "prompt", "output": "completion"},
            "instruction",
        ),
    ],
)
def test_detection(row, columns, expected):
    write("d.jsonl", json.dumps(row))
    assert resolve_format(read("d.jsonl")[0], "auto", columns) == expected
