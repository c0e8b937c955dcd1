"""Broken recipes by the hundred: each is loaded or refused as a recipe, in time, and nothing else happens."""

import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftcli.errors import RecipeError
from peftcli.recipe import dump, load

from .conftest import GOOD

SEED = (
    GOOD
    + """\
  max_steps: &n 100
  save_steps: *n
  lr_scheduler_type: 'cosine'
evaluation: {generate: {max_new_tokens: 5, do_sample: true, top_p: 0.9}}
logging:
  report_to: [tensorboard]
output_dir: "runs/\\u0041"
"""
)
PIECES = [
    *(
        "[",
        "]",
        "{",
        "}",
        ":",
        ": ",
        ",",
        "-",
        "- ",
        "? ",
        "#",
        "&a ",
        "*a",
        "*n",
        "<<: ",
        "<<: *n",
        "!",
        "!!str ",
        "!!python/x ",
        "|",
        ">",
    ),
    *(
        "'",
        '"',
        "\\",
        "\t",
        "\n",
        "\r",
        "  ",
        "\x00",
        "\x1b",
        "\x85",
        "\u2028",
        "\ufeff",
        "é",
        "\U0001f600",
        "%",
        "@",
        "`",
        "~",
        "---\n",
    ),
    *(
        "...\n",
        "null",
        "true",
        "no",
        ".nan",
        ".inf",
        "1e999",
        "9" * 500,
        "-1",
        "0",
        "1e3",
        "extends: r.yaml\n",
        "extends: [",
        "a: " * 60,
    ),
    *(
        "[" * 60,
        "{a: " * 60,
        "model:",
        "method:",
        "type: dora",
        "train:",
        "eval_fraction: 0.1\n",
        "x" * 5000,
        "\\ud800",
        '"\\ud800"',
    ),
]


def mutant(rng):
    data = SEED.encode()
    for _ in range(rng.choice([1, 1, 1, 2, 6])):
        start = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:start] + rng.choice(PIECES).encode("utf-8", "surrogatepass") + data[start:]
        elif kind == 1:
            data = data[:start] + data[start + rng.randrange(1, 20) :]
        elif kind == 2:
            data = data[:start] + bytes([rng.randrange(256)]) + data[start + 1 :]
        elif kind == 3:
            rows = data.splitlines(keepends=True) or [b""]
            rng.shuffle(rows)
            data = b"".join(rows)
        elif kind == 4:
            end = rng.randrange(start, len(data) + 1)
            data = data[:end] + data[start:end] + data[end:]
        else:
            rows = data.splitlines(keepends=True) or [b""]
            row = rng.randrange(len(rows))
            key, colon, _ = rows[row].partition(b":")
            rows[row] = key + colon + b" " + rng.choice(PIECES).encode("utf-8", "surrogatepass") + b"\n"
            data = b"".join(rows)
    return data


def answer(file, overrides=()):
    """The recipe, or the refusal's text; any other exception is a failure of the test."""
    start = time.process_time()
    try:
        result = load(file, overrides).recipe
    except RecipeError as error:
        result = str(error)
        result.encode()
    assert time.process_time() - start < 2
    return result


def test_mutants_are_loaded_or_refused(folder):
    rng = random.Random(0)
    loaded = 0
    file = Path("r.yaml")
    file.write_text(SEED)
    assert not isinstance(answer(file), str)
    for _ in range(600):
        file.write_bytes(mutant(rng))
        result = answer(file)
        if not isinstance(result, str):
            loaded += 1
            file.write_text(dump(result), encoding="utf-8", newline="")
            assert answer(file) == result
    assert 10 < loaded < 300, "the mutants test nothing"


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    overrides=st.lists(
        st.text(max_size=30)
        | st.builds(
            "{}={}".format,
            st.sampled_from(
                [
                    "model.name",
                    "training.seed",
                    "data.train",
                    "method.r",
                    "method",
                    "training",
                    "output_dir",
                    "data.eval.x",
                ]
            ),
            st.text(max_size=20) | st.sampled_from(PIECES),
        ),
        max_size=3,
    )
)
def test_overrides_are_taken_or_refused(tmp_path_factory, overrides):
    file = tmp_path_factory.getbasetemp() / "overridden.yaml"
    if not file.exists():
        file.write_text(SEED)
    answer(file, overrides)


@pytest.mark.parametrize(
    "extends", ["r.yaml", ".", "..", "/", "~", "~nobody/x", "/dev/null", "a/" * 3000, "*", "\\0", "é"]
)
def test_extends_of_anything(folder, extends):
    assert isinstance(answer(folder.write(f'extends: "{extends}"\n')), str)


@pytest.mark.parametrize(
    "text",
    [
        GOOD + "".join(f"  lr{i}: 1\n" for i in range(20_000)),
        GOOD.replace("r: 8", "\n".join(f"  x{i}: 1" for i in range(20_000)).strip()),
        GOOD + "".join(f"k{i}: {{}}\n" for i in range(20_000)),
        GOOD.replace("data/train.jsonl", f"[{'{}, ' * 20_000}]"),
        GOOD.replace("method:", "  columns: {" + "".join(f"c{i}: 1, " for i in range(20_000)) + "}\nmethod:"),
        GOOD.replace("org/tiny-model", "x" * 900_000),
        GOOD + "  ? " + "y" * 900_000 + "\n  : 1\n",
        GOOD + "  a: 1\n" * 20_000,
    ],
    ids=["unknown", "method", "sections", "sources", "columns", "value", "key", "duplicates"],
)
def test_huge_recipes(folder, text):
    answer(folder.write(text))
