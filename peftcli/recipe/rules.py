"""Rules between fields of a recipe: settings that exclude each other, and settings that would do nothing.

They work on the plain values as written, not on the models: so they are reported together with everything else that
is wrong, and a value that was written can be told from a default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peftcli.errors import Problem
from peftcli.recipe.fields import default_of
from peftcli.recipe.messages import Locate
from peftcli.recipe.values import KeyPath, dotted

EXCLUSIVE: tuple[tuple[KeyPath, KeyPath], ...] = (
    (("data", "eval"), ("data", "eval_fraction")),
    (("training", "max_steps"), ("training", "num_train_epochs")),
    (("training", "warmup_steps"), ("training", "warmup_ratio")),
)
"""Pairs of which a recipe sets one. Only the second of a pair can have a default, which the first puts aside."""

_NEED_EVAL: tuple[KeyPath, ...] = (
    ("training", "load_best_at_end"),
    ("training", "early_stopping_patience"),
    ("training", "eval_steps"),
)

_FOUR_BITS = ("nf4", "fp4")

# A field, and the values of another field without one of which it would do nothing.
_NEED_VALUE: tuple[tuple[KeyPath, KeyPath, tuple[str | bool, ...]], ...] = (
    (("evaluation", "generate", "temperature"), ("evaluation", "generate", "do_sample"), (True,)),
    (("evaluation", "generate", "top_p"), ("evaluation", "generate", "do_sample"), (True,)),
    (("quantization", "double_quant"), ("quantization", "type"), _FOUR_BITS),
    (("quantization", "compute_dtype"), ("quantization", "type"), _FOUR_BITS),
    (("quantization", "storage_dtype"), ("quantization", "type"), _FOUR_BITS),
    (("quantization", "outlier_threshold"), ("quantization", "type"), ("int8",)),
    (("distributed", "deepspeed_config"), ("distributed", "strategy"), ("deepspeed",)),
)

# An optimizer, and the fields that it does not read. All read weight_decay: SGD without momentum decays as AdamW does.
_NOT_READ_BY: dict[str, tuple[str, ...]] = {
    "lion_8bit": ("adam_epsilon",),
    "adafactor": ("adam_beta1", "adam_beta2", "adam_epsilon"),
    "sgd": ("adam_beta1", "adam_beta2", "adam_epsilon"),
}

TASK_FORMATS: dict[str, tuple[str, ...]] = {
    "causal-lm": ("messages", "prompt-completion", "instruction", "text"),
    "seq2seq-lm": ("prompt-completion", "instruction"),
    "sequence-classification": ("classification",),
    "token-classification": ("token-classification",),
    "image-classification": ("image",),
}
"""The data formats that suit each `model.task`."""

_LANGUAGE = ("causal-lm", "seq2seq-lm")
_LABELLING = ("sequence-classification", "token-classification", "image-classification")
_TEXT = (*_LANGUAGE, "sequence-classification", "token-classification")

# A field, and the tasks for which alone it does anything.
_NEED_TASK: tuple[tuple[KeyPath, tuple[str, ...]], ...] = (
    (("model", "gguf_file"), ("causal-lm",)),
    (("model", "num_labels"), _LABELLING),
    (("model", "problem_type"), ("sequence-classification",)),
    (("data", "max_length"), _TEXT),
    (("data", "overlong"), _TEXT),
    (("data", "train_on"), ("causal-lm",)),
    (("data", "cache"), _TEXT),
    (("data", "padding_free"), ("causal-lm",)),
    (("data", "packing"), ("causal-lm",)),
    (("training", "group_by_length"), _TEXT),
    (("evaluation", "generate", "max_new_tokens"), _LANGUAGE),
    (("evaluation", "generate", "do_sample"), _LANGUAGE),
    (("training", "head_learning_rate"), _LABELLING),
)


def given(values: Any, path: KeyPath) -> Any:
    """Returns the value written at a path; None where there is none."""
    for part in path:
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def broken_rules(values: Mapping[str, Any], locate: Locate) -> Iterator[Problem]:
    """Yields a problem for each rule that the recipe's plain `values` break, whatever else is wrong with them."""
    for one, other in EXCLUSIVE:
        if given(values, one) is not None and given(values, other) is not None:
            message = f"{dotted(one)} and {dotted(other)} exclude each other"
            yield Problem(message, locate(one), f"remove one of them; {dotted(other)} is at {locate(other)}")
    if given(values, ("data", "eval")) is None and given(values, ("data", "eval_fraction")) is None:
        for path in _NEED_EVAL:
            if given(values, path) not in (None, False):
                hint = f"set data.eval or data.eval_fraction, or remove {path[-1]}"
                yield Problem(f"{dotted(path)} needs evaluation data", locate(path), hint)
    for path, on, wanted in _NEED_VALUE:
        written, other_value = given(values, path), given(values, on)
        other_value = default_of(on) if other_value is None else other_value
        if written is not None and written != default_of(path) and other_value not in wanted:
            message = f"{dotted(path)} does nothing without {dotted(on)}: {' or '.join(map(_plain, wanted))}"
            yield Problem(message, locate(path), f"set {dotted(on)}, or remove {path[-1]}")
    strategy = ("distributed", "strategy")
    if given(values, strategy) == "deepspeed" and given(values, ("distributed", "deepspeed_config")) is None:
        message = "distributed.strategy: deepspeed needs distributed.deepspeed_config"
        yield Problem(message, locate(strategy), "name a JSON file, such as configs/deepspeed_zero3.json")
    batch_size = ("training", "per_device_train_batch_size")
    if given(values, batch_size) == "auto" and given(values, strategy) in ("fsdp2", "deepspeed"):
        message = f"training.per_device_train_batch_size: auto cannot be tried with {given(values, strategy)}, where a "
        message += "process that ran out of memory would leave the others waiting"
        yield Problem(message, locate(batch_size), "set a number, or distributed.strategy to ddp")
    if given(values, strategy) == "deepspeed" and given(values, ("training", "torch_compile")) is True:
        message = "training.torch_compile: DeepSpeed's hooks around a layer cannot be compiled"
        hint = "set it to false, or distributed.strategy to ddp or fsdp2"
        yield Problem(message, locate(("training", "torch_compile")), hint)
    liger, compiled = ("training", "use_liger_kernel"), ("training", "torch_compile")
    if given(values, liger) is True and given(values, compiled) is True:
        message = "training.use_liger_kernel: torch_compile makes kernels of the same operations"
        yield Problem(message, locate(liger), f"remove one of them; torch_compile is at {locate(compiled)}")
    yield from _layout_problems(values, locate)
    yield from _optimizer_problems(values, locate)
    yield from _task_problems(values, locate)


def _layout_problems(values: Mapping[str, Any], locate: Locate) -> Iterator[Problem]:
    """Yields a problem for each setting of how samples are laid out that another leaves nothing to do for."""
    padding_free, packing, grouped = ("data", "padding_free"), ("data", "packing"), ("training", "group_by_length")
    if given(values, packing) is True and given(values, padding_free) is False:
        message = "data.packing: true needs what data.padding_free: false forbids: examples that are joined"
        yield Problem(message, locate(packing), f"remove one of them; data.padding_free is at {locate(padding_free)}")
    for path in (packing, padding_free):
        if given(values, grouped) is True and given(values, path) is True:
            message = f"training.group_by_length does nothing with {dotted(path)}: true, which leaves no padding"
            yield Problem(message, locate(grouped), f"remove one of them; {dotted(path)} is at {locate(path)}")


def _optimizer_problems(values: Mapping[str, Any], locate: Locate) -> Iterator[Problem]:
    """Yields a problem for each field that `training.optim` does not read."""
    optim = given(values, ("training", "optim"))
    for field in _NOT_READ_BY.get(optim, ()) if isinstance(optim, str) else ():
        path = ("training", field)
        written = given(values, path)
        if written is not None and written != default_of(path):
            readers = "adamw" if field == "adam_epsilon" else "adamw and lion_8bit"
            message = f"{dotted(path)} does nothing with training.optim: {optim}"
            yield Problem(message, locate(path), f"it is for {readers}; set training.optim, or remove {field}")


def _task_problems(values: Mapping[str, Any], locate: Locate) -> Iterator[Problem]:
    """Yields a problem for each field that does not suit `model.task`."""
    written = given(values, ("model", "task"))
    task = default_of(("model", "task")) if written is None else written
    formats = TASK_FORMATS.get(task) if isinstance(task, str) else None
    if formats is None:  # not a task: the schema says so
        return
    form = given(values, ("data", "format"))
    if form in {one for forms in TASK_FORMATS.values() for one in forms} and form not in formats:
        tasks = [one for one, forms in TASK_FORMATS.items() if form in forms]
        message = f"data.format: {form} does not suit model.task: {task}, which reads {' or '.join(formats)}"
        hint = f"set model.task to {' or '.join(tasks)}, or data.format to {formats[0]}"
        yield Problem(message, locate(("data", "format")), hint)
    for path, tasks_of in _NEED_TASK:
        value = given(values, path)
        if value is not None and value != default_of(path) and task not in tasks_of:
            message = f"{dotted(path)} does nothing with model.task: {task}"
            yield Problem(message, locate(path), f"set model.task, or remove {path[-1]}")


def _plain(value: str | bool) -> str:
    return str(value).lower()
