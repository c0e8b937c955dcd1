"""A user's DeepSpeed file: read, compared with the recipe, and completed from it. Needs no DeepSpeed.

Where both can say a thing, the recipe decides: the file's value is `"auto"`, left out, or the same. The file goes to
DeepSpeed as it is, but for those values, and for the number formats: mixed precision is the run's own, and DeepSpeed's
would convert the base's weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.errors import Problem, RecipeError
from peftcli.recipe import LoadedRecipe, Recipe

AUTO = "auto"
ZERO = "zero_optimization"

_OWN: dict[str, str] = {
    "optimizer": "the optimizer is the recipe's: training.optim, learning_rate, weight_decay",
    "scheduler": "the schedule is the recipe's: training.lr_scheduler_type, warmup_ratio, warmup_steps",
}
"""Sections of the file that the recipe has fields for, and which."""

_IDLE = {
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "prescale_gradients",
    "gradient_predivide_factor",
    "communication_data_type",
    "checkpoint",
}
"""Further keys of the file that are common and change nothing here: they are about gradients, optimizer or logging."""

_SPREADING = {
    "stage",
    "offload_param",
    "overlap_comm",
    "memory_efficient_linear",
    "zero_hpz_partition_size",
    "leaf_module",
    "override_module_apply",
    "enable_sanity_checks",
    "log_trace_cache_warnings",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
}
"""Keys of `zero_optimization` that decide how frozen weights are spread. All others are about what trains."""

_ROUNDING = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
"""Keys of `zero_optimization` that would change the base's weights."""


@dataclass(frozen=True)
class ZeroSettings:
    """What DeepSpeed is to do.

    Attributes:
        file: The user's file.
        values: What it says, completed from the recipe.
        stage: The stage of ZeRO: 1 or 2, or 3, which spreads parameters.
        idle: Keys of the file that change nothing in this run.
    """

    file: Path
    values: dict[str, Any]
    stage: int
    idle: tuple[str, ...]

    def remarks(self, trainable_params: int) -> Iterator[str]:
        """Yields what of the file does nothing in this run, of which `trainable_params` parameters train."""
        if self.stage < 3:
            yield (
                f"{self.file}: ZeRO-{self.stage} spreads the optimizer's state of the {trainable_params:,} parameters "
                "that train; they stay whole here, so this run is and holds what it would with strategy ddp"
            )
        if self.idle:
            yield f"{self.file}: without effect, since DeepSpeed is given what is frozen: {', '.join(self.idle)}"


def read(loaded: LoadedRecipe, precision: str | None = None, num_processes: int | None = None) -> ZeroSettings | None:
    """Returns what the recipe's DeepSpeed file asks for; None where it names none.

    Args:
        loaded: The recipe.
        precision: `no`, `bf16` or `fp16`; None where the device is not known.
        num_processes: How many processes train; None where that is not known.

    Raises:
        RecipeError: The file is missing or no JSON, contradicts the recipe, or asks for what would not happen.
    """
    name = loaded.recipe.distributed.deepspeed_config
    if name is None:
        return None
    file = Path(name)
    found = _read_json(file, loaded.where("distributed", "deepspeed_config"))
    of_recipe = dict(_recipe_values(loaded.recipe, precision, num_processes))
    problems = [Problem(message, str(file), hint) for message, hint in _problems(found, of_recipe)]
    if problems:
        raise RecipeError.of(problems)
    idle = [key for key in found if key in _IDLE]
    zero = found[ZERO]
    idle += [f"{ZERO}.{key}" for key in zero if key not in _SPREADING or (zero["stage"] < 3 and key != "stage")]
    filled = {key: value for key, (value, _) in of_recipe.items() if "." not in key}
    formats = {"fp16": {"enabled": False}, "bf16": {"enabled": False}}
    return ZeroSettings(file, {**found, **filled, **formats}, zero["stage"], tuple(idle))


def _read_json(file: Path, where: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except FileNotFoundError as error:
        raise RecipeError(f"distributed.deepspeed_config: {file} does not exist", where=where) from error
    except json.JSONDecodeError as error:
        raise RecipeError(f"not valid JSON: {error.msg}", where=f"{file}:{error.lineno}") from error
    except (OSError, ValueError) as error:  # a folder, no text, a key that is there twice
        raise RecipeError(f"distributed.deepspeed_config: {file} cannot be read: {error}", where=where) from error
    if not isinstance(found, dict):
        raise RecipeError('not a DeepSpeed configuration, which is {"zero_optimization": {...}, ...}', where=str(file))
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def _recipe_values(wanted: Recipe, precision: str | None, count: int | None) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Yields each key of the file that the recipe decides, with the recipe's value and whence it is."""
    settings = wanted.training
    size, rounds = settings.micro_batch_size, settings.gradient_accumulation_steps
    yield "train_micro_batch_size_per_gpu", (size, f"training.per_device_train_batch_size: {size}")
    yield "gradient_accumulation_steps", (rounds, f"training.gradient_accumulation_steps: {rounds}")
    norm = settings.max_grad_norm
    yield "gradient_clipping", (norm or 0.0, f"training.max_grad_norm: {'null' if norm is None else norm}")
    if count is not None:
        product = f"{size} samples × {rounds} gradient_accumulation_steps × {count} processes"
        yield "train_batch_size", (size * rounds * count, f"training.per_device_train_batch_size: {product}")
    if precision is not None:
        said = f"training.mixed_precision: {settings.mixed_precision}"
        said += f", which is {precision} here" if settings.mixed_precision == AUTO else ""
        for name in ("fp16", "bf16"):
            yield f"{name}.enabled", (precision == name, said)


def _problems(found: Mapping[str, Any], of_recipe: Mapping[str, tuple[Any, str]]) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with a DeepSpeed configuration: a message and a hint each."""
    for key, (value, said) in of_recipe.items():
        written = _value_at(found, key)
        if written not in (None, AUTO) and written != value:
            yield f"{key}: {json.dumps(written)} contradicts {said}", f'set it to "{AUTO}", or change one of them'
    for key, hint in _OWN.items():
        if key in found:
            yield f"{key}: DeepSpeed would replace what the recipe asks for", f"remove it; {hint}"
    known = {*_OWN, *_IDLE, ZERO, "fp16", "bf16", "train_batch_size", *of_recipe}
    for key in found:
        if key not in known:
            yield f"{key}: nothing here reads it, so it would be ignored", "remove it"
    zero = found.get(ZERO)
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    if not isinstance(stage, int) or isinstance(stage, bool) or stage not in (1, 2, 3):
        yield f"{ZERO}.stage: must be 1, 2 or 3", "3 spreads the base over the processes; without, set strategy to ddp"
        return
    assert isinstance(zero, Mapping)
    for key in _ROUNDING:
        if zero.get(key) not in (None, False, AUTO):
            yield f"{ZERO}.{key}: it would round the base's weights", "remove it; quantization.type: nf4 is measured"


def _value_at(found: Mapping[str, Any], key: str) -> Any:
    """Returns what is written at a key such as `fp16.enabled`; None where there is nothing."""
    value: Any = found
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
