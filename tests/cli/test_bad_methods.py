"""The mistakes that people make with methods: one error each, with the recipe's line, before any weight is loaded."""

from pathlib import Path

import pytest
import torch

from tests.cli.test_bad_input import assert_told
from tests.conftest import tiny_llama_config, write_jsonl
from tests.families import save_family

RANK = "is more than the 24 that model.layers.0.self_attn.k_proj (48 × 24) can have"

# What is wrong → the method, the key on whose line it is, what is said, and whether a hint follows.
CASES = {
    "a rank too large for lora": ({"type": "lora", "r": 30}, "r", f"method.r: 30 {RANK}", False),
    "for dora": ({"type": "dora", "r": 30}, "r", f"method.r: 30 {RANK}", False),
    "for hydralora": ({"type": "hydralora", "r": 30}, "r", f"method.r: 30 {RANK}", False),
    "for split_lora": ({"type": "split_lora", "r": 30}, "r", f"method.r: 30 {RANK}", False),
    "for adalora": ({"type": "adalora", "r": 30}, "r", f"method.r: 30 {RANK}", False),
    "for vblora": ({"type": "vblora", "r": 30, "vector_length": 8}, "r", f"method.r: 30 {RANK}", False),
    "for all heads together": (
        {"type": "split_lora", "combine": "sum", "r": 9, "num_heads": 3},
        "num_heads",
        f"method.num_heads: with combine sum, the 3 heads' r: 27 {RANK}",
        False,
    ),
    "for a pattern": ({"type": "lora", "r": 4, "rank_pattern": {"k_proj": 30}}, "r", f"30 {RANK}", False),
    "alpha of nothing": ({"type": "lora", "alpha": 0.0}, "alpha", "method.alpha: must be greater than 0", False),
    "a negative alpha": ({"type": "hydralora", "alpha": -1.0}, "alpha", "method.alpha: must be greater than 0", False),
    "a start that is none": ({"type": "lora", "init": "pisa"}, "init", "method.init: must be one of kaiming", True),
    "of a prompt": ({"type": "prompt", "init": "vocab"}, "init", "must be one of sampled-vocab", False),
    "an odd rank of two halves": (
        {"type": "lora", "init": "orthogonal", "r": 3},
        "init",
        "method.init: orthogonal splits r into two halves, so r must be even",
        False,
    ),
    "vectors that do not divide": (
        {"type": "vblora", "vector_length": 7},
        "vector_length",
        "method.vector_length: 7 does not divide both sides of model.layers.0.self_attn.q_proj (48 × 48); it must "
        "divide 8",
        False,
    ),
    "more vectors than there are": (
        {"type": "vblora", "vector_length": 8, "num_vectors": 3, "topk": 4},
        "topk",
        "method.topk: 4 is more than the 3 vectors of the bank",
        False,
    ),
    "more coefficients than weights": (
        {"type": "waveft", "n_frequency": 2000},
        "n_frequency",
        "method.n_frequency: 2000 is more than the 1152 weights of model.layers.0.self_attn.k_proj",
        False,
    ),
    "a target rank above the first": (
        {"type": "adalora", "r": 4, "target_r": 5},
        "target_r",
        "method.target_r: 5 is more than r, the 4 to start from",
        False,
    ),
    "no step to allocate ranks in": (
        {"type": "adalora", "r": 4, "target_r": 2, "warmup_steps": 3, "final_steps": 5},
        "warmup_steps",
        "method.warmup_steps: 3, and 5 final_steps, leave none of the 4 steps to allocate ranks in",
        False,
    ),
    "vectors that cannot learn": ({"type": "vera", "d_initial": 0.0}, "d_initial", "method.d_initial: b starts", False),
    "a head that is tied": (
        {"type": "head"},
        "type",
        "method.type: this model's output head shares its weight with the input embedding",
        False,
    ),
    "targets that match nothing": (
        {"type": "ia3", "target_modules": ["c_attn"]},
        "target_modules",
        'method.target_modules: no module matches "c_attn"',
        True,
    ),
    "a pattern that matches nothing": (
        {"type": "vera", "target_modules": r".*attn\.qkv"},
        "target_modules",
        "no module matches",
        True,
    ),
    "what is not scaled": (
        {"type": "ia3", "target_modules": ["q_proj"], "feedforward_modules": ["down_proj"]},
        "feedforward_modules",
        "method.feedforward_modules: down_proj matches none of the adapted modules",
        False,
    ),
    "a pattern that is none": (
        {"type": "ia3", "feedforward_modules": "(down_proj"},
        "feedforward_modules",
        "method.feedforward_modules: it is not a regular expression: missing )",
        False,
    ),
    "A that does not train at a rate of its own": (
        {"type": "lora", "lora_fa": True, "loraplus_lr_ratio": 4.0},
        "lora_fa",
        "method.lora_fa: A does not train",
        False,
    ),
    "a head that is none": (
        {"type": "split_lora", "combine": "task", "task_head": 3},
        "task_head",
        "method.task_head: 3 is none of the 3 heads",
        False,
    ),
    "data without tasks": (
        {"type": "split_lora", "combine": "task"},
        "combine",
        "method.combine: task needs a column that names each sample's task, and the data has none",
        True,
    ),
    "labels of a task without": (
        {"type": "prompt", "init": "class-label"},
        "init",
        "method.init: class-label needs labels, and this task has none",
        True,
    ),
    "a text of nothing": (
        {"type": "prompt", "init": "text", "init_text": " "},
        "init_text",
        "method.init_text: the model's tokenizer has no tokens for it",
        False,
    ),
    "a text for nothing": (
        {"type": "prefix", "init_text": "the cat"},
        "init_text",
        "method.init_text: it says the words of init: text, and nothing else",
        False,
    ),
    "a network that is not there": (
        {"type": "prefix", "init": "zeros", "prefix_hidden_size": 3},
        "prefix_hidden_size",
        "method.prefix_hidden_size: it does nothing without reparametrize: true",
        False,
    ),
    "prompts that stay alike": (
        {"type": "prompt", "init": "text", "init_text": "cat", "num_prompts": 2},
        "num_prompts",
        "method.num_prompts: prompts that start alike stay alike",
        False,
    ),
    "a prompt longer than the model": (
        {"type": "prompt", "num_virtual_tokens": 250},
        "num_virtual_tokens",
        "method.num_virtual_tokens: 250, with the 15 tokens of the longest sample, are more than the model's 256",
        True,
    ),
    "a prefix longer than the model": (
        {"type": "prefix", "num_virtual_tokens": 400},
        "num_virtual_tokens",
        "method.num_virtual_tokens: 400, with the 15 tokens",
        True,
    ),
    "a bottleneck of nothing": (
        {"type": "adapter", "bottleneck_size": 0},
        "bottleneck_size",
        "method.bottleneck_size: must be at least 1",
        False,
    ),
    "biases that are none": (
        {"type": "bitfit", "biases": ["embed_tokens"]},
        "biases",
        'method.biases: no module called "embed_tokens" has a bias; those that have are q_proj',
        False,
    ),
    "layers that are none": ({"type": "full", "layers": [7]}, "layers", "method.layers: ", None),
}


@pytest.fixture
def told(cli, monkeypatch):
    """Runs `train` and `validate` on the recipe, neither of which may load weights; checks the one error of each."""

    def check(path, key, *texts, hint):
        def loaded(*arguments, **named):
            raise AssertionError("weights were loaded")

        monkeypatch.setattr("peftcli.run.training.load_weights", loaded)
        line = next(number for number, row in enumerate(Path(path).read_text().splitlines(), 1) if f'"{key}"' in row)
        for command in ("train", "validate"):
            code, stdout, stderr = cli(command, path)
            shown = stderr.replace(f"{Path(path).parent}/", "")
            expected = ("hint:" in stderr) if hint is None else hint
            assert_told((code, stdout, stderr), 2, f"recipe.yaml:{line}: method", *texts, hint=expected)
            assert shown.count(f"recipe.yaml:{line}: method") == 1
        assert not (Path(path).parent / "run").exists()

    return check


@pytest.mark.parametrize("case", CASES)
def test_a_mistake(case, recipe_file, told):
    method, key, text, hint = CASES[case]
    told(recipe_file(method=method), key, text, hint=hint)


def test_sides_that_do_not_pair_up(recipe_file, told, model_folder, tmp_path, word_tokenizer):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(tiny_llama_config(intermediate_size=81)).save_pretrained(tmp_path / "odd")
    word_tokenizer.save_pretrained(tmp_path / "odd")
    method = {"type": "waveft", "n_frequency": 20, "target_modules": ["0.mlp.up_proj"]}
    text = "model.layers.0.mlp.up_proj (48 × 81) has a side of odd length"
    told(recipe_file(model={"name": str(tmp_path / "odd")}, method=method), "target_modules", text, hint=False)


def test_a_model_without_biases(recipe_file, told, tmp_path):
    name = str(save_family("llama", tmp_path / "plain", attention_bias=False, mlp_bias=False))
    text = "method.type: this model has no biases, so bitfit has nothing to train"
    told(recipe_file(model={"name": name}, method={"type": "bitfit"}), "type", text, hint=False)


def test_attention_in_one_module(recipe_file, told, tmp_path, word_tokenizer):
    """GPT-2's queries, keys and values are one module: (IA)³ cannot scale keys and values alone."""
    from transformers import AutoModelForCausalLM

    from tests.conftest import tiny_gpt2_config

    AutoModelForCausalLM.from_config(tiny_gpt2_config()).save_pretrained(tmp_path / "gpt2")
    word_tokenizer.save_pretrained(tmp_path / "gpt2")
    text = "method.target_modules: auto scales keys and values alone, but transformer.h.0.attn.c_attn"
    sections = {"model": {"name": str(tmp_path / "gpt2")}, "data": {"max_length": 32}}
    told(recipe_file(**sections, method={"type": "ia3", "target_modules": "auto"}), "target_modules", text, hint=False)


def test_more_tasks_than_heads(recipe_file, told, tmp_path):
    rows = [{"prompt": "the cat ? ", "completion": "dog", "task": f"task {i}"} for i in range(4)]
    data = {"train": str(write_jsonl(tmp_path / "tasks.jsonl", rows)), "eval": None}
    method = {"type": "split_lora", "combine": "task", "num_heads": 3}
    told(recipe_file(data=data, method=method), "num_heads", "3 heads are too few for 4 tasks", hint=False)


def test_a_method_that_cannot_recompute_activations(recipe_file, cli):
    path = recipe_file(method={"type": "prefix"}, training={"gradient_checkpointing": True})
    for command in ("train", "validate"):
        assert_told(cli(command, path), 2, "training.gradient_checkpointing: the prefix is in the cache")


@pytest.mark.parametrize(
    ("name", "key", "meant"),
    [
        ("lora", "lora_r", "method.r"),
        ("lora", "lora_alpha", "method.alpha"),
        ("adalora", "init_r", "method.r"),
        ("adalora", "orth_reg_weight", "method.orthogonality"),
        ("vera", "vera_dropout", "method.dropout"),
        ("vblora", "vblora_dropout", "method.dropout"),
        ("vblora", "save_only_topk_weights", "method.save_topk_only"),
        ("prompt", "prompt_tuning_init", "method.init"),
        ("prompt", "prompt_tuning_init_text", "method.init_text"),
        ("prefix", "prefix_projection", "method.reparametrize"),
        ("prefix", "encoder_hidden_size", "method.prefix_hidden_size"),
        ("hydralora", "lora_nums", "method.num_heads"),
        ("adapter", "adapter_size", "method.bottleneck_size"),
        ("adapter", "reduction_factor", "method.bottleneck_size"),
        ("ia3", "target_feedforward_modules", "method.feedforward_modules"),
        ("bitfit", "bias_terms", "method.biases"),
    ],
)
def test_what_others_call_it(name, key, meant, recipe_file, told):
    told(
        recipe_file(method={"type": name, key: 8}),
        key,
        f"method.{key}: unknown key for {name}",
        f"peftcli calls this {meant}",
        hint=True,
    )
