"""The strict reading of YAML: what values mean, what is refused, and what a broken file says about itself."""

import time

import pytest
import yaml

from peftcli.errors import RecipeError
from peftcli.recipe import document
from peftcli.recipe.nodes import MAX_ALIASES, MAX_DEPTH, MAX_NODES
from peftcli.recipe.scalars import resolve

LOADERS = [yaml.SafeLoader, *([yaml.CSafeLoader] if hasattr(yaml, "CSafeLoader") else [])]


@pytest.fixture(params=LOADERS, ids=lambda loader: loader.__name__, autouse=True)
def _loader(request, monkeypatch):
    monkeypatch.setattr(document, "_LOADER", request.param)
    return request.param


def read(text):
    """The values of a document that has no problems."""
    node, problems = document.parse_file(text.encode(), "r.yaml")
    assert not problems
    return node.data()


def refused(text):
    """The first problem of a document, as `where: message`, and its hint."""
    raw = text if isinstance(text, bytes) else text.encode()
    try:
        _, problems = document.parse_file(raw, "r.yaml")
    except RecipeError as error:
        problems = error.problems
    assert problems, "nothing was refused"
    return f"{problems[0].where}: {problems[0].message}", problems[0].hint or ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5000.0),
        ("2.0e-4", 2e-4),
        (".5", 0.5),
        ("-1.", -1.0),
        ("+1e+3", 1000.0),
        ("12", 12),
        ("-7", -7),
        ("0123", 123),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("y", "y"),
        ("12:30:00", "12:30:00"),
        ("2026-01-01", "2026-01-01"),
        ("null", None),
        ("~", None),
        ("", None),
        ("None", "None"),
        ("1e", "1e"),
        ("e4", "e4"),
        ("1.2.3", "1.2.3"),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("=", "="),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    read_value = read(f"a: {text}\n")["a"]
    assert (read_value, type(read_value)) == (value, type(value))


@pytest.mark.parametrize("text", [".nan", ".inf", "-.INF", "1e999", "9" * 5000, "9223372036854775808", "0x" + "f" * 17])
def test_numbers_that_are_none_are_refused(text):
    message, hint = refused(f"b: 1\na: {text}\n")
    assert message.startswith("r.yaml:2: a: ")
    assert "quotes" in hint
    assert read(f"a: '{text}'\n")["a"] == text


def test_largest_numbers_are_read():
    assert resolve("9223372036854775807") == 2**63 - 1
    assert resolve("1e308") == 1e308


def test_structures():
    text = "a: [q_proj, v_proj]\nb:\n  c: {d: 1, e: [x]}\n  f:\n  - 1\n  - g: 2\n"
    assert read(text) == {"a": ["q_proj", "v_proj"], "b": {"c": {"d": 1, "e": ["x"]}, "f": [1, {"g": 2}]}}


def test_every_value_knows_its_line():
    node, _ = document.parse_file(b"a: 1\nb:\n  c:\n    [x,\n     y]\n", "r.yaml")
    assert dict(node.locations()) == {
        (): "r.yaml:1",
        ("a",): "r.yaml:1",
        ("b",): "r.yaml:2",
        ("b", "c"): "r.yaml:3",
        ("b", "c", 0): "r.yaml:4",
        ("b", "c", 1): "r.yaml:5",
    }


def test_anchors_and_merge_keys():
    text = "x: &x {a: 1, b: 2}\ny: &y {b: 3, c: 4}\nz:\n  <<: [*x, *y]\n  a: 9\nw:\n  <<: *x\nv: *x\n"
    values = read(text)
    assert values["z"] == {"a": 9, "b": 2, "c": 4}
    assert values["w"] == values["v"] == {"a": 1, "b": 2}
    assert read('"<<": 1\n') == {"<<": 1}


def test_byte_order_mark_is_no_text():
    assert read("\ufeffa: 1\n") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "where", "message", "hint"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: a", "given twice", "r.yaml:1"),
        ("s:\n  a: 1\n  a: 3\n", "r.yaml:3: s.a", "given twice", "r.yaml:2"),
        ("a: {b: 1, b: 1}\n", "r.yaml:1: a.b", "given twice", "r.yaml:1"),
        ("1: x\n", "r.yaml:1", "a key must be text, got 1", "quotes"),
        ("a:\n  true: x\n", "r.yaml:2: a", "got true", "quotes"),
        ("[a]: x\n", "r.yaml:1", "got a list", "quotes"),
        ("a: {{ name }}\n", "r.yaml:1: a", "got a mapping", "braces"),
        ("a: !!python/object/apply:os.system ['true']\n", "r.yaml:1: a", "tag", "plain data"),
        ("a: !!python/name:os.system x\n", "r.yaml:1: a", "tag", "plain data"),
        ("a: !!int '3'\n", "r.yaml:1: a", "tag", "plain data"),
        ("a: !custom x\n", "r.yaml:1: a", "!custom", "quotes"),
        ("a: *b\n", "r.yaml:1", "*b repeats a value that is not marked", "&b"),
        ("a: &a [*a]\n", "r.yaml:1", "not marked", "&a"),
        ("a:\n  <<: 3\n", "r.yaml:2", "<< merges mappings", ""),
        ("a: 1\n---\nb: 1\n", "r.yaml:2", "second document", "one YAML document"),
        ("a: 1\n...\nb\n", "r.yaml:3", "after the end", ""),
        ("", "r.yaml", "empty", "model, data and method"),
        ("# only this\n", "r.yaml", "empty", ""),
        ("- a\n", "r.yaml:1", "got a list", ""),
        ("type:lora\n", "r.yaml:1", 'got "type:lora"', "space after each colon"),
        ("method:\n\ttype: lora\n", "r.yaml:2", "tab", "spaces"),
        ("method:\n  type: lora\n\tr: 8\n", "r.yaml:3", "tab", "spaces"),
        ("method:\n  type: lora\n  r:8\n  alpha: 4\n", "r.yaml:3", "not a `key: value` pair", "space after the colon"),
        ("method:\n  r:8\n  type: lora\n", "r.yaml:2", "not a `key: value` pair", "space after the colon"),
        ("method:\n  type: lora\n    r: 8\n", "r.yaml:3", "not expected here", "same column"),
        ("method:\n    type: lora\n  r: 8\n", "r.yaml:3", "does not fit", "same column"),
        ('a: "x\nb: 2\nc: 3\n', "r.yaml:1", "quote that opens here", "close it"),
        ("a: 'it's'\nb: 2\n", "r.yaml:1", "does not fit", "quote"),
        ("b: 2\na: [q, v\nc: 2\n", "r.yaml:2", "`[` that opens here", "`]`"),
        ("b: 2\na: {q: 1\nc: 2\n", "r.yaml:2", "`{` that opens here", "`}`"),
        ("a: [\n", "r.yaml:2", "a value is missing here", "close every `[` and `{`"),
        ("a: [1,,2]\n", "r.yaml:1", "a value is missing here", "commas"),
        ("a: - x\n", "r.yaml:1", "list item", "line of its own"),
        ('a: "\\uD"\n', "r.yaml:1", "backslash", "single quotes"),
        ("a: b: c\n", "r.yaml:1", "not expected here", "quotes"),
        ("a: @x\n", "r.yaml:1", "begin with @", "quotes"),
        ("a: `x`\n", "r.yaml:1", "begin with `", "quotes"),
        ("a: *.jsonl\n", "r.yaml:1", "`*`", "quotes"),
        ('a: "C:\\data"\n', "r.yaml:1", "backslash", "single quotes"),
        ("%YAML 2.0\n---\na: 1\n", "r.yaml:1", "incompatible", ""),
        (b"a: 1\nb: \xff\n", "r.yaml:2", "not UTF-8", "UTF-8"),
        ("a: 1\nb: x\x00y\n", "r.yaml:2", "U+0000", "remove"),
        ("a: x\x1b[31m\n", "r.yaml:1", "U+001B", ""),
    ],
)
def test_what_is_wrong_is_said_with_its_line_and_a_hint(text, where, message, hint):
    said, advice = refused(text)
    assert said.startswith(f"{where}:")
    assert message in said
    assert hint in advice


def test_half_a_character_is_refused():
    said, _ = refused('a: "\\ud800"\n')
    assert said.startswith("r.yaml:1: ")


def test_problems_in_values_are_all_found():
    _, problems = document.parse_file(b"a: .nan\nb: 1\nb: 2\nc: !x 1\n4: 5\n", "r.yaml")
    assert [problem.where for problem in problems] == ["r.yaml:1", "r.yaml:3", "r.yaml:4", "r.yaml:5"]


def test_a_refused_value_is_left_out():
    node, problems = document.parse_file(b"a: [1, .nan, 2]\nb: .inf\n", "r.yaml")
    assert node.data() == {"a": [1, 2]}
    assert len(problems) == 2


def test_limit_on_depth():
    assert read(f"a: {'[' * (MAX_DEPTH - 2)}1{']' * (MAX_DEPTH - 2)}")
    said, _ = refused(f"a: {'[' * (MAX_DEPTH - 1)}1{']' * (MAX_DEPTH - 1)}")
    assert said == f"r.yaml:1: values nested more than {MAX_DEPTH} deep"


def test_limit_on_depth_counts_what_aliases_stand_for():
    half = MAX_DEPTH // 2
    nested = f"a: &a {'[' * half}1{']' * half}\nb: {{depth}}\n"
    assert read(nested.replace("{depth}", "[" * (half - 2) + "*a" + "]" * (half - 2)))
    said, _ = refused(nested.replace("{depth}", "[" * half + "*a" + "]" * half))
    assert "deep" in said


@pytest.mark.parametrize("_loader", LOADERS[-1:], indirect=True)
def test_limit_on_values():
    assert len(read(f"a: [{'1,' * (MAX_NODES - 3)}]")["a"]) == MAX_NODES - 3
    said, _ = refused(f"a: [{'1,' * (MAX_NODES - 2)}]")
    assert said == f"r.yaml:1: more than {MAX_NODES:,} values"


def test_limit_on_values_counts_what_aliases_stand_for():
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
    )
    said, _ = refused(bomb)
    assert said.endswith(f"more than {MAX_NODES:,} values")


def test_limit_on_aliases():
    assert len(read(f"a: &a 1\nb: [{'*a,' * MAX_ALIASES}]")["b"]) == MAX_ALIASES
    said, _ = refused(f"a: &a 1\nb: [{'*a,' * (MAX_ALIASES + 1)}]")
    assert "aliases" in said


@pytest.mark.parametrize("_loader", LOADERS[-1:], indirect=True)
def test_limit_on_size():
    comment = "a: 1\n#" + "x" * (document.MAX_BYTES - 6)
    assert read(comment) == {"a": 1}
    said, _ = refused(comment + "x")
    assert said == "r.yaml: the file is larger than 1 MB"


@pytest.mark.parametrize("unit", ["[", "{", "- ", "? ", "a: {", '"', "[[],", "!a ", "&a ", "*a ", "<<: ", "\n", "x "])
def test_a_megabyte_of_anything_is_answered_quickly(unit, _loader):  # noqa: PT019
    # The loader in pure Python, for where libyaml is missing, takes about a second: here it only has to be linear.
    size = document.MAX_BYTES if _loader is LOADERS[-1] else document.MAX_BYTES // 8
    text = (unit * size)[: size - 1]
    start = time.process_time()
    refused(text)
    assert time.process_time() - start < 2
