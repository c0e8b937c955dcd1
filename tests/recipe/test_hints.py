"""Hints on unknown keys: other tools' names, the wrong section, typos; and that the hints' own data is right."""

import pytest

from peftcli.recipe import hints, names
from peftcli.recipe.fields import accepts_text, all_fields, default_of, fields_at, is_section
from peftcli.recipe.values import dotted

from .conftest import GOOD


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        # Other tools' names.
        ("model_name_or_path", "peftcli calls this model.name"),
        ("base_model", "peftcli calls this model.name"),
        ("model.torch_dtype", "peftcli calls this model.dtype"),
        ("training.lr", "peftcli calls this training.learning_rate"),
        ("training.num_epochs", "peftcli calls this training.num_train_epochs"),
        ("micro_batch_size", "peftcli calls this training.per_device_train_batch_size"),
        ("data.cutoff_len", "peftcli calls this data.max_length"),
        ("sequence_len", "peftcli calls this data.max_length"),
        ("data.dataset", "peftcli calls this data.train"),
        ("method.lora_r", "peftcli calls this method.r"),
        ("method.lora_alpha", "peftcli calls this method.alpha"),
        ("lora_dropout", "peftcli calls this method.dropout"),
        ("lora_target_linear", "peftcli calls this method.target_modules; write target_modules: all-linear"),
        ("training.optimizer", "peftcli calls this training.optim"),
        ("training.bf16", "peftcli calls this training.mixed_precision; write mixed_precision: bf16"),
        ("lora", "peftcli calls this method"),
        ("method.init_r", "peftcli calls this method.r"),
        ("method.tinit", "peftcli calls this method.warmup_steps"),
        ("method.deltaT", "peftcli calls this method.interval"),
        ("method.vera_dropout", "peftcli calls this method.dropout"),
        ("method.vblora_dropout", "peftcli calls this method.dropout"),
        ("method.save_only_topk_weights", "peftcli calls this method.save_topk_only"),
        ("method.prompt_tuning_init", "peftcli calls this method.init"),
        ("method.prompt_tuning_init_text", "peftcli calls this method.init_text"),
        ("method.prefix_projection", "peftcli calls this method.reparametrize"),
        ("method.encoder_hidden_size", "peftcli calls this method.prefix_hidden_size"),
        ("method.adapter_size", "peftcli calls this method.bottleneck_size"),
        ("method.reduction_factor", "peftcli calls this method.bottleneck_size; write the model's hidden size divided"),
        ("method.lora_nums", "peftcli calls this method.num_heads"),
        ("prefix_projection", "peftcli calls this method.reparametrize"),
        ("output", "peftcli calls this output_dir"),
        ("load_in_4bit", "peftcli calls this quantization; write quantization: {type: nf4}"),
        ("model.quantization_config", "peftcli calls this quantization; write quantization: {type: nf4}"),
        ("bnb_4bit_quant_type", "peftcli calls this quantization.type"),
        ("quantization.bnb_4bit_compute_dtype", "peftcli calls this quantization.compute_dtype"),
        ("use_qlora", "peftcli calls this quantization; write quantization: {type: nf4}, or method.type: qlora"),
        ("load_in_8bit", "peftcli calls this quantization; write quantization: {type: int8}"),
        ("quantization.bnb_4bit_quant_storage", "peftcli calls this quantization.storage_dtype"),
        ("llm_int8_threshold", "peftcli calls this quantization.outlier_threshold"),
        ("quantization.llm_int8_skip_modules", "peftcli calls this quantization.skip_modules"),
        ("training.packing", "packing belongs in data"),
        ("data.neat_packing", "peftcli calls this data.packing"),
        ("training.train_sampling_strategy", "peftcli calls this training.group_by_length"),
        # What is not there.
        (
            "data.packing_strategy",
            "packs hold whole examples, best-fit-decreasing, and are filled up no further than a batch's longest",
        ),
        ("data.eval_packing", "an evaluation takes examples in order of length, which leaves hardly any padding"),
        ("model.trust_remote_code", "never accepted from a recipe: peftcli runs no code from a model repository"),
        ("use_liger_kernel", "use_liger_kernel belongs in training"),
        ("enable_liger_kernel", "peftcli calls this training.use_liger_kernel"),
        ("liger_rope", "Liger's kernels replace all they can but the head and the loss, which are peftcli's"),
        ("training.compile", "peftcli calls this training.torch_compile"),
        ("training.torch_compile_mode", "training.torch_compile compiles each layer with torch's default settings"),
        ("method.token_dim", "it follows from the model"),
        ("method.total_step", "it follows from training.max_steps or training.num_train_epochs"),
        ("method.wavelet_family", "waveft has Haar's wavelet alone, PEFT's db1"),
        ("deepspeed", "peftcli calls this distributed.deepspeed_config"),
        ("fsdp", "peftcli calls this distributed.strategy"),
        ("num_nodes", "the number of machines is not the recipe's: peftcli train --nnodes N, or torchrun"),
        ("wandb_project", "logging.report_to takes tensorboard"),
        # The right key in the wrong section, read off the schema.
        ("learning_rate", "learning_rate belongs in training"),
        ("data.learning_rate", "learning_rate belongs in training"),
        ("target_modules", "target_modules belongs in method"),
        ("training.target_modules", "target_modules belongs in method"),
        ("detach_norm", "detach_norm belongs in method"),
        ("training.output_dir", "output_dir belongs at the top level"),
        ("max_new_tokens", "max_new_tokens belongs in evaluation.generate"),
        ("evaluation.max_new_tokens", "max_new_tokens belongs in evaluation.generate"),
        ("name", "name belongs in model or data.train or data.eval"),
        ("train", "train belongs in data"),
        # Typos.
        ("modle", 'did you mean "model"?'),
        ("training.learning-rate", 'did you mean "learning_rate"?'),
        ("training.Seed", 'did you mean "seed"?'),
        ("training.learning_rat", 'did you mean "learning_rate"?'),
        ("data.train.pth", 'did you mean "path"?'),
        ("learning_rat", 'did you mean "training.learning_rate"?'),
        ("data.target_module", 'did you mean "method.target_modules"?'),
        # Nothing comes near.
        ("logging.zzz", "logging takes report_to"),
        (
            "zzz",
            "a recipe takes model, quantization, data, method, training, distributed, evaluation, logging, output_dir, "
            "extends",
        ),
        ("x" * 1000, None),
    ],
)
def test_hints_on_unknown_keys(path, hint):
    said = hints.for_unknown_key(tuple(path.split(".")))
    assert (said or "").split(";")[0] == (hint or "").split(";")[0]
    assert hint is None or said.startswith(hint)


@pytest.mark.parametrize(
    ("key", "known", "hint"),
    [
        ("lora_alpha", ("type", "r"), "peftcli calls this method.alpha, which this method does not have"),
        ("lora_alpha", ("type", "alpha"), "peftcli calls this method.alpha"),
        ("reduction_factor", ("type", "r"), "peftcli calls this method.bottleneck_size, which this method does not"),
        ("lr", ("type", "r"), "peftcli calls this training.learning_rate"),
    ],
)
def test_a_field_that_the_method_does_not_have(key, known, hint):
    said = hints.for_unknown_key(("method", key), known)
    assert said.startswith(hint)
    assert ("does not have" in said) == ("does not" in hint)


def test_no_hint_accepts_the_key(folder):
    (problem,) = folder.problems("base_model: x\n" + GOOD)
    assert problem.message == "base_model: unknown key"


def test_the_targets_of_other_names_exist():
    fields = {dotted(path) for path in all_fields()}
    assert set(names.OTHER_NAMES) <= fields
    assert set(names.OTHER_VALUES) <= {path[-1] for path in all_fields()}


def test_each_other_name_has_one_meaning():
    given = [
        name for group in (names.OTHER_NAMES, names.UNAVAILABLE) for words in group.values() for name in words.split()
    ]
    assert sorted(given) == sorted(set(given))
    assert set(names.REMARKS) <= set(given)
    assert all(name == name.lower().replace("-", "_") for name in given)


def test_no_other_name_is_a_key_of_ours():
    own = {path[-1] for path in all_fields() if path[0] != "method"}  # AdaLoRA has a beta1 that is not Adam's
    given = {
        name for group in (names.OTHER_NAMES, names.UNAVAILABLE) for words in group.values() for name in words.split()
    }
    assert not own & given


def test_no_other_value_is_a_choice_of_ours():
    for path in all_fields():
        if path == ("method", "type"):  # its values are no choices of the schema
            continue
        for value in names.OTHER_VALUES.get(path[-1], {}):
            assert value != default_of(path)


def test_the_schema_walk():
    assert fields_at(("data", "train")) == ("path", "name", "split")
    assert fields_at(("data", "eval", 3)) == ("path", "name", "split")
    assert fields_at(("data", "columns")) == ()
    assert fields_at(("nowhere", "at", "all")) == ()
    assert "detach_norm" in fields_at(("method",))
    assert ("evaluation", "generate", "top_p") in all_fields()
    assert accepts_text(("model", "name"))
    assert accepts_text(("model", "revision"))
    assert accepts_text(("data", "columns", "anything"))
    assert accepts_text(("data", "train"))
    assert not accepts_text(("training", "seed"))
    assert not accepts_text(("data", "format"))
    assert not accepts_text(("method", "r"))
    assert is_section(("evaluation", "generate"))
    assert is_section(("method",))
    assert not is_section(("data", "eval"))
