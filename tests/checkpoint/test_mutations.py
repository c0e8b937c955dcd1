"""Adapters that are not what they should be: each is refused with the reason, and --force has its limits."""

import shutil

import pytest

from peftcli.checkpoint import seal as seals
from peftcli.checkpoint.adapter import WEIGHTS_FILE
from peftcli.checkpoint.seal import SEAL_FILE
from peftcli.errors import ModelError
from tests.checkpoint.mutations import MUTATIONS, SEALED, THE_28, Mutation, count_refused, refusal, write_subject

NOTHING = Mutation(lambda adapter, base: None)
each_mutation = pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("whole")
    write_subject(folder, model_folder)
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def is_told(found, words):
    assert isinstance(found, ModelError), found
    assert words in str(found)
    assert found.exit_code == 4
    assert found.problems[0].hint


def test_there_are_as_many_as_were_tried_on_peft():
    assert len(THE_28) == 28


def test_a_whole_one_is_taken_without_a_word(copied):
    assert refusal(NOTHING, copied) == []
    assert refusal(NOTHING, copied, force=True) == []


def test_one_without_a_seal_is_taken_with_a_word(copied):
    (remark,) = refusal(NOTHING, copied, seal=False)
    assert f"has no {SEAL_FILE}" in remark
    assert "cannot be verified" in remark


@each_mutation
def test_it_is_refused(mutation, copied):
    is_told(refusal(mutation, copied), mutation.sealed or mutation.said)


@each_mutation
def test_without_a_seal_names_shapes_and_settings_are_checked(mutation, copied):
    found = refusal(mutation, copied, seal=False)
    if mutation.said is None:
        assert len(found) == 1
        assert "cannot be verified" in found[0]
    else:
        is_told(found, mutation.said)
        assert SEALED not in str(found)


@each_mutation
def test_force_overrides_what_the_seal_says_and_nothing_else(mutation, copied):
    found = refusal(mutation, copied, force=True)
    if mutation.said is None:
        assert any(remark.startswith("--force: ") and mutation.sealed in remark for remark in found)
    else:
        is_told(found, mutation.said)


def test_all_that_is_wrong_is_said_at_once(copied):
    both = [
        MUTATIONS["one lora_B missing"],
        MUTATIONS["alpha is 100 times larger"],
        MUTATIONS["another base of the same shape"],
    ]
    found = refusal(Mutation(lambda adapter, base: [one.damage(adapter, base) for one in both]), copied)
    for words in (both[0].said, both[1].sealed, both[2].sealed, f"{WEIGHTS_FILE} {SEALED}"):
        assert words in str(found)


def test_a_count(tmp_path, model_folder):
    some = {name: MUTATIONS[name] for name in ("no tensors", "a bit flipped")}
    assert count_refused({**some, "nothing": NOTHING}, tmp_path, model_folder) == (2, ["nothing"])


def test_a_seal_of_another_format(whole, copied):
    seals.FORMAT, before = 2, seals.FORMAT
    try:
        assert "its format is 1, not 2" in str(refusal(NOTHING, copied))
    finally:
        seals.FORMAT = before
