"""Folders made to run code: models, adapters, checkpoints and datasets with canaries in them. None ever sings."""

import ast
import json
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import peftcli
from tests.conftest import unseal, write_jsonl
from tests.fuzz.auditing import watched

SINGS = "import os, pathlib\npathlib.Path(os.environ['CANARY']).write_text('sings')\n"
CLASSES = (
    "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer\n"
)
MODEL_PICKLES = ("pytorch_model.bin", "adapter_model.bin", "model.pt", "rng_state.pth", "training_args.bin")


class Bomb:
    """Unpickled, it runs `SINGS`."""

    def __reduce__(self):
        return exec, (SINGS,)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    path = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(path))
    yield path
    assert not path.exists(), "the canary sang"


@pytest.fixture
def model(tmp_path, model_folder, canary):
    """A model's folder with pickles beside its weights and code that its configuration may name."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "evil.py").write_text(CLASSES + SINGS)
    (folder / "configuration_evil.py").write_text(CLASSES + SINGS)
    for name in MODEL_PICKLES:
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    return folder


@pytest.fixture
def safely(cli, tmp_path):
    """Runs a command that must run no code of the folder and open no pickle; returns what it says."""

    def run(*arguments, code=0):
        with watched(tmp_path) as seen:
            found, stdout, stderr = cli(*arguments)
        assert found == code, stderr
        assert seen.ran == []
        assert seen.pickles == []
        assert seen.network == []
        assert [one for one in seen.processes if "uname" not in one] == []
        assert "Traceback" not in stderr
        return stdout + stderr

    return run


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_canary_can_sing(tmp_path, monkeypatch):
    """Or the tests below could not fail."""
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    with watched(tmp_path) as seen:
        (tmp_path / "x.bin").write_bytes(pickle.dumps(Bomb()))
        pickle.loads((tmp_path / "x.bin").read_bytes())
        (tmp_path / "evil.py").write_text("x = 1\n")
        exec(compile((tmp_path / "evil.py").read_text(), str(tmp_path / "evil.py"), "exec"))
    assert (tmp_path / "canary").read_text() == "sings"
    assert len(seen.pickles) == 2
    assert seen.ran == [str(tmp_path / "evil.py")]


TOKENIZERS = ["evil.Tokenizer", None]
AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": TOKENIZERS}
# what the configuration says, and the exit code with what is said: None where it has no effect
CONFIGURATIONS = {
    "auto_map": ({"auto_map": AUTO_MAP}, None),
    "auto_map of an unknown type": ({"auto_map": AUTO_MAP, "model_type": "evil"}, "cannot load the configuration"),
    "auto_map of another repository": ({"auto_map": {"AutoConfig": "evil/repo--evil.Config"}}, None),
    "internal attention": ({"_attn_implementation_internal": "evil/kernel"}, None),
    "attention from elsewhere": ({"attn_implementation": "evil/kernel"}, "asks for code from elsewhere: attn_impl"),
    "attention of a version": ({"attn_implementation": "evil/kernel@main:fn"}, "asks for code from elsewhere"),
    "paged attention from elsewhere": ({"attn_implementation": "paged|evil/kernel"}, "asks for code from elsewhere"),
    "private attention": ({"_attn_implementation": "evil/kernel"}, "asks for code from elsewhere"),
    "experts from elsewhere": ({"experts_implementation": "evil/kernel"}, "asks for code from elsewhere: experts_impl"),
    "kernels": ({"use_kernels": True, "kernel_config": {"kernel_mapping": {"RMSNorm": "evil/kernel:Norm"}}}, None),
    "custom generation": ({"custom_generate": "evil", "trust_remote_code": True}, None),
    "weights in a pickle": ({"transformers_weights": "adapter_model.bin"}, "not a safetensors file in its folder"),
    "weights elsewhere": ({"transformers_weights": "../model.safetensors"}, "not a safetensors file in its folder"),
    "a quantiser": ({"quantization_config": {"quant_method": "evil"}}, "comes quantised by evil"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations(case, model, recipe_file, safely):
    fields, said = CONFIGURATIONS[case]
    change(model / "config.json", **fields)
    recipe_file(model={"name": "./model"}, training={"max_steps": 1})
    text = safely("train", "recipe.yaml", code=0 if said is None else 4)
    assert said is None or said in text


def test_kernels_of_inner_configurations():
    from transformers import LlavaConfig

    from peftcli import vetting
    from peftcli.errors import ModelError

    config = LlavaConfig()
    vetting.check_config(config, "m")
    config.text_config._attn_implementation_internal = "evil/kernel"
    with pytest.raises(ModelError, match="asks for code from elsewhere"):
        vetting.check_config(config, "m")


def test_kernels_of_recipes(recipe_file, safely, canary):
    recipe_file(model={"attn_implementation": "evil/kernel"})
    assert "code from a repository is never run" in safely("train", "recipe.yaml", code=2)


@pytest.mark.parametrize("value", [True, "evil"])
def test_trust_cannot_be_asked_for(value, recipe_file, safely, canary):
    recipe_file(model={"trust_remote_code": value})
    assert "peftcli runs no code from a model repository" in safely("train", "recipe.yaml", code=2)
    recipe_file()
    assert "No such option" in safely("train", "recipe.yaml", "--trust-remote-code", code=2)


def test_tokenizers(model, recipe_file, safely):
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    recipe_file(model={"name": "./model"}, training={"max_steps": 1})
    safely("train", "recipe.yaml")
    change(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    (model / "tokenizer.json").unlink()
    assert "cannot load the tokenizer" in safely("train", "recipe.yaml", "--overwrite", code=4)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10 ** 12) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ 'x' * 10 }}{% if",
    ],
)
def test_chat_templates(template, model, recipe_file, safely, tmp_path):
    (model / "chat_template.jinja").write_text(template)
    recipe_file(model={"name": "./model"}, data={"train": "chats.jsonl", "eval": None})
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sleeps"}]
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns}] * 4)
    assert "chat template" in safely("train", "recipe.yaml", code=3)


@pytest.mark.parametrize("is_alone", [True, False])
def test_weights_that_are_pickles(is_alone, model, recipe_file, safely):
    if is_alone:
        (model / "model.safetensors").unlink()
    recipe_file(model={"name": "./model"}, training={"max_steps": 1})
    safely("train", "recipe.yaml", code=4 if is_alone else 0)


def test_an_index_that_names_a_pickle(model, recipe_file, safely):
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    recipe_file(model={"name": "./model"})
    assert "'pytorch_model.bin', which is not a safetensors file" in safely("train", "recipe.yaml", code=4)


def test_a_pickle_that_is_called_safetensors(model, recipe_file, safely):
    (model / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    recipe_file(model={"name": "./model"})
    assert "model.safetensors" in safely("train", "recipe.yaml", code=4)


def test_a_tensor_that_is_called_a_path(model, recipe_file, safely, tmp_path):
    """What belongs to no parameter is left out by transformers, and copied by a merge under the name it has."""
    tensors = load_file(model / "model.safetensors")
    odd = {"../../x": tensors["model.norm.weight"].clone(), "/etc/x": tensors["model.norm.weight"].clone()}
    save_file({**tensors, **odd}, model / "model.safetensors", {"format": "pt"})
    recipe_file(model={"name": "./model"}, training={"max_steps": 1})
    before = {path.name for path in tmp_path.parent.iterdir()}
    safely("train", "recipe.yaml")
    safely("merge", "run")
    assert {path.name for path in tmp_path.parent.iterdir()} == before


@pytest.fixture
def trained(recipe_file, cli, canary):
    recipe_file(training={"max_steps": 2, "save_steps": 1})
    assert cli("train", "recipe.yaml")[0] == 0
    return Path("run")


def test_adapters_that_are_pickles(trained, safely):
    (trained / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    safely("eval", "run")
    (trained / "adapter_model.safetensors").unlink()
    said = safely("eval", "run", code=4)
    assert "adapter_model.bin is a pickle and is never read" in said


def test_an_adapter_that_asks_for_code(trained, safely):
    unseal(trained)
    (trained / "evil.py").write_text(SINGS)
    change(
        trained / "adapter_config.json",
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"},
        megatron_core="evil",
    )
    safely("eval", "run")
    change(trained / "adapter_config.json", megatron_config={"evil": 1})
    assert "megatron_config" in safely("eval", "run", code=4)


@pytest.mark.parametrize("name", ["lora_A.weight", "../../x", "/etc/x", "base_model.model.../x"])
def test_an_adapters_tensor_of_another_name(name, trained, safely):
    unseal(trained)
    tensors = load_file(trained / "adapter_model.safetensors")
    save_file({**tensors, name: next(iter(tensors.values())).clone()}, trained / "adapter_model.safetensors")
    for command in ("eval", "merge", "export"):
        assert f"{name} belongs to no adapted module" in safely(command, "run", code=4)


def test_checkpoints_with_pickles(trained, safely):
    for folder in trained.glob("checkpoint-*"):
        for name in ("rng_state.pth", "optimizer.pt", "scheduler.pt", "training_args.bin"):
            (folder / name).write_bytes(pickle.dumps(Bomb()))
    shutil.rmtree(trained / "checkpoint-2")
    safely("train", "recipe.yaml", "--resume")
    (trained / "checkpoint-1" / "optimizer.safetensors").unlink()
    shutil.rmtree(trained / "checkpoint-2")
    assert "optimizer.safetensors is missing" in safely("train", "recipe.yaml", "--resume")


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".py", ".tar"])
def test_datasets(suffix, recipe_file, safely, tmp_path, canary):
    """A folder goes through `datasets`: scripts are not run, and pickles not read, packed in archives or not."""
    (tmp_path / "rows").mkdir()
    if suffix == ".tar":
        for name in ("a.pth", "a.pkl", "a.pyd"):
            (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with tarfile.open(tmp_path / "rows" / "rows.tar", "w") as archive:
            for name in ("a.pth", "a.pkl", "a.pyd"):
                archive.add(tmp_path / name, name)
    else:
        content = SINGS.encode() if suffix == ".py" else pickle.dumps(Bomb())
        (tmp_path / "rows" / f"rows{suffix}").write_bytes(content)
    recipe_file(data={"train": "rows", "eval": None})
    safely("train", "recipe.yaml", code=3)


def test_no_pickle_in_the_source():
    """Nor any reader of one, or of what may hold one; `tests/test_architecture.py` has imports, eval and exec."""
    readers = {"load", "loads", "read_pickle", "load_state_dict", "load_checkpoint_and_dispatch", "load_state"}
    allowed = {"json.loads", "methods.load", "recipe.load", "load"}  # the last: a recipe's, or a tokenizer's
    allowed.add("self.accelerator.scaler.load_state_dict")  # numbers of a checkpoint's state.json
    allowed.add("opened.load")  # Pillow's pixels
    for path in Path(peftcli.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name.rpartition(".")[2] in readers:
                    assert name in allowed, f"{path.name}:{node.lineno}: {name}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"use_safetensors['\"]?[:=] *False", node.value)
            if isinstance(node, ast.keyword) and node.arg in ("weights_only", "allow_pickle", "use_safetensors"):
                assert ast.unparse(node.value) == ("True" if node.arg != "allow_pickle" else "False"), path


NAMES = {
    "null byte": "a\x00b",
    "too long": "a" * 5000,
    "long path": "../" * 2000 + "x",
    "nobody's": "~nobody-at-all/x",
    "device": "/dev/zero",
    "memory": "/proc/self/mem",
    "terminal": "\x1b]0;x\x07",
    "second line": "x\nerror: fake",
    "markup": "[bold red]x[/]",
    "link": "loop",
    "reversed": "\u202excod.exe",
}


@pytest.mark.parametrize("key", ["model.name", "data.train", "data.eval", "output_dir", "model.gguf_file"])
@pytest.mark.parametrize("case", NAMES)
def test_names_in_recipes(key, case, recipe_file, safely, cli, tmp_path, canary):
    """Names that are no files', or files that are not to be read or written."""
    (tmp_path / "loop").symlink_to("loop")
    name = NAMES[case]
    section, _, field = key.partition(".")
    recipe_file(**({section: {field: name}} if field else {section: name}), training={"max_steps": 1})
    with watched(tmp_path) as seen:
        code, stdout, stderr = cli("train", "recipe.yaml")
    harmless = key == "output_dir" and case in ("markup", "reversed", "nobody's")
    assert code in ((0,) if harmless else (2, 3, 4, 6)), stderr
    assert "bug in peftcli" not in stderr
    assert "\x1b" not in stderr + stdout
    assert [line for line in seen.outside if "peftcli-" not in line] == []


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("command", [["eval"], ["merge"], ["eval", "--adapter"], ["train"], ["validate"]], ids=" ".join)
def test_names_on_the_command_line(command, case, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    code, stdout, stderr = cli(*command, NAMES[case].replace("\x00", "?"))
    assert code in (2, 4), stderr
    assert "bug in peftcli" not in stderr
    assert "\x1b" not in stderr + stdout
