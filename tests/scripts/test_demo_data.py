"""The demo data as shipped in ``recipes/data``, and the script that writes it."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "recipes" / "data"
SCRIPT = ROOT / "scripts" / "make_wordnet_data.py"
LABELS = {"act", "animal", "artifact", "body", "food", "location", "person", "plant"}
PROMPT = re.compile(r'Define the noun "([a-z]+(?: [a-z]+)?)"\.\n')

LICENSE = (
    "  1 This software is provided to you, the LICENSEE, by  \n  2 Princeton.  \n  3   \n  4 All rights reserved.  \n"
)
# Ten synsets in the form of data.noun; the index below lists their words with the offset of the first sense.
DATA_NOUN = """\
00000100 05 n 01 horse 0 001 @ 00000900 n 0000 | solid-hoofed quadruped; "he rode a horse"; "a fine; horse"
00000200 05 n 02 cat 0 true_cat 0 000 | feline mammal usually having thick soft fur; domestic cats
00000300 13 n 01 bread 0 000 | food made from dough of flour or meal
00000400 13 n 01 Turkey 0 000 | a country that is spelled like a bird
00000500 13 n 01 toast 0 000 | slices of toast that are warm
00000600 13 n 01 pie 0 000 | a dish (baked in pastry; with a top
00000700 13 n 01 jam 0 000 | a preserve
00000800 09 n 01 idea 0 000 | the content of cognition as a whole
00000900 06 n 01 jug 0 000 | a large bottle with a narrow mouth; "a jug"
00001000 06 n 01 jar 0 000 | a vessel with a wide mouth in slang
"""
INDEX_NOUN = """\
bread n 1 0 1 1 00000300
cat n 2 1 @ 2 2 00000200 00000100
horse n 2 2 @ ~ 2 1 00000100 00000200
idea n 1 0 1 1 00000800
jam n 1 0 1 1 00000700
jar n 1 0 1 1 00001000
jug n 1 0 1 1 00000900
pie n 1 0 1 1 00000600
toast n 1 0 1 1 00000500
true_cat n 1 0 1 0 00000200
turkey n 1 0 1 1 00000400
"""
CNTLIST = """\
bread%1:13:00:: 1 9
bread%2:30:00:: 1 50
cat%1:05:00:: 1 4
cat%1:18:00:: 2 70
horse%1:05:00:: 1 7
true_cat%1:05:00:: 1 1
"""


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="ascii").splitlines()]


def words_of(rows: list[dict[str, str]]) -> list[str]:
    matches = [PROMPT.fullmatch(row["prompt"]) for row in rows]
    return [match[1] for match in matches if match is not None]


def is_definition(text: str) -> bool:
    return 15 <= len(text) <= 120 and text == text.strip() and not set(text) & set('";|\n') and text[-1] != ","


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_wordnet_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    (tmp_path / "data.noun").write_text(LICENSE + DATA_NOUN)
    (tmp_path / "index.noun").write_text(LICENSE + INDEX_NOUN)
    (tmp_path / "cntlist.rev").write_text(CNTLIST)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "num_rows", "keys"),
    [
        ("wordnet_train.jsonl", 1000, ["prompt", "completion"]),
        ("wordnet_test.jsonl", 200, ["prompt", "completion"]),
        ("wordnet_category_train.jsonl", 800, ["text", "label"]),
        ("wordnet_category_test.jsonl", 200, ["text", "label"]),
    ],
)
def test_rows_and_keys(name: str, num_rows: int, keys: list[str]):
    rows = read(name)
    assert len(rows) == num_rows
    assert all(list(row) == keys for row in rows)


def test_definitions_are_unique_and_disjoint():
    train, test = read("wordnet_train.jsonl"), read("wordnet_test.jsonl")
    words = words_of(train) + words_of(test)
    completions = [row["completion"] for row in train + test]
    assert len(words) == 1200, "every prompt has the one form"
    assert len(set(words)) == len(words)
    assert len(set(completions)) == len(completions)
    assert [text for text in completions if not is_definition(text)] == []
    assert [word for word, text in zip(words, completions, strict=True) if word in re.findall("[a-z]+", text)] == []


def test_categories_are_balanced_and_disjoint():
    train, test = read("wordnet_category_train.jsonl"), read("wordnet_category_test.jsonl")
    texts = [row["text"] for row in train + test]
    assert Counter(row["label"] for row in train) == dict.fromkeys(LABELS, 100)
    assert Counter(row["label"] for row in test) == dict.fromkeys(LABELS, 25)
    assert len(set(texts)) == len(texts)
    assert [text for text in texts if not is_definition(text)] == []


def test_category_rows_are_mixed():
    labels = [row["label"] for row in read("wordnet_category_train.jsonl")]
    assert all(len(set(labels[start : start + 40])) >= 6 for start in range(0, len(labels), 40))


def test_license_is_whole():
    text = (DATA / "LICENSE.wordnet").read_text(encoding="ascii")
    assert text.startswith("This software and database is being provided to you, the LICENSEE, by\n")
    assert text.endswith("Princeton University and LICENSEE agrees to preserve same.\n")
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in text
    assert "without fee or\nroyalty is hereby granted" in text


def test_readme_names_every_file_and_its_rows():
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for path in DATA.glob("*.jsonl"):
        assert f"| `{path.name}` | {len(read(path.name)):,} |" in readme
    assert "LICENSE.wordnet" in readme


def test_read_nouns(script: ModuleType, wordnet: Path):
    """Kept: first senses, most used first. Dropped: names, circular, cut, short, abstract and rude ones, synonyms."""
    assert script.read_nouns(wordnet) == [
        ("bread", "food", "food made from dough of flour or meal", 9),
        ("horse", "animal", "solid-hoofed quadruped", 7),
        ("cat", "animal", "feline mammal usually having thick soft fur", 4),
        ("jug", "artifact", "a large bottle with a narrow mouth", 0),
    ]


def test_define_rows_split_what_is_used_often(script: ModuleType, wordnet: Path):
    train, test = script.define_rows(script.read_nouns(wordnet), 2, 1)
    assert (len(train), len(test)) == (2, 1)
    assert sorted(words_of(train + test)) == ["bread", "cat", "horse"]
    with pytest.raises(ValueError, match="4 nouns are needed and only 3 are usable"):
        script.define_rows(script.read_nouns(wordnet), 3, 1)


def test_category_rows_take_the_most_used_of_each_label(script: ModuleType):
    nouns = [
        script.Noun(f"{label} {rank}", label, f"{label} of rank {rank}", 9 - rank)
        for rank in range(5)
        for label in [*sorted(LABELS), "object"]
    ]
    train, test = script.category_rows(nouns, 2, 1)
    assert Counter(row["label"] for row in train) == dict.fromkeys(LABELS, 2)
    assert Counter(row["label"] for row in test) == dict.fromkeys(LABELS, 1)
    expected = {f"{label} of rank {rank}" for label in LABELS for rank in range(3)}
    assert {row["text"] for row in train + test} == expected
    with pytest.raises(ValueError, match="6 nouns are needed and only 5 are usable"):
        script.category_rows(nouns, 5, 1)


def test_draw_depends_on_words_alone(script: ModuleType, wordnet: Path):
    nouns = script.read_nouns(wordnet)
    assert script.draw(nouns, 3) == script.draw(nouns[::-1], 3)


def test_license_loses_its_line_numbers(script: ModuleType, wordnet: Path):
    assert script.read_license(wordnet / "data.noun") == (
        "This software is provided to you, the LICENSEE, by\nPrinceton.\n\nAll rights reserved.\n"
    )


def test_missing_wordnet_says_what_to_install(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, SCRIPT, "--wordnet", tmp_path, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "hint: apt-get install wordnet-base" in result.stderr
    assert not (tmp_path / "out").exists()
