"""Tiny models and data that every part of the suite shares. Nothing here, or in any test, needs a network."""

import gc
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub client: no test may wait for a network
if os.environ.get("PEFTCLI_TEST_GPU") != "1":  # as `make test-gpu` sets it, for tests/gpu alone
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers of the suite are a CPU's
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: threads that share tensors this small mostly wait for each other

import pytest
import torch

WORDS = "the a of and to in is that it was cat dog tree house river stone runs sleeps eats sees big small red old new"


def reset_accelerate():
    """Accelerate keeps its state in a process-wide singleton; a run must not see its predecessor's."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    reset_accelerate()


@pytest.fixture(autouse=True)
def _same_noise():
    torch.manual_seed(0)


def tiny_llama_config(**changes):
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "max_position_embeddings": 256,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            **changes,
        }
    )


def tiny_gpt2_config(**changes):
    from transformers import GPT2Config

    return GPT2Config(
        **{
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 128,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **changes,
        }
    )


@pytest.fixture
def make_model():
    """Makes a tiny random model, the same one for the same arguments: `make_model("llama")`, `make_model("gpt2")`."""

    def make(family="llama", dtype=torch.float32, **changes):
        from transformers import AutoModelForCausalLM

        config = (tiny_llama_config if family == "llama" else tiny_gpt2_config)(**changes)
        torch.manual_seed(7)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def word_tokenizer():
    """A tokenizer with one token a word, letters for the rest; EOS is also the padding, as in SmolLM2."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<s>", "</s>", "<unk>", "\n", "?", ".", ":", *WORDS.split(), *"abcdefghijklmnopqrstuvwxyz"]
    ids = {word: index for index, word in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m.role + ' : ' + m.content + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    return fast


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, word_tokenizer):
    """A tiny Llama with tied embeddings and its tokenizer, as transformers saves them."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(tiny_llama_config(tie_word_embeddings=True)).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


def unseal(folder):
    """Lets an adapter be changed, as one of PEFT's can be: without a seal nothing says what it was."""
    from peftcli.checkpoint.seal import SEAL_FILE

    (Path(folder) / SEAL_FILE).unlink(missing_ok=True)


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def rows():
    """Forty prompts of two to five words and completions of two to eight, all different."""
    words = WORDS.split()
    return [
        {
            "prompt": " ".join(words[(3 * i + j) % 25] for j in range(2 + i % 4)) + " ? ",
            "completion": " ".join(words[(5 * i + 2 * j + i // 25) % 25] for j in range(2 + i % 7)),
        }
        for i in range(40)
    ]


@pytest.fixture
def recipe_file(tmp_path, monkeypatch, model_folder, rows):
    """Writes a recipe on the tiny model and data into a current directory of its own; returns its path.

    `recipe_file(method={...}, training={...})` changes whole sections' fields.
    """
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", rows[:32])
    write_jsonl(tmp_path / "eval.jsonl", rows[32:])

    def write(name="recipe.yaml", **sections):
        values = {
            "model": {"name": str(model_folder)},
            "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 64},
            "method": {"type": "lora", "r": 4},
            "training": {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1},
            "output_dir": "run",
        }
        for section, fields in sections.items():
            if section == "method" and "type" in fields:
                values["method"] = {}  # another method has other fields
            values[section] = (
                {**values[section], **fields} if isinstance(fields, dict) and section in values else fields
            )
        (tmp_path / name).write_text(json.dumps(values, indent=1), encoding="utf-8")  # JSON is YAML
        return tmp_path / name

    return write


class Recorder:
    """A reporter that keeps all it is told; `on_step`, where given, is called with each step's number."""

    def __init__(self, on_step=None):
        self.notes, self.losses, self.logged, self.advanced, self.on_step = [], {}, [], [], on_step

    def stage(self, text):
        pass

    def note(self, text):
        self.notes.append(text)

    def begin(self, total_steps, first_step):
        self.total_steps, self.first_step = total_steps, first_step

    def step(self, step, metrics):
        self.losses[step] = metrics["loss"]
        if self.on_step is not None:
            self.on_step(step)

    def log(self, step, metrics):
        self.logged.append((step, dict(metrics)))

    def advance(self, done, total):
        self.advanced.append((done, total))

    def end(self):
        pass


@pytest.fixture
def train():
    """Trains in this process: `train(recipe, "method.r=8", reporter=..., resume=True)`; returns the manifest."""

    def run(path, *overrides, reporter=None, **options):
        from peftcli import recipe
        from peftcli.run.folder import TrainOptions
        from peftcli.run.training import train as run_train

        reset_accelerate()
        loaded = recipe.load(path, overrides)
        return run_train(loaded, TrainOptions(**options), reporter or Recorder(), lambda segments: None)

    return run


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs the command line in this process: `cli("eval", "run")` returns (exit code, stdout, stderr)."""

    def run(*arguments):
        from peftcli.cli.main import main

        monkeypatch.setattr("sys.argv", ["peftcli", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        gc.unfreeze()  # `main` has a process of its own, in which the collector need not look at what it imported
        gc.enable()
        return ended.value.code, *capsys.readouterr()

    return run
