"""Checkpoints: all that a resumed run needs comes back bit for bit, and a damaged one is never resumed from."""

import json
import re
import shutil
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from peftcli import files
from peftcli.checkpoint import moments, state
from peftcli.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE
from peftcli.checkpoint.seal import SEAL_FILE
from peftcli.checkpoint.state import OPTIMIZER_FILE, STATE_FILE, Progress
from peftcli.errors import ModelError, NumericalError
from peftcli.recipe import TrainingSection
from peftcli.training.optimizers import make_optimizer
from tests.methods.building import adapt, origin_of, trainable

PROGRESS = Progress(2, 1234, 0.1 + 0.2, 1, 3, {"scale": 65536.0, "growth_tracker": 7})
FILES = [CONFIG_FILE, WEIGHTS_FILE, SEAL_FILE, OPTIMIZER_FILE, STATE_FILE]


class Run:
    """A small model in training, and the folder that its checkpoints go to."""

    def __init__(self, folder, model, method="lora", optimizer=torch.optim.AdamW, **settings):
        self.folder, self.model = folder, model
        config, _ = adapt(model, method, ["q_proj", "v_proj"])
        self.origin = origin_of(method, config)
        options = {"lr": 0.01, **({"fused": True} if optimizer is torch.optim.AdamW else {}), **settings}
        self.optimizer = optimizer(trainable(model).values(), **options)

    def step(self, seed):
        ids = torch.randint(2, 128, (2, 9), generator=torch.Generator().manual_seed(seed))
        self.optimizer.zero_grad()
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self.optimizer.step()

    def save(self, step=2, progress=PROGRESS):
        progress = Progress(**{**vars(progress), "step": step})
        return state.save_checkpoint(self.folder, progress, self.model, self.optimizer, self.origin)

    def load(self, folder):
        return state.load_checkpoint(folder, self.model, self.optimizer)

    def tensors(self):
        """Returns a copy of all that a resumed run must have again."""
        own = {name: parameter.detach() for name, parameter in trainable(self.model).items()}
        both = {**own, **moments.optimizer_tensors(self.model, self.optimizer)}
        return {name: tensor.clone() for name, tensor in both.items()}


@pytest.fixture
def make_run(tmp_path, make_model):
    return lambda *args, **settings: Run(tmp_path, make_model(), *args, **settings)


@pytest.fixture
def saved(make_run):
    """A run after two steps and its one checkpoint's folder."""
    run = make_run()
    for seed in range(2):
        run.step(seed)
    return run, run.save()


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in expected.items())


# ---- there and back ----


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(torch.optim.AdamW, {}), (torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9})],
    ids=["adamw", "sgd", "momentum"],
)
def test_a_resumed_run_goes_on_bit_for_bit(method, optimizer, settings, make_run):
    run = make_run(method, optimizer, **settings)
    for seed in range(2):
        run.step(seed)
    folder = run.save()
    expected = run.tensors()
    run.step(2)

    again = make_run(method, optimizer, **settings)
    assert not same({key: again.tensors().get(key, torch.zeros(0)) for key in expected}, expected)
    assert again.load(folder) == PROGRESS
    assert same(again.tensors(), expected)
    again.step(2)
    assert same(again.tensors(), run.tensors())
    assert not same(again.tensors(), expected)


def test_pissa_resumes_with_its_start(tmp_path, make_model):
    """The frozen start is saved too, stacked onto the factors: a resumed run subtracts the same."""
    models = make_model(), make_model()
    for model in models:
        adapt(model, "lora", ["q_proj"], init="pissa", seed=0)
    config, _ = adapt(make_model(), "lora", ["q_proj"], init="pissa")
    optimizers = [torch.optim.SGD(trainable(model).values(), lr=0.1) for model in models]
    sites = [model.model.layers[0].self_attn.q_proj.adapter for model in models]
    with torch.no_grad():
        sites[0].A.add_(1)
        sites[1].A0.zero_()
    folder = state.save_checkpoint(tmp_path, Progress(1), models[0], optimizers[0], origin_of("lora", config))
    state.load_checkpoint(folder, models[1], optimizers[1])
    for name in ("A", "B", "A0", "B0"):
        assert torch.equal(getattr(sites[0], name), getattr(sites[1], name))


def test_a_checkpoint_holds_nothing_of_the_base(saved):
    _, folder = saved
    assert {file.name for file in folder.iterdir()} == set(FILES)
    keys = [*load_file(folder / WEIGHTS_FILE), *load_file(folder / OPTIMIZER_FILE)]
    assert len(keys) == 8 + 3 * 8  # A and B at four places; their two moments and step counters
    assert all("lora_" in key or ".adapter." in key for key in keys)


def test_a_moment_that_is_not_finite_is_not_saved(make_run):
    run = make_run()
    run.step(0)
    next(iter(run.optimizer.state.values()))["exp_avg"][0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"the optimizer's state cannot be saved: .*\|exp_avg holds values that"):
        run.save()
    assert not list(run.folder.iterdir())


def test_an_optimizer_of_another_model_is_refused(make_run):
    other = make_run()
    tensors = {f"model.norm.weight|{key}": torch.zeros(1) for key in ("exp_avg", "step")}
    with pytest.raises(ModelError, match=r"model\.norm\.weight is not a parameter that trains"):
        moments.load_optimizer_tensors(other.model, other.optimizer, tensors, "here")


@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq", "step", None])
def test_a_parameter_whose_state_is_missing_is_not_started_anew(entry, saved, make_run):
    _, folder = saved
    stored = load_file(folder / OPTIMIZER_FILE)
    name = next(iter(stored)).partition("|")[0]
    kept = {key: tensor for key, tensor in stored.items() if key.partition("|")[0] != name}
    if entry is not None:
        kept = {key: tensor for key, tensor in stored.items() if key != f"{name}|{entry}"}
    assert len(stored) - len(kept) == (3 if entry is None else 1)
    again = make_run()
    with pytest.raises(ModelError, match=rf"^here: {re.escape(name)}: the optimizer's {entry or ''}\w* is missing"):
        moments.load_optimizer_tensors(again.model, again.optimizer, kept, "here")


BNB_32, BNB_8 = {"step", "state1", "state2"}, {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}
ENTRIES = {
    "adamw": {"exp_avg", "exp_avg_sq", "step"},
    "adamw_8bit": BNB_32 | BNB_8,
    "paged_adamw_32bit": BNB_32,
    "paged_adamw_8bit": BNB_32 | BNB_8,
    "lion_8bit": {"step", "state1", "qmap1", "absmax1"},
    "adafactor": {"step", "row_var", "col_var", "variance"},
    "sgd": set(),
}


@pytest.mark.parametrize("optim", ENTRIES)
def test_all_that_an_optimizer_keeps_comes_back_and_none_may_be_missing(optim, make_model, tmp_path):
    """Matrices of more than 4,096 numbers, fewer, and vectors: what is kept of each is not the same."""

    def fresh():
        model = make_model(hidden_size=96)
        adapt(model, "dora", ["q_proj", "k_proj"], r=48)
        return model, make_optimizer(model, TrainingSection(optim=optim), 0.01, 0.01)

    model, optimizer = fresh()
    assert {parameter.numel() >= 4096 for parameter in trainable(model).values()} == {True, False}
    for _ in range(2):
        for parameter in trainable(model).values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    kept = moments.optimizer_tensors(model, optimizer)
    files.write_safetensors(tmp_path / "file", kept)
    stored = load_file(tmp_path / "file")
    assert {key.partition("|")[2] for key in stored} == ENTRIES[optim]

    other, again = fresh()
    moments.load_optimizer_tensors(other, again, stored, "here")
    assert same(moments.optimizer_tensors(other, again), kept)
    ours, theirs = (list(one.state.values()) for one in (again, optimizer))
    assert [{key: type(value) for key, value in one.items()} for one in ours] == [
        {key: type(value) for key, value in one.items()} for one in theirs
    ]
    for entry in ENTRIES[optim]:
        key = next(key for key in stored if key.endswith(f"|{entry}"))
        left = {name: tensor for name, tensor in stored.items() if name != key}
        with pytest.raises(ModelError, match=re.escape(key.replace("|", ": the optimizer's ")) + " is missing"):
            moments.load_optimizer_tensors(*fresh(), left, "here")


CHANGES = {
    "another entry": (
        lambda tensors, key: tensors | {f"{key}_2": torch.zeros(1)},
        "exp_avg_2 is not what this optimizer keeps",
    ),
    "another shape": (lambda tensors, key: tensors | {key: tensors[key].flatten()}, r"exp_avg is torch.float32 \["),
    "another dtype": (lambda tensors, key: tensors | {key: tensors[key].to(torch.uint8)}, r"exp_avg is torch.uint8 \["),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_state_of_another_kind_is_refused(change, message, saved, make_run):
    _, folder = saved
    stored = load_file(folder / OPTIMIZER_FILE)
    key = next(key for key in stored if key.endswith("|exp_avg"))
    again = make_run()
    with pytest.raises(ModelError, match=message):
        moments.load_optimizer_tensors(again.model, again.optimizer, change(stored, key), "here")


def test_what_a_method_keeps_may_not_be_missing(tmp_path, make_model):
    model = make_model()
    adapt(model, "adalora", ["q_proj"])
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    stored = moments.optimizer_tensors(model, optimizer)
    name = next(key for key in stored if key.endswith("|state"))
    moments.load_optimizer_tensors(model, optimizer, stored, "here")
    with pytest.raises(ModelError, match=rf"^here: {re.escape(name.removesuffix('|state'))} is missing"):
        moments.load_optimizer_tensors(
            model, optimizer, {key: tensor for key, tensor in stored.items() if key != name}, "here"
        )


def test_an_optimizer_that_did_no_step_yet(make_run):
    """A loss scale that starts too high skips the first steps, and a checkpoint may come before one that counts."""
    run = make_run()
    folder = run.save()
    assert PROGRESS.loss_scale
    again = make_run()
    assert again.load(folder) == PROGRESS
    assert not again.optimizer.state
    with pytest.raises(ModelError, match="the optimizer's exp_avg is missing"):
        make_run().load(run.save(3, Progress(3)))


# ---- damage ----


def newest_is(run, expected):
    path, remarks = state.newest_checkpoint(run.folder)
    assert path == expected
    return remarks


def flipped(content, position, bit):
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_noticed(name, saved):
    """In `state.json` every byte is tried, since nothing else vouches for it; elsewhere the digest does."""
    run, folder = saved
    content = (folder / name).read_bytes()
    places = range(len(content)) if name == STATE_FILE else (0, 7, 8, len(content) // 2, len(content) - 1)
    for position in places:
        (folder / name).write_bytes(flipped(content, position, position % 8))
        (remark,) = newest_is(run, None)
        damaged = folder.with_name("checkpoint-2.damaged")
        assert remark.startswith("checkpoint-2 is damaged (")
        assert remark.endswith(") and was set aside as checkpoint-2.damaged")
        damaged.rename(folder)
        (folder / name).write_bytes(content)
    assert newest_is(run, folder) == []


def rewrite(**changes):
    def damage(folder):
        fields = json.loads((folder / STATE_FILE).read_text())
        (folder / STATE_FILE).write_text(json.dumps({**fields, **changes}))

    return damage


DAMAGES = {
    **{f"{name} is missing": (lambda folder, name=name: (folder / name).unlink(), name) for name in FILES},
    **{f"{name} is empty": (lambda folder, name=name: (folder / name).write_bytes(b""), name) for name in FILES},
    "a truncated optimizer": (
        lambda folder: (folder / OPTIMIZER_FILE).write_bytes((folder / OPTIMIZER_FILE).read_bytes()[:-1]),
        f"{OPTIMIZER_FILE} has changed since it was written",
    ),
    "an empty folder": (lambda folder: [file.unlink() for file in folder.iterdir()], STATE_FILE),
    "the next format": (rewrite(format=2), "its format is 2, this version reads 1"),
    "a step of another run": (rewrite(progress={"step": 2}), STATE_FILE),
    "an unknown field": (rewrite(progress={"steps": 2}), STATE_FILE),
    "progress as a list": (rewrite(progress=[2]), STATE_FILE),
    "digests as a list": (rewrite(sha256=[]), STATE_FILE),
    "digests of nothing": (rewrite(sha256={}), STATE_FILE),
    "no object": (lambda folder: (folder / STATE_FILE).write_text("[]"), STATE_FILE),
    "no text": (lambda folder: (folder / STATE_FILE).write_bytes(b"\xff\x00"), STATE_FILE),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(damage, expected, saved):
    run, older = saved
    newer = run.save(5)
    assert newest_is(run, newer) == []
    damage(newer)
    (remark,) = newest_is(run, older)
    assert expected in remark
    assert not newer.exists()
    assert newer.with_name("checkpoint-5.damaged").is_dir()
    assert newest_is(run, older) == [], "a damaged checkpoint was looked at twice"


@dataclass
class ProgressOfTomorrow(Progress):
    new_field: int = 0


def test_a_checkpoint_of_a_version_with_other_fields_is_set_aside(saved):
    run, older = saved
    progress = ProgressOfTomorrow(step=5)
    state.save_checkpoint(run.folder, progress, run.model, run.optimizer, run.origin)
    assert f"{STATE_FILE} cannot be read" in newest_is(run, older)[0]


def test_when_all_are_damaged_all_are_told(saved):
    run, first = saved
    for folder in (first, run.save(5), run.save(10)):
        (folder / WEIGHTS_FILE).unlink()
    remarks = newest_is(run, None)
    assert [remark.partition(" ")[0] for remark in remarks] == ["checkpoint-10", "checkpoint-5", "checkpoint-2"]


def test_what_is_damaged_is_never_removed(saved):
    run, folder = saved
    names = ["checkpoint-2.damaged", "checkpoint-2.damaged-2", "checkpoint-2.damaged-3"]
    for name in names:
        (folder / WEIGHTS_FILE).write_text(name)
        (remark,) = newest_is(run, None)
        assert remark.endswith(f"set aside as {name}")
        run.save()
    state.rotate(run.folder, 1, set())
    assert [(run.folder / name / WEIGHTS_FILE).read_text() for name in names] == names


def test_a_checkpoint_under_another_ones_name_is_not_that_step(saved):
    """All its files are whole: only the step that it is of tells it apart."""
    run, folder = saved
    folder.rename(run.folder / "checkpoint-5")
    (remark,) = newest_is(run, None)
    assert "checkpoint-5 is damaged (it is that of step 2)" in remark


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_not_loaded_whoever_asks(name, saved, make_run):
    """The best one is loaded at a run's end without being the newest."""
    _, folder = saved
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(flipped(content, len(content) // 2, 0))
    with pytest.raises(ModelError, match=r"checkpoint-2 is damaged \("):
        make_run().load(folder)
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match=r"state\.json is missing"):
        make_run().load(folder)


# ---- which there are, and which are kept ----


def test_checkpoints_are_ordered_by_number_and_others_ignored(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-5.damaged", "checkpoint-7.tmp", "checkpoint-", "merged"):
        (tmp_path / name).mkdir()
    assert list(state.checkpoints(tmp_path).items()) == [
        (9, tmp_path / "checkpoint-9"),
        (10, tmp_path / "checkpoint-10"),
    ]
    assert state.checkpoints(tmp_path / "nowhere") == {}
    assert state.newest_checkpoint(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, set(), [2, 4, 6, 8, 10]),
        (1, set(), [10]),
        (2, set(), [8, 10]),
        (2, {4}, [4, 8, 10]),
        (1, {10}, [8, 10]),
        (3, {2, 10}, [2, 4, 6, 8, 10]),
        (9, set(), [2, 4, 6, 8, 10]),
    ],
    ids=str,
)
def test_rotation_keeps_the_newest_and_the_best(limit, keep, left, tmp_path):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "file").touch()
    state.rotate(tmp_path, limit, keep)
    assert list(state.checkpoints(tmp_path)) == left


# ---- whole or not at all ----


@pytest.mark.parametrize("failing", ["write_safetensors", "write_json", "sha256", "_replace_folder"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_a_checkpoint_is_there_whole_or_not_at_all(failing, error, saved, monkeypatch):
    run, folder = saved
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    run.step(7)

    def fail(*_args):
        raise error

    monkeypatch.setattr(files, failing, fail)
    for step in (2, 5):
        with pytest.raises((files.HostError, OSError, KeyboardInterrupt)):
            run.save(step)
        assert [path.name for path in run.folder.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert newest_is(run, folder) == []


def test_what_a_crash_left_behind_is_no_checkpoint_and_in_no_ones_way(saved):
    run, folder = saved
    shutil.copytree(folder, run.folder / "checkpoint-9.tmp")
    assert newest_is(run, folder) == []
    newer = run.save(9)
    assert newest_is(run, newer) == []
    assert not (run.folder / "checkpoint-9.tmp").exists()
