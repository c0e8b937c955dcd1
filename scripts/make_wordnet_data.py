"""Writes the demo data in ``recipes/data`` from WordNet 3.0, as Debian's package ``wordnet-base`` installs it.

    python scripts/make_wordnet_data.py --out recipes/data

Two small data sets of nouns that a reader knows, in their first sense:

- ``wordnet_{train,test}.jsonl``: a noun to define, and its definition (prompt and completion).
- ``wordnet_category_{train,test}.jsonl``: a definition, and which of eight categories its noun is in (text and label).

No noun and no definition is in both halves of a set. Rows are drawn and ordered by the SHA-256 of the noun, so the same
WordNet gives the same bytes on every machine and Python version.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SEED = "peftcli-demo"
NUM_TRAIN, NUM_TEST = 1000, 200
NUM_TRAIN_PER_LABEL, NUM_TEST_PER_LABEL = 100, 25
MIN_LENGTH, MAX_LENGTH = 15, 120  # characters of a definition
MIN_USES = 2  # in WordNet's tagged corpus, of a noun to define; words used once are often rare

# Numbers of the lexicographer files, from lexnames(5WN). Left out are abstract nouns, whose definitions are too vague
# to guess, and substances, most of which only a chemist knows.
CATEGORIES = {
    "04": "act",
    "05": "animal",
    "06": "artifact",
    "08": "body",
    "13": "food",
    "15": "location",
    "17": "object",
    "18": "person",
    "19": "phenomenon",
    "20": "plant",
}
# Objects and phenomena are too close to locations and acts to be told apart by a definition.
LABELS = ("act", "animal", "artifact", "body", "food", "location", "person", "plant")

WORD = re.compile(r"[a-z]{3,11}(_[a-z]{3,11})?")  # longer ones are terms of a trade
OMITTED_WORDS = frozenset({"ass", "bastard", "jackass", "nude", "slave", "teat", "tit"})
OMITTED_DEFINITIONS = re.compile(
    r"offensive|derogatory|disparag|insult|slang|obscen|vulgar|sex|genital|prostitut|pregnan|slave|suicid|excre|racial"
)

Row = dict[str, str]


class Noun(NamedTuple):
    """A noun in its first sense."""

    word: str
    category: str
    definition: str
    num_uses: int  # of this sense, in WordNet's tagged corpus


def main() -> None:
    """Writes the four data files and WordNet's licence."""
    parser = argparse.ArgumentParser(description="Write the demo data from WordNet 3.0.")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder of data.noun")
    parser.add_argument("--out", type=Path, default=Path("recipes/data"), help="folder to write to")
    args = parser.parse_args()
    try:
        write_data(args.wordnet, args.out)
    except FileNotFoundError as error:
        hint = "apt-get install wordnet-base, or name its folder with --wordnet"
        sys.exit(f"error: {error.filename}: not found\n\nhint: {hint}")


def write_data(wordnet: Path, out: Path) -> None:
    """Writes the four data files and ``LICENSE.wordnet`` to ``out``."""
    nouns = read_nouns(wordnet)
    out.mkdir(parents=True, exist_ok=True)
    define_train, define_test = define_rows(nouns, NUM_TRAIN, NUM_TEST)
    category_train, category_test = category_rows(nouns, NUM_TRAIN_PER_LABEL, NUM_TEST_PER_LABEL)
    write_jsonl(out / "wordnet_train.jsonl", define_train)
    write_jsonl(out / "wordnet_test.jsonl", define_test)
    write_jsonl(out / "wordnet_category_train.jsonl", category_train)
    write_jsonl(out / "wordnet_category_test.jsonl", category_test)
    (out / "LICENSE.wordnet").write_text(read_license(wordnet / "data.noun"), encoding="utf-8")


def read_nouns(wordnet: Path) -> list[Noun]:
    """Returns the usable nouns, most used first, no word and no definition twice.

    Args:
        wordnet: Folder of WordNet's ``data.noun``, ``index.noun`` (both wndb(5WN)) and ``cntlist.rev`` (cntlist(5WN)).
    """
    counts = read_counts(wordnet / "cntlist.rev")
    synsets = read_synsets(wordnet / "data.noun")
    found: list[Noun] = []
    for line in read_lines(wordnet / "index.noun"):
        lemma, _, _, num_pointers, *rest = line.split()
        offset = rest[int(num_pointers) + 2]  # the first sense's, after the pointers and two counts
        category, spellings, definition = synsets.get(offset, ("", "", ""))
        # The index is in lower case; the synset's own spelling tells a name ("Turkey") from a word.
        if WORD.fullmatch(lemma) and lemma in spellings and is_good(definition, lemma):
            found.append(Noun(lemma.replace("_", " "), category, definition, counts.get(lemma, 0)))
    unique: dict[str, Noun] = {}
    for noun in sorted(found, key=lambda noun: (-noun.num_uses, noun.word)):
        unique.setdefault(noun.definition, noun)  # of synonyms, which share a definition, the most used one stays
    return list(unique.values())


def read_counts(path: Path) -> dict[str, int]:
    """Returns how often each lemma was tagged as a noun in its first sense."""
    counts: dict[str, int] = {}
    for line in read_lines(path):
        sense_key, sense_number, count = line.split()
        lemma, _, lexical = sense_key.partition("%")
        if sense_number == "1" and lexical.startswith("1:"):  # 1 is the noun among the parts of speech
            counts[lemma] = int(count)
    return counts


def read_synsets(path: Path) -> dict[str, tuple[str, list[str], str]]:
    """Returns category, spellings and definition of the synsets in ``CATEGORIES``, by their offset."""
    synsets: dict[str, tuple[str, list[str], str]] = {}
    for line in read_lines(path):
        head, _, gloss = line.partition(" | ")
        offset, file_number, _, num_words, *rest = head.split()
        if file_number in CATEGORIES:
            spellings = rest[: 2 * int(num_words, 16) : 2]  # each is followed by its id
            synsets[offset] = (CATEGORIES[file_number], spellings, first_definition(gloss))
    return synsets


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a WordNet file without the licence at its top."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]


def read_license(path: Path) -> str:
    """Returns WordNet's licence, whose lines stand numbered at the top of each of its files."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("  ")]
    return "".join(re.sub(r"^ +\d+ ?", "", line).rstrip() + "\n" for line in lines)


def first_definition(gloss: str) -> str:
    """Returns the first definition of a gloss, which reads ``definition; definition; "example"; "example"``."""
    return gloss.partition('"')[0].partition(";")[0].strip(" :,")


def is_good(definition: str, lemma: str) -> bool:
    """Returns whether a definition suits a demo and reads well by itself: short, plain, not using its own word."""
    return (
        MIN_LENGTH <= len(definition) <= MAX_LENGTH
        and re.fullmatch(r"[a-z][a-z0-9 ,'/()-]*[a-z)](?<! of)", definition) is not None
        # Half a pair of parentheses: the definition went on behind a semicolon or a quotation mark in them.
        and definition.count("(") == definition.count(")")
        and lemma not in re.findall(r"[a-z]+", definition)
        and lemma not in OMITTED_WORDS
        and OMITTED_DEFINITIONS.search(definition) is None
    )


def define_rows(nouns: Iterable[Noun], num_train: int, num_test: int) -> tuple[list[Row], list[Row]]:
    """Returns prompts that ask for a noun's definition with their completions, for training and for the test.

    Raises:
        ValueError: There are too few nouns.
    """
    # Acts are as abstract as what CATEGORIES leaves out, but easy to recognise as acts, so only the labels have them.
    drawn = draw([noun for noun in nouns if noun.num_uses >= MIN_USES and noun.category != "act"], num_train + num_test)
    rows = [{"prompt": f'Define the noun "{noun.word}".\n', "completion": noun.definition} for noun in drawn]
    return rows[:num_train], rows[num_train:]


def category_rows(nouns: Iterable[Noun], num_train: int, num_test: int) -> tuple[list[Row], list[Row]]:
    """Returns definitions with their noun's category, for training and for the test.

    Args:
        nouns: Most used first; of each category the most used are taken.
        num_train: Rows of each category for training.
        num_test: Rows of each category for the test.

    Raises:
        ValueError: A category has too few nouns.
    """
    by_label: dict[str, list[Noun]] = {label: [] for label in LABELS}
    for noun in nouns:
        if noun.category in by_label and len(by_label[noun.category]) < num_train + num_test:
            by_label[noun.category].append(noun)
    train: list[Noun] = []
    test: list[Noun] = []
    for of_label in by_label.values():
        drawn = draw(of_label, num_train + num_test)
        train += drawn[:num_train]
        test += drawn[num_train:]
    return [category_row(noun) for noun in draw(train, len(train))], [
        category_row(noun) for noun in draw(test, len(test))
    ]


def category_row(noun: Noun) -> Row:
    """Returns the row that asks for a noun's category by its definition."""
    return {"text": noun.definition, "label": noun.category}


def draw(nouns: list[Noun], count: int) -> list[Noun]:
    """Returns ``count`` of ``nouns`` in the order of their words' SHA-256, which depends on no generator's version."""
    if len(nouns) < count:
        raise ValueError(f"{count} nouns are needed and only {len(nouns)} are usable")
    return sorted(nouns, key=lambda noun: hashlib.sha256(f"{SEED}:{noun.word}".encode()).digest())[:count]


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
