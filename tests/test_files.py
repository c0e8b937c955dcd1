import errno
import json
import os
import stat

import pytest
import torch

from peftcli import files
from peftcli.errors import HostError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    """Sets the process's umask for the length of a test."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


# ---- files ----


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first", "zweite – 二", ""):
        files.write_text(path, text)
        assert path.read_bytes().decode() == text
    assert names(tmp_path) == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HostError, match=r"cannot write .*a\.txt: No space left") as raised:
        files.write_text(path, "new")
    assert "free some space" in raised.value.problems[0].hint
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]  # and what was written of the new one takes no space


def test_text_is_appended_in_whatever_parts_the_system_takes_it(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:2]))
    for line in ("first\n", "zweite – 二\n", ""):
        files.append_text(tmp_path / "log", line)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "first\nzweite – 二\n"
    monkeypatch.setattr(os, "write", fails_with(errno.ENOSPC))
    with pytest.raises(HostError, match=r"cannot write .*log: No space left"):
        files.append_text(tmp_path / "log", "third")


def fails_with(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("message", "hint"),
    [("No space left on device (os error 28)", "free some space"), ("broken (os error 5)", "check the disk")],
)
def test_what_a_library_in_rust_says_of_the_disk_is_explained(message, hint, tmp_path):
    with pytest.raises(HostError, match=r"cannot write .*: ") as raised, files.explained(tmp_path):
        raise Exception(message)  # noqa: TRY002 - as tokenizers does
    assert hint in raised.value.problems[0].hint
    with pytest.raises(ZeroDivisionError), files.explained(tmp_path):
        raise ZeroDivisionError("os error 28")


def test_a_folder_that_cannot_be_flushed_is_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fails_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        files.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", fails_with(errno.EINVAL))  # some file systems cannot
    files.sync_folder(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}], ids=str)
def test_json_that_is_none_is_not_written(value, tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", value)
    assert names(tmp_path) == []


def test_json_comes_back(tmp_path):
    value = {"é": [1, 0.1 + 0.2, None, True], "b": {"c": "\n"}}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "é" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)], ids=oct)
def test_every_file_follows_the_umask(mask, mode, tmp_path, umask):
    umask(mask)
    files.write_text(tmp_path / "text", "")
    files.write_safetensors(tmp_path / "tensors", {"a": torch.zeros(1)})
    for name in ("text", "tensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode
    assert umask(mask) == mask, "the process's own umask was changed"


def test_tensors_of_any_layout_and_owner_come_back(tmp_path):
    from safetensors.torch import load_file

    whole = torch.randn(4, 6)
    tensors = {
        "transposed": whole.t(),
        "a slice": whole[:, 1:3],
        "trained": torch.nn.Parameter(whole),
        "one value": torch.tensor(3),
        "none": torch.zeros(0, 4),
        "half": whole.bfloat16(),
    }
    files.write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    files.write_safetensors(tmp_path / "empty.safetensors", {})
    assert load_file(tmp_path / "empty.safetensors") == {}


def test_a_file_that_cannot_be_written_is_explained(tmp_path):
    for write in (
        lambda path: files.write_text(path, ""),
        lambda path: files.write_safetensors(path, {"a": torch.zeros(1)}),
    ):
        with pytest.raises(HostError, match=r"cannot write .*nowhere/a"):
            write(tmp_path / "nowhere" / "a")


def test_sha256_is_the_files(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(tmp_path / "a") == expected


# ---- folders ----


def test_a_folder_appears_when_its_block_ends(tmp_path):
    target = tmp_path / "new" / "folder"
    with files.new_folder(target) as folder:
        assert folder.parent == target.parent
        assert list(folder.iterdir()) == []
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "a"
    assert names(tmp_path / "new") == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_raises_changes_nothing(error, tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()

    def write():
        with files.new_folder(target) as folder:
            (folder / "new").touch()
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == ["folder"]
    assert names(target) == ["old"]


def test_a_folder_that_is_there_is_replaced_whole(tmp_path):
    target = tmp_path / "folder"
    for name in ("first", "second"):
        with files.new_folder(target) as folder:
            (folder / name).touch()
    assert names(target) == ["second"]
    assert names(tmp_path) == ["folder"]


def test_what_a_crash_left_is_cleared_away(tmp_path):
    for left in ("folder.tmp", "folder.old.tmp"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "rubbish").touch()
    with files.new_folder(tmp_path / "folder") as folder:
        assert list(folder.iterdir()) == []
    assert names(tmp_path) == ["folder"]


def test_when_the_new_folder_cannot_take_its_place_the_old_one_does(tmp_path, monkeypatch):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    rename = type(target).rename

    def fails_at_the_last_step(self, to):
        if to == target and self.name == "folder.tmp":
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", fails_at_the_last_step)
    with pytest.raises(HostError, match="Input/output error"), files.new_folder(target) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["folder"]
    assert names(target) == ["old"]


def test_what_a_crash_left_between_two_renames_is_put_back(tmp_path):
    """Then the old folder is nowhere but under its temporary name, and the next writer may fail, too."""
    (tmp_path / "folder.old.tmp").mkdir()
    (tmp_path / "folder.old.tmp" / "old").touch()
    (tmp_path / "folder.tmp").mkdir()
    with pytest.raises(ValueError, match="no"), files.new_folder(tmp_path / "folder"):
        raise ValueError("no")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["old"]


def test_staged_files_take_their_places_at_the_end(tmp_path):
    (tmp_path / "b").write_text("old")
    (tmp_path / "c").write_text("kept")
    with files.staged(tmp_path) as new:
        (new / "deep").mkdir()
        for name in ("a", "b", "deep/d"):
            (new / name).write_text("new")
        assert (tmp_path / "b").read_text() == "old"
    assert {name: (tmp_path / name).read_text() for name in ("a", "b", "c", "deep/d")} == {
        "a": "new",
        "b": "new",
        "c": "kept",
        "deep/d": "new",
    }
    assert names(tmp_path) == ["a", "b", "c", "deep"]


def test_staged_files_of_a_block_that_raises_are_gone(tmp_path):
    def stop():
        with files.staged(tmp_path) as new:
            (new / "b").write_text("newer")
            raise KeyboardInterrupt

    (tmp_path / "b").write_text("new")
    with pytest.raises(KeyboardInterrupt):
        stop()
    assert (tmp_path / "b").read_text() == "new"
    assert names(tmp_path) == ["b"]


def test_a_scratch_folder_is_gone_afterwards(tmp_path):
    (tmp_path / "a.tmp").mkdir()
    (tmp_path / "a.tmp" / "of a crash").touch()
    with files.scratch_folder(tmp_path / "a") as folder:
        assert list(folder.iterdir()) == []
        (folder / "file").touch()
    assert names(tmp_path) == []


def test_a_folder_is_out_of_sight_before_it_is_taken_apart(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    (tmp_path / "a.tmp").mkdir()  # of a crash while another was removed
    monkeypatch.setattr(os, "unlink", fails_with(errno.EIO))
    with pytest.raises(HostError, match="Input/output error"):
        files.remove_folder(tmp_path / "a")
    monkeypatch.undo()
    assert names(tmp_path) == ["a.tmp"]
    (tmp_path / "a").mkdir()
    files.remove_folder(tmp_path / "a")
    assert names(tmp_path) == []


def test_what_is_set_aside_takes_no_ones_place(tmp_path):
    for number in range(3):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / str(number)).touch()
        aside = files.set_aside(tmp_path / "a", ".damaged")
        assert names(aside) == [str(number)]
    assert names(tmp_path) == ["a.damaged", "a.damaged-2", "a.damaged-3"]


def test_a_folder_in_a_files_place_is_explained(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(HostError, match="cannot write") as raised,
        files.new_folder(tmp_path / "file" / "folder"),
    ):
        pass
    assert "output_dir=DIR" in raised.value.problems[0].hint


def test_check_writable(tmp_path):
    files.check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="cannot write"):
        files.check_writable(tmp_path / "file")


def test_clear_run_removes_what_a_run_owns_alone(tmp_path):
    for name in ("metrics.jsonl", "notes.txt", "checkpoint-1.txt"):
        (tmp_path / name).touch()
    for name in ("checkpoint-1", "checkpoint-20", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    files.clear_run(tmp_path, ["metrics.jsonl", "checkpoint-*[0-9]", "never-there"])
    assert names(tmp_path) == ["checkpoint-1.txt", "mine", "notes.txt"]


def test_clear_temporary_removes_what_a_crash_left_and_nothing_else(tmp_path):
    kept = ["checkpoint-1", "mine.tmp", "recipe.yaml"]
    for name in (*kept, "recipe.yaml.tmp", "manifest.json.tmp"):
        (tmp_path / name).touch()
    for name in (".staged.tmp", "checkpoint-2.tmp", "merged.tmp", "merged.old.tmp", "checkpoint-1.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    files.clear_temporary(tmp_path, ["recipe.yaml", "manifest.json", "checkpoint-*", "merged"])
    assert names(tmp_path) == sorted([*kept, "merged"])  # which was nowhere else
