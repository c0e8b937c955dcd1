"""Broken overrides and huge recipes: loaded or refused as a recipe, in time. Mutants are in `tests/fuzz`."""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftcli.errors import RecipeError
from peftcli.recipe import load
from scripts.torture.recipes import YAML_TEXTS

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
PIECES = [*YAML_TEXTS, "\x00", "\x1b", "\n"]


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
