"""`peftcli export`: an adapter as a LoRA, exactly where it is one, and nearly, with the error measured, on request."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from peftcli import inject, methods
from peftcli.checkpoint.adapter import attach, read_adapter, save_adapter
from peftcli.reporting import Silent
from peftcli.run.exporting import export_as_lora
from peftcli.run.subject import open_subject, proof_inputs
from peftcli.sites import dense_weight
from tests.conftest import unseal
from tests.families import save_family
from tests.methods.building import adapt, assert_close, logits, origin_of, randomise, token_ids
from tests.run.tasks import fields_on_file, recipe_of, save_families, tensors_on_file
from tests.tolerances import EXACT, LEFT_OVER

TOLERANCE = EXACT[torch.float32]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::FutureWarning:transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models by family: Llamas with and without biases, and one for each task."""
    folder = tmp_path_factory.mktemp("families")
    found = {**save_families(folder), "biased": folder / "biased"}
    found["plain"] = save_family("llama", folder / "plain", attention_bias=False, mlp_bias=False)
    shutil.copytree(found["llama"], found["biased"])
    model = open_model(found["llama"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at 0
                parameter.normal_(std=0.1)
    model.save_pretrained(found["biased"])
    return found


def open_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def adapter(tmp_path, folders):
    """Writes an adapter that has learned something; returns its folder and the adapted model."""

    def write(name, family="plain", scale=0.1, **fields):
        model = open_model(folders[family])
        config, _ = adapt(model, name, **{"target_modules": "all-linear", **fields})
        torch.manual_seed(1)
        randomise(model, scale)
        for one in inject.adapters(model).values() if name == "adalora" else ():
            with torch.no_grad():
                one.keep(torch.tensor([True, False, True, True]))
        folder = tmp_path / "adapter"
        folder.mkdir()
        save_adapter(folder, model, origin_of(name, config, base_model=str(folders[family]), revision=None))
        return folder, model.eval()

    return write


def exported(folder, target="lora", rank=None, *, lossy=False, overwrite=False):
    subject = open_subject(None, folder, None)
    target = folder.parent / target
    return target, export_as_lora(subject, target, rank, Silent(), lossy=lossy, overwrite=overwrite)


def with_lora(folder, base):
    """Returns the base with the LoRA in `folder`."""
    model = open_model(base)
    attach(model, read_adapter(folder))
    return model


# ---- what is exactly a LoRA ----

EXACT_ONES = {
    "lora": ("lora", {}, 4),
    "rslora of several ranks": ("lora", {"rslora": True, "rank_pattern": {"q_proj": 2}, "alpha": 6.0}, 4),
    "lora from pissa": ("lora", {"init": "pissa"}, 8),
    "lora from pissa, beyond half of a side": ("lora", {"init": "pissa", "r": 20}, 40),
    "lora on an embedding": ("lora", {"target_modules": ["embed_tokens", "q_proj"]}, 4),
    "vera": ("vera", {}, 4),
    "vera, wider than the layers": ("vera", {"r": 100}, 48),
    "vblora": ("vblora", {}, 4),
    "adalora": ("adalora", {"alpha": 6.0}, 4),
    "heads, summed": ("split_lora", {"combine": "sum", "num_heads": 3}, 12),
    "heads, averaged": ("split_lora", {"combine": "mean", "num_heads": 3, "alpha": 6.0}, 12),
    "one task's head": ("split_lora", {"combine": "task", "num_heads": 3, "task_head": 1}, 4),
    "one head behind a router": ("hydralora", {"num_heads": 1}, 4),
}


@pytest.mark.parametrize("case", EXACT_ONES)
def test_exact(case, adapter, folders):
    """The LoRA is the same function, here and in PEFT."""
    from peft import PeftModel

    name, fields, rank = EXACT_ONES[case]
    if name == "lora" and fields.get("r", 4) > 12:
        fields = {**fields, "target_modules": ATTENTION}
    folder, model = adapter(name, **fields)
    target, done = exported(folder)
    ids = token_ids() % 40
    expected = logits(model, ids)
    assert not torch.allclose(logits(open_model(folders["plain"]), ids), expected)
    assert (done.exact, done.update_error, done.largest_rank) == (True, 0.0, rank)
    assert done.modules == len(inject.adapters(model))
    assert done.agreement.max_difference < TOLERANCE
    assert fields_on_file(target)["peft_type"] == "LORA"
    assert_close(logits(with_lora(target, folders["plain"]), ids), expected, TOLERANCE)
    theirs = PeftModel.from_pretrained(open_model(folders["plain"]), target).eval()
    assert_close(logits(theirs, ids), expected, TOLERANCE)


def test_the_folder_is_whole(adapter, cli):
    """It serves without the run: its tokenizer is there, and its base is named."""
    folder, _ = adapter("vera")
    code, stdout, _ = cli("export", "--adapter", folder, "-o", folder.parent / "lora", "--json")
    assert code == 0
    assert json.loads(stdout)["exact"] is True
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        path.name for path in (folder.parent / "lora").iterdir()
    }
    code, stdout, _ = cli("generate", "--adapter", folder.parent / "lora", "the cat", "--max-new-tokens", "2", "--json")
    assert code == 0
    assert json.loads(stdout)[0]["prompt"] == "the cat"


# ---- what is nearly one ----


@torch.no_grad()
def true_errors(model, base, lora):
    """Returns the Frobenius distance of each of two models' updates of `base`, relative to the first's size."""
    found = {}
    for path, one in inject.adapters(model).items():
        weight = dense_weight(base.get_submodule(path), "linear")
        update = one.merged(weight).double() - weight
        near = inject.adapters(lora)[path]
        found[path] = float((update - near.scale * near.B.double() @ near.A.double()).norm() / update.norm())
    return found


NEARLY = {
    "dora": {"r": 4},
    "dvora": {"r": 8},
    "waveft": {"n_frequency": 60},
    "ia3": {"target_modules": ["k_proj", "v_proj", "down_proj"]},
}
FULL_RANK = 48


@pytest.mark.parametrize("name", NEARLY)
@torch.no_grad()
def test_the_nearest_of_a_rank(name, adapter, folders):
    """Its error is what is said, is the least there is at that rank, falls with the rank and is none at full rank."""
    folder, model = adapter(name, **NEARLY[name])
    base, ids, errors, differences = open_model(folders["plain"]), token_ids() % 40, [], []
    expected = logits(model, ids)
    for rank in (1, 4, 16, FULL_RANK):
        target, done = exported(folder, f"lora-{rank}", rank)
        lora = with_lora(target, folders["plain"])
        differences.append(float((logits(lora, ids) - expected).abs().max() / expected.abs().max()))
        true = true_errors(model, base, lora)
        assert done.update_error == pytest.approx(max(true.values()), rel=LEFT_OVER, abs=TOLERANCE)
        assert done.largest_rank == rank
        assert not done.exact
        errors.append(done.update_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < TOLERANCE
    assert differences[-1] < TOLERANCE < differences[0]


def test_no_other_lora_of_the_rank_is_nearer(adapter, folders):
    """Eckart and Young: what is left over are the singular values that were cut off."""
    folder, model = adapter("dora", target_modules=["q_proj"])
    target, done = exported(folder, rank=3)
    base = open_model(folders["plain"])
    for path, error in true_errors(model, base, with_lora(target, folders["plain"])).items():
        weight = dense_weight(base.get_submodule(path), "linear")
        S = torch.linalg.svdvals(inject.adapters(model)[path].merged(weight).detach().double() - weight)
        assert error == pytest.approx(float(S[3:].norm() / S.norm()), rel=LEFT_OVER)
        assert error <= done.update_error * (1 + LEFT_OVER)


def test_a_rank_beyond_the_smallest_side_is_cut_to_it(adapter):
    folder, _ = adapter("dora", target_modules=["q_proj", "k_proj"])
    target, done = exported(folder, rank=500)
    assert done.largest_rank == 48
    tensors = tensors_on_file(target)
    ranks = {key.split(".")[-3]: len(tensor) for key, tensor in tensors.items() if key.endswith("lora_A.weight")}
    assert ranks == {"q_proj": 48, "k_proj": 24}


def test_an_update_of_nothing(adapter):
    """IA³ that has learned nothing: every factor is 0, and there is no error of which to take a share."""
    folder, _ = adapter("ia3", scale=0.0, target_modules=["k_proj"])
    target, done = exported(folder, rank=2)
    assert (done.update_error, done.agreement.max_difference) == (0, 0)
    assert not any(bool(tensor.any()) for key, tensor in tensors_on_file(target).items() if "lora_B" in key)


def test_a_bias_that_changes_is_refused(adapter, cli):
    folder, _ = adapter("ia3", "biased", target_modules=["k_proj", "down_proj"])
    code, stdout, stderr = cli("export", "--adapter", folder, "--rank", "4")
    assert (code, stdout, stderr.count("error:")) == (4, "", 1)
    assert "k_proj: the adapter changes the bias, which a LoRA cannot" in stderr
    assert "merge it instead" in stderr
    assert not (folder / "lora").exists()


def test_a_bias_that_stays_is_not(adapter, folders):
    """A feed-forward's last projection has its inputs scaled, and its bias left as it is."""
    folder, model = adapter("ia3", "biased", target_modules=["down_proj"])
    target, _ = exported(folder, rank=FULL_RANK)
    ids = token_ids() % 40
    assert_close(logits(with_lora(target, folders["biased"]), ids), logits(model, ids), TOLERANCE)


# ---- what has no one update ----


@pytest.fixture
def hydra(folders, recipe_file, tmp_path, train):
    """Trains a HydraLoRA; returns its run."""
    sections = recipe_of("hydralora", "causal-lm", folders, tmp_path, target_modules=ATTENTION, num_heads=3)
    train(recipe_file(**sections, name="hydra.yaml"))
    tensors = tensors_on_file(Path("run"))
    torch.manual_seed(3)
    stirred = {key: tensor + 0.3 * torch.randn_like(tensor) for key, tensor in tensors.items()}
    from safetensors.torch import save_file

    save_file(stirred, "run/adapter_model.safetensors", {"format": "pt"})
    unseal("run")
    return Path("run")


def test_the_mean_of_what_differs(hydra, folders):
    """Equals a computation by hand: the gates' mean over the same tokens, and with it the heads' mean."""
    subject = open_subject(hydra, None, None)
    done = export_as_lora(subject, hydra / "lora", None, Silent(), lossy=True, overwrite=False)
    model = open_model(folders["llama"])
    attach(model, read_adapter(hydra))
    inputs, entered = proof_inputs(subject), {}
    for path, module in inject.grafted_modules(model):
        entered[path] = []
        module.register_forward_pre_hook(lambda _, given, seen=entered[path]: seen.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        expected = [model(**given).logits[0] for given in inputs]
    lora = with_lora(hydra / "lora", folders["llama"])
    for path, one in inject.adapters(model).items():
        omega = F.softmax(torch.cat(entered[path]).double() @ one.R.T.double(), dim=-1).mean(dim=0)
        assert len(torch.cat(entered[path])) == done.agreement.positions
        heads = one.B.double().chunk(3, dim=1)
        delta = one.scale * sum(gate * B @ one.A.double() for gate, B in zip(omega, heads, strict=True))
        near = inject.adapters(lora)[path]
        assert_close(near.scale * near.B.double() @ near.A.double(), delta, TOLERANCE)
    with torch.no_grad():
        found = [lora(**given).logits[0] for given in inputs]
    largest = max(float(one.abs().max()) for one in expected)
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) / largest
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(expected, found, strict=True)]).double().mean()
    assert done.agreement.max_difference == pytest.approx(difference, rel=LEFT_OVER)
    assert done.agreement.same_choice == pytest.approx(float(same))
    assert difference > TOLERANCE
    assert (done.exact, done.update_error, done.largest_rank) == (False, None, 4)


def test_the_mean_is_told_to_be_one(hydra, cli):
    code, stdout, _ = cli("export", hydra, "--lossy")
    assert code == 0
    assert "nearly the adapter" in stdout
    assert "Frobenius" not in stdout
    assert "compared on" in stdout
    assert "same choice at" in stdout


# ---- what is refused ----

PROMPT = "a prompt is a part of the input"
REFUSED = {
    "prompt": (("prompt", {}), [], "prompt is not exactly a LoRA", "serve it with"),
    "prompt of a rank": (("prompt", {}), ["--rank", "4"], PROMPT, "serve it with"),
    "prefix": (("prefix", {}), ["--lossy"], "prefix is not exactly a LoRA", "serve it with"),
    "adapter": (("adapter", {}), ["--rank", "4"], "adapter is not exactly a LoRA", "serve it with"),
    "bitfit": (("bitfit", {}), ["--rank", "4"], "bitfit is not exactly a LoRA", "serve it with"),
    "full": (("full", {}), ["--rank", "4"], "full is not exactly a LoRA", "serve it with"),
    "dora": (("dora", {}), [], "dora is not exactly a LoRA", "--rank N writes the nearest"),
    "dora, lossily": (("dora", {}), ["--lossy"], "dora is not exactly a LoRA", "--rank N writes the nearest"),
    "hydralora": (("hydralora", {}), [], "its gates differ from token to token", "--lossy writes the mean"),
    "hydralora of a rank": (("hydralora", {}), ["--rank", "4"], "its gates differ", "--lossy writes the mean"),
    "a mixture": (("split_lora", {"combine": "router"}), ["--rank", "4"], "its gates differ", "serve it with"),
    "tasks": (("split_lora", {"combine": "task"}), [], "choose one with method.task_head", "serve it with"),
    "lora of a rank": (("lora", {}), ["--rank", "4"], "this adapter is, exactly", None),
    "lora, lossily": (("lora", {}), ["--lossy"], "this adapter is, exactly", None),
    "both": (("dora", {}), ["--rank", "4", "--lossy"], "--rank and --lossy exclude each other", "--lossy keeps"),
    "both ways of heads": (("hydralora", {}), ["--rank", "4", "--lossy"], "exclude each other", "--lossy keeps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, adapter, cli, monkeypatch):
    """With one error, before any weight is loaded."""
    (name, fields), options, reason, hint = REFUSED[case]
    if name in ("prompt", "prefix", "bitfit", "full"):
        fields = {**fields, "target_modules": None}
    if name == "adapter":
        fields = {**fields, "target_modules": "auto"}
    folder, _ = adapter(name, "llama", **fields)

    def loaded(*arguments, **named):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("peftcli.run.exporting.load_weights", loaded)
    code, stdout, stderr = cli("export", "--adapter", folder, *options)
    assert (code, stdout, stderr.count("error:")) == (2, "", 1), stderr
    assert reason in stderr
    assert (hint or "") in stderr.partition("hint:")[2]
    assert not (folder / "lora").exists()


def test_other_formats(adapter, cli):
    folder, _ = adapter("lora")
    code, _, stderr = cli("export", "--adapter", folder, "--to", "gguf")
    assert code == 2
    assert '--to: "gguf"' in stderr


# ---- task heads ----


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "seq2seq-lm"])
def test_what_else_was_trained_comes_along(task, folders, recipe_file, tmp_path, train, cli):
    sections = recipe_of("vera", task, folders, tmp_path, training={"learning_rate": 0.05})
    found = train(recipe_file(**sections))["result"]["eval"]
    target = tmp_path / "elsewhere" / "lora"
    code, _, stderr = cli("export", "run", "-o", target)
    assert code == 0, stderr
    heads = {key for key in tensors_on_file(Path("run")) if "classifier" in key}
    assert {key for key in tensors_on_file(target) if "classifier" in key} == heads
    assert bool(heads) == (task != "seq2seq-lm")
    shutil.rmtree("run")
    code, stdout, stderr = cli("eval", "--adapter", target, "--data", "rows.jsonl", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["adapter"] == pytest.approx(found, rel=TOLERANCE)


def test_a_model_of_images(recipe_file, tmp_path, train, cli):
    """PEFT has no name for its task, so that adapter_config.json cannot tell it."""
    for label, shade in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (12, 12), (shade + number, shade, shade)).save(
                tmp_path / "images" / label / f"{number}.png"
            )
    name = str(save_family("vit", tmp_path / "vit"))
    path = recipe_file(
        model={"name": name, "task": "image-classification"},
        data={"train": "images", "eval": "images", "max_length": 1024},
        method={"type": "vera", "r": 4},
    )
    found = train(path)["result"]["eval"]
    assert cli("export", "run", "-o", "lora")[0] == 0
    for folder in ("run", "lora"):
        code, stdout, stderr = cli("eval", "--adapter", folder, "--data", "images", "--json")
        assert code == 0, stderr
        assert json.loads(stdout)["adapter"] == pytest.approx(found, rel=TOLERANCE)


def test_peft_reads_a_task_model(folders, recipe_file, tmp_path, train, cli):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    train(recipe_file(**recipe_of("vblora", "sequence-classification", folders, tmp_path)))
    assert cli("export", "run")[0] == 0
    subject = open_subject(Path("run"), None, None)
    found = []
    for folder in (Path("run"), Path("run/lora")):
        model = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=2)
        theirs = PeftModel.from_pretrained(model, folder).eval()
        with torch.no_grad():
            found.append(torch.cat([theirs(**given).logits for given in proof_inputs(subject)]))
    assert_close(found[1], found[0], TOLERANCE)


# ---- where it goes ----


def test_the_target(adapter, cli):
    folder, _ = adapter("vera")
    arguments = ("export", "--adapter", folder)
    assert cli(*arguments)[0] == 0
    assert (folder / "lora" / "adapter_config.json").is_file(), "where no other place is named"
    code, stdout, stderr = cli(*arguments)
    assert (code, stdout) == (6, "")
    assert "lora exists and is not empty" in stderr
    (folder / "lora" / "old").touch()
    assert cli(*arguments, "--overwrite")[0] == 0
    assert not (folder / "lora" / "old").exists()
    (folder.parent / "file").touch()
    assert cli(*arguments, "-o", folder.parent / "file")[0] == 6
    code, _, stderr = cli(*arguments, "-o", folder, "--overwrite")
    assert code == 6
    assert "holds a run, the adapter or the base model" in stderr
    assert read_adapter(folder).method is methods.load("vera")


def test_a_lora_that_is_not_the_adapter_is_not_written(adapter, monkeypatch):
    from peftcli.errors import ModelError

    folder, _ = adapter("vera")
    vera, original = methods.load("vera"), methods.load("vera").low_rank

    def wrong(self):
        A, B = original(self)
        return A, 1.1 * B

    monkeypatch.setattr(vera, "low_rank", wrong)
    with pytest.raises(ModelError, match="differs from base and adapter"):
        exported(folder)
    assert not (folder.parent / "lora").exists()


def test_the_subject_may_name_another_base(adapter, folders, tmp_path):
    """A moved base: the LoRA names the one it was made with."""
    folder, _ = adapter("vera")
    moved = shutil.copytree(folders["plain"], tmp_path / "moved")
    subject = open_subject(None, folder, str(moved))
    assert replace(subject).base.section.name == str(moved)
    export_as_lora(subject, tmp_path / "lora", None, Silent(), lossy=False, overwrite=False)
    assert fields_on_file(tmp_path / "lora")["base_model_name_or_path"] == str(moved)
