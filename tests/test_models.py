"""Base models: found or not, whole or not, in which dtype and where; each failure is a sentence."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MambaConfig

from peftcli import models
from peftcli.errors import HostError, ModelError, RecipeError
from peftcli.processes import Place
from peftcli.recipe import DistributedSection, ModelSection
from peftcli.run.execution import mixed_precision
from peftcli.run.subject import open_subject
from peftcli.training import distributed
from tests.conftest import Recorder, write_jsonl
from tests.run.merging import merge_and_compare

CPU = torch.device("cpu")


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the tiny model's folder, to be damaged."""
    return shutil.copytree(model_folder, tmp_path / "model")


def open_model(folder, **fields):
    section = ModelSection(name=str(folder), **fields)
    source = models.locate(section)
    return models.load_model(section, source, models.load_config(section, source), CPU)[0]


def refused(folder, *steps, **fields):
    """Returns the problem that opening a model ends with."""
    with pytest.raises(ModelError) as caught:
        open_model(folder, **fields)
    (problem,) = caught.value.problems
    return problem


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


class TestLocating:
    def test_a_folder(self, folder):
        source = models.locate(ModelSection(name=str(folder)))
        assert (source.name, source.is_local) == (str(folder), True)
        assert source.options == {"trust_remote_code": False}

    def test_the_home_folder(self, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder.parent))
        assert models.locate(ModelSection(name="~/model")).name == str(folder)

    @pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere", "runs/some/model", "../model"])
    def test_no_such_folder(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelError, match=r"model\.name: .*: there is no such folder") as caught:
            models.locate(ModelSection(name=name))
        assert "hub id" in caught.value.problems[0].hint

    def test_a_file(self, folder):
        problem = refused(folder / "config.json")
        assert "is a file, not a model folder" in problem.message

    def test_a_folder_that_is_no_model(self, tmp_path):
        (tmp_path / "notes.txt").write_text("x")
        problem = refused(tmp_path)
        assert "has no config.json" in problem.message
        assert "notes.txt" in problem.hint

    def test_an_empty_folder(self, tmp_path):
        assert refused(tmp_path).hint == "the folder is empty"

    def test_a_hub_id_offline_is_refused_at_once(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        started = time.monotonic()
        problem = refused("some-org/no-such-model")
        assert time.monotonic() - started < 4  # asked for again and again, a hub costs more than that
        assert "cannot load the configuration of some-org/no-such-model" in problem.message
        assert "not in the local cache, and the model hub cannot be reached" in problem.message
        assert "model.name=PATH" in problem.hint

    def test_a_hub_ids_revision_is_passed_on(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        source = models.locate(ModelSection(name="org/model", revision="abc"))
        assert source.options == {"trust_remote_code": False, "revision": "abc", "local_files_only": True}
        assert not source.is_local

    def test_a_missing_gguf_file(self, folder):
        problem = refused(folder, gguf_file="model-q8.gguf")
        assert "has no model-q8.gguf" in problem.message
        assert "config.json" in problem.hint


class TestLoading:
    def test_the_weights_are_the_files(self, folder):
        model, stored = open_model(folder), load_file(folder / "model.safetensors")
        loaded = model.state_dict()
        assert len(stored) > 20
        assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
        assert model.config._attn_implementation == "sdpa"
        assert open_model(folder, attn_implementation="eager").config._attn_implementation == "eager"

    def test_an_attention_that_is_not_known(self, folder):
        assert "no_such_attention" in refused(folder, attn_implementation="no_such_attention").message

    def test_missing_weights(self, folder):
        """Transformers would start them at random and go on."""
        stored = load_file(folder / "model.safetensors")
        for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
            del stored[name]
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        problem = refused(folder)
        assert "lacks weights" in problem.message
        assert "model.layers.1.mlp.up_proj.weight, model.norm.weight" in problem.message
        assert "random" in problem.hint

    def test_weights_of_another_shape(self, folder):
        edit_config(folder, intermediate_size=64)
        message = refused(folder).message
        assert "has weights that misfit: " in message
        assert "model.layers.0.mlp.down_proj.weight [48, 80], not [48, 64]" in message

    @pytest.mark.parametrize("keep", [0, 7, 500, -1000])
    def test_a_file_that_is_cut_short(self, folder, keep):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        problem = refused(folder)
        assert f"cannot load the weights of {folder}" in problem.message

    def test_a_file_that_is_no_safetensors(self, folder):
        (folder / "model.safetensors").write_text("a pointer to a large file, as git leaves it\n" * 9)
        assert f"cannot load the weights of {folder}" in refused(folder).message

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        assert "model.safetensors" in refused(folder).message

    def test_a_pickle_is_never_read(self, folder):
        """Its loading would run whatever code is in it."""
        (folder / "model.safetensors").unlink()
        canary = folder / "canary"
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
        assert "safetensors" in refused(folder).message
        assert not canary.exists()

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "no-such-architecture"}', "{}", "\x00\xff"])
    def test_a_config_that_is_none(self, folder, content):
        (folder / "config.json").write_text(content)
        assert f"cannot load the configuration of {folder}" in refused(folder).message

    def test_code_in_the_folder_is_not_run(self, folder):
        (folder / "model.py").write_text(f"open({str(folder / 'canary')!r}, 'w').close()\nclass M: pass\n")
        edit_config(folder, model_type="own", auto_map={"AutoConfig": "model.M", "AutoModelForCausalLM": "model.M"})
        assert "cannot load the configuration" in refused(folder).message
        assert not (folder / "canary").exists()

    def test_a_folder_without_a_tokenizer(self, folder):
        for file in folder.glob("tokenizer*"):
            file.unlink()
        section = ModelSection(name=str(folder))
        with pytest.raises(ModelError, match="cannot load the tokenizer"):
            models.load_tokenizer(section, models.locate(section))

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "{}",
            "[]",
            '{"version": "1.0", "added_tokens": [], "model": {"type": "none"}}',
            '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}',
        ],
    )
    def test_a_damaged_tokenizer(self, folder, content):
        (folder / "tokenizer.json").write_text(content)
        section = ModelSection(name=str(folder))
        with pytest.raises(ModelError, match="cannot load the tokenizer"):
            models.load_tokenizer(section, models.locate(section))

    def test_a_model_that_writes_no_text(self, folder):
        from transformers import T5Config

        T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=57).save_pretrained(folder)
        section = ModelSection(name=str(folder))
        with pytest.raises(ModelError, match="t5 models cannot be used as causal-lm"):
            models.skeleton(models.load_config(section, models.locate(section)))

    def test_transformers_reports_are_silenced_and_put_back(self, folder, capfd):
        from transformers.utils import logging

        level = logging.get_verbosity()
        open_model(folder)
        assert capfd.readouterr() == ("", "")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, True)


def test_the_skeleton_is_the_model_without_weights(folder):
    section = ModelSection(name=str(folder))
    skeleton = models.skeleton(models.load_config(section, models.locate(section)))
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in open_model(folder).state_dict().items()}


class TestDtype:
    @pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize(
        ("wanted", "device", "expected"),
        [
            ("auto", "cpu", "float32"),
            ("auto", "cuda", None),
            ("bfloat16", "cpu", "bfloat16"),
            ("float16", "cuda", "float16"),
            ("float32", "cuda", "float32"),
        ],
    )
    def test_rules(self, folder, stored, wanted, device, expected):
        edit_config(folder, dtype=stored)
        section = ModelSection(name=str(folder), dtype=wanted)
        config = models.load_config(section, models.locate(section))
        found = models.resolve_dtype(section, config, torch.device(device))
        assert found == getattr(torch, expected or stored)

    def test_a_checkpoint_that_does_not_say(self, folder):
        config = json.loads((folder / "config.json").read_text())
        config.pop("dtype")
        (folder / "config.json").write_text(json.dumps(config))
        section = ModelSection(name=str(folder))
        loaded = models.load_config(section, models.locate(section))
        assert models.resolve_dtype(section, loaded, torch.device("cuda")) == torch.float32

    @pytest.mark.parametrize("wanted", ["auto", "bfloat16"])
    def test_the_model_is_held_in_it(self, folder, wanted):
        expected = {"auto": torch.float32, "bfloat16": torch.bfloat16}[wanted]
        assert {parameter.dtype for parameter in open_model(folder, dtype=wanted).parameters()} == {expected}


class TestDevices:
    def test_the_cpu(self):
        assert models.pick_device("cpu") == CPU
        if not torch.accelerator.is_available():
            assert models.pick_device() == CPU

    @pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
    def test_no_device(self, name):
        with pytest.raises(RecipeError, match=r"--device: .* is no device"):
            models.pick_device(name)

    @pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has one")
    @pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
    def test_a_device_that_this_machine_lacks(self, name):
        with pytest.raises(HostError, match="this machine has no") as caught:
            models.pick_device(name)
        assert caught.value.exit_code == 6

    @pytest.fixture
    def two_gpus(self, monkeypatch):
        """Returns the list of the devices that were made the current one, on a machine that seems to have two."""
        made = []
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        for module in (torch.accelerator, torch.cuda):
            monkeypatch.setattr(module, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", made.append)
        return made

    @pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1"])
    def test_a_device_of_several(self, name, two_gpus):
        assert models.pick_device(name) == torch.device(name)

    def test_a_device_beyond_the_last(self, two_gpus):
        with pytest.raises(HostError, match="this machine has no cuda:2: it has 2, counted from 0"):
            models.pick_device("cuda:2")

    @pytest.mark.parametrize(("name", "made"), [("cuda", []), ("cuda:0", [0]), ("cuda:1", [1])])
    def test_a_run_computes_where_it_is_told(self, name, made, two_gpus):
        """Memory is counted, and some libraries compute, on the current device, which would be the first."""
        _, group = distributed.begin(DistributedSection(), "no", torch.device(name))
        assert (two_gpus, group.device) == (made, torch.device(name))

    @pytest.mark.parametrize(("rank", "visible", "made"), [(0, 2, [0]), (1, 2, [1]), (1, 1, [0])])
    def test_each_process_has_a_device_of_its_own(self, rank, visible, made, two_gpus, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        distributed._take_device(torch.device("cuda"), Place(rank, 2, rank, 2, launched=True))
        assert two_gpus == made

    def test_more_processes_than_devices(self, two_gpus):
        with pytest.raises(HostError, match="3 processes were started on this machine, which has 2 CUDA devices"):
            distributed._take_device(torch.device("cuda"), Place(2, 3, 2, 3, launched=True))

    def test_mixed_precision_on_a_cpu(self):
        assert mixed_precision("auto", CPU) == "no"
        assert [mixed_precision(wanted, CPU) for wanted in ("no", "bf16")] == ["no", "bf16"]
        with pytest.raises(HostError, match="fp16 needs a GPU") as caught:
            mixed_precision("fp16", CPU)
        assert caught.value.exit_code == 6


def test_facts_of_a_configuration(make_model):
    llama, gpt2 = make_model().config, make_model("gpt2").config
    assert (models.vocabulary_size(llama), models.max_positions(llama)) == (128, 256)
    assert (models.vocabulary_size(gpt2), models.max_positions(gpt2)) == (128, 64)
    assert models.max_positions(MambaConfig()) is None  # nothing in it counts positions


class TestPlainFolders:
    def test_a_local_folder_is_used_where_it_lies(self, folder):
        section = ModelSection(name=str(folder))
        with models.plain_folder(section, models.locate(section)) as found:
            assert found == folder

    def test_a_hub_model_that_is_not_there(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        section = ModelSection(name="some-org/no-such-model")
        with (
            pytest.raises(ModelError, match="cannot load the files of some-org/no-such-model"),
            models.plain_folder(section, models.locate(section)),
        ):
            pass


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GGUF_ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _gguf_tensor(name, tensor, config):
    """Returns a Llama weight's name and values in GGUF, which orders the rows of q and k by pairs."""
    if name in GGUF_ENDS:
        return GGUF_ENDS[name], tensor.numpy()
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}.get(module)
    if heads:
        tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    return f"blk.{layer}.{GGUF_NAMES[module]}.weight", tensor.contiguous().numpy()


@pytest.fixture
def gguf_model(make_model, tmp_path):
    """A tiny Llama, and a folder that has nothing but it and its tokenizer in a GGUF file, in full precision."""
    import gguf

    model = make_model(attention_bias=False, mlp_bias=False)
    config = model.config
    (tmp_path / "gguf").mkdir()
    writer = gguf.GGUFWriter(str(tmp_path / "gguf" / "tiny.gguf"), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<s>", "</s>", "a", "b", "ab"]
    tokens += [f"<{index}>" for index in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(*_gguf_tensor(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tmp_path / "gguf"


class TestGguf:
    def test_the_model_is_the_files(self, gguf_model):
        expected, folder = gguf_model
        model = open_model(folder, gguf_file="tiny.gguf").eval()
        ids = torch.arange(2, 20)[None]
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
        section = ModelSection(name=str(folder), gguf_file="tiny.gguf")
        assert models.load_tokenizer(section, models.locate(section))("abba")["input_ids"] == [4, 3, 2]

    def test_a_damaged_file(self, gguf_model):
        _, folder = gguf_model
        content = (folder / "tiny.gguf").read_bytes()
        for keep in (0, 100, len(content) // 2):
            (folder / "tiny.gguf").write_bytes(content[:keep])
            assert f"of {folder}" in refused(folder, gguf_file="tiny.gguf").message

    def test_it_is_trained_and_merged_like_any_other(self, gguf_model, recipe_file, train, tmp_path):
        expected, folder = gguf_model
        path = recipe_file(model={"name": str(folder), "gguf_file": "tiny.gguf"}, training={"learning_rate": 0.1})
        write_jsonl(tmp_path / "train.jsonl", [{"prompt": "abba", "completion": "bab"}] * 8)
        write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "abba", "completion": "bab"}] * 2)
        train(path)
        subject = open_subject(tmp_path / "run", None, None)
        agreement, count = merge_and_compare(subject, tmp_path / "merged", None, Recorder(), overwrite=False)
        assert (agreement.same_choice, count) == (1.0, 14)
        merged = load_file(tmp_path / "merged" / "model.safetensors")
        base = expected.state_dict()
        assert merged.keys() == base.keys()
        same = {name for name, tensor in base.items() if torch.equal(merged[name], tensor)}
        assert same == {name for name in base if "_proj" not in name}
