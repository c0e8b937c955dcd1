"""Links that lead out of a run's folder: nothing behind one is changed, whoever put it there."""

from pathlib import Path

import pytest

from peftcli import files, locks, manifest
from peftcli.checkpoint import seal as seals
from peftcli.checkpoint import state
from peftcli.errors import HostError, ModelError

SECRET = "keep me\n"


@pytest.fixture
def outside(tmp_path):
    """A folder that is somebody's, with a file in it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text(SECRET)
    yield folder
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == SECRET


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def write(run, how):
    """Does one of the things that write into a run's folder."""
    match how:
        case "text":
            files.write_text(run / "recipe.yaml", "new")
        case "metrics":
            files.append_text(run / "metrics.jsonl", "new")
        case "lock":
            with locks.locked(run):
                pass
        case "probe":
            files.check_writable(run)
        case "checkpoint":
            with files.new_folder(run / "checkpoint-1") as new:
                (new / "file").write_text("new")
        case "staged":
            with files.staged(run) as new:
                (new / "tokenizer.json").write_text("new")
        case "staged deep":
            with files.staged(run) as new:
                (new / "tensorboard").mkdir()
                (new / "tensorboard" / "file").write_text("new")
        case "rotation":
            files.remove_folder(run / "checkpoint-1")
        case "replacing":
            files.clear_run(run, manifest.RUN_FILES)
        case "sweeping":
            files.clear_temporary(run, manifest.RUN_FILES)


# what is a link, to a file or to the folder, and what then writes: and whether it is refused, or does without the link
LINKS = {
    "a file's temporary": ("recipe.yaml.tmp", "file", "text", False),
    "a file": ("recipe.yaml", "file", "text", False),
    "the metrics": ("metrics.jsonl", "file", "metrics", True),
    "the lock": (".lock", "file", "lock", True),
    "the probe": (".write-test.tmp", "file", "probe", False),
    "a checkpoint": ("checkpoint-1", "", "checkpoint", False),
    "a checkpoint's temporary": ("checkpoint-1.tmp", "", "checkpoint", False),
    "an old checkpoint": ("checkpoint-1.old.tmp", "", "checkpoint", False),
    "a checkpoint to remove": ("checkpoint-1", "", "rotation", False),
    "what is removed": ("checkpoint-1.tmp", "", "rotation", False),
    "staged files": (".staged.tmp", "", "staged", False),
    "a staged file": ("tokenizer.json", "file", "staged", False),
    "a staged folder": ("tensorboard", "", "staged deep", True),
    "a checkpoint to replace": ("checkpoint-1", "", "replacing", False),
    "a merged model to replace": ("merged", "", "replacing", False),
    "what a crash left": ("checkpoint-1.tmp", "", "sweeping", False),
    "what a crash left aside": ("checkpoint-1.old.tmp", "", "sweeping", False),
    "a file that a crash left": ("recipe.yaml.tmp", "file", "sweeping", False),
}


@pytest.mark.parametrize("case", LINKS)
def test_nothing_is_written_or_removed_through_a_link(case, outside, run):
    name, to, how, is_refused = LINKS[case]
    if how == "rotation" and name != "checkpoint-1":
        (run / "checkpoint-1").mkdir()
    (run / name).symlink_to(outside / to if to else outside, target_is_directory=not to)
    if is_refused:
        with pytest.raises(HostError, match="link"):
            write(run, how)
    else:
        write(run, how)
        assert not any(path.is_symlink() for path in run.rglob("*"))


def test_rotation_removes_the_link_alone(outside, run):
    for step in (1, 2, 3):
        (run / f"checkpoint-{step}").mkdir()
    (run / "checkpoint-0").symlink_to(outside, target_is_directory=True)
    state.rotate(run, 1, set())
    assert [path.name for path in run.iterdir()] == ["checkpoint-3"]


def test_training_over_links(train, recipe_file, outside, tmp_path):
    """The metrics and the checkpoint of a run that somebody has prepared lead elsewhere."""
    Path(tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(outside / "file")
    (tmp_path / "run" / "checkpoint-1").symlink_to(outside, target_is_directory=True)
    train(recipe_file(training={"max_steps": 1, "save_steps": 1}, data={"eval": None}), overwrite=True)
    assert not any(path.is_symlink() for path in (tmp_path / "run").rglob("*"))
    assert (tmp_path / "run" / "checkpoint-1" / "state.json").is_file()


@pytest.mark.parametrize("name", ["../outside/file", "/dev/zero", "a/../../outside/file", "", ".", "other.bin"])
def test_a_checkpoint_cannot_vouch_for_other_files(name, outside, run):
    """`/dev/zero` would be read without end."""
    folder = run / "checkpoint-1"
    folder.mkdir()
    facts = {"format": state.FORMAT, "progress": {"step": 1}, "sha256": {name: "0" * 64}}
    files.write_json(folder / state.STATE_FILE, {**facts, state.OWN_DIGEST: files.json_sha256(facts)})
    assert "names other files" in state._damage(folder)


@pytest.mark.parametrize("name", ["../outside/file", "/dev/zero", "", "other.bin"])
def test_a_seal_cannot_name_other_files(name, tmp_path):
    facts = {"format": seals.FORMAT, "config": {}, "sha256": {seals.WEIGHTS_FILE: "0", name: "0"}, "base": None}
    files.write_json(tmp_path / seals.SEAL_FILE, {**facts, seals.OWN_DIGEST: files.json_sha256(facts)})
    with pytest.raises(ModelError, match="names other files than an adapter has"):
        seals.read(tmp_path)


@pytest.mark.parametrize("lie", [{"config": []}, {"config": None}, {"base": 3}, {"base": {}}], ids=str)
def test_a_seal_that_says_what_none_does(lie, tmp_path):
    facts = {"format": seals.FORMAT, "config": {}, "sha256": {seals.WEIGHTS_FILE: "0"}, "base": None, **lie}
    files.write_json(tmp_path / seals.SEAL_FILE, {**facts, seals.OWN_DIGEST: files.json_sha256(facts)})
    with pytest.raises(ModelError, match="does not say what a seal says"):
        seals.read(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "x.bin", "..", "x\x00.safetensors", 3]
)
def test_an_index_names_files_of_its_folder(name, tmp_path):
    from peftcli import headers
    from peftcli.models.source import ModelSource, check_weights

    files.write_json(tmp_path / headers.INDEX_FILE, {"weight_map": {"a.weight": name}})
    with pytest.raises(headers.HeaderError, match="not a safetensors file in its folder"):
        check_weights(ModelSource(str(tmp_path), True, {}))
    from peftcli.merge.stored import base_entries

    with pytest.raises(ModelError, match="not a safetensors file in its folder"):
        base_entries(tmp_path)
