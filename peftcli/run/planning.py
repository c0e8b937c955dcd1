"""`peftcli plan`: what a recipe would train, counted on a model without weights."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli import inject, manifest, models, startup
from peftcli.checkpoint.adapter import adapter_tensors
from peftcli.errors import RecipeError
from peftcli.recipe import LoadedRecipe
from peftcli.reporting import Reporter
from peftcli.run.fitting import check_method, check_task, located
from peftcli.run.opening import read_data
from peftcli.run.packing import check_quantization, packed_paths
from peftcli.run.prepacked import held, note_stored
from peftcli.training import memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.methods._place import Site


@dataclass(frozen=True)
class Group:
    """Modules of one name and shape in all layers, and what is trained in them.

    Attributes:
        modules: Their path, with `*` for the layers' numbers.
        count: How many there are.
        shape: `I × O` of each.
        params: Parameters that train in all of them.
    """

    modules: str
    count: int
    shape: str
    params: int


def plan(loaded: LoadedRecipe, reporter: Reporter) -> dict[str, Any]:
    """Returns what the recipe would train; needs no weights, no tokenizer and no data.

    Raises:
        RecipeError: The method, or its targets, do not fit the model.
        ModelError: The model's configuration cannot be read.
    """
    method, config = check_method(loaded)
    check_task(loaded, method)
    section = loaded.recipe.model
    reporter.stage("reading the model's configuration")
    source = models.locate(section)
    base_config = models.load_config(section, source)
    note_stored(base_config, section.name, reporter)
    _set_labels(loaded, base_config, reporter)
    model = models.skeleton(base_config, section.task)
    startup.done()
    try:
        check_quantization(loaded.recipe.quantization, model, method, config)
        how = held(loaded.recipe.quantization, base_config, section.name)
        packed = packed_paths(model, how) if how is not None else []
        sites = inject.graft(model, method, config, loaded.recipe.training.seed)
    except RecipeError as error:
        raise RecipeError.of(located(loaded, error)) from error
    inject.widen_trained(model)
    dtype = models.resolve_dtype(section, base_config, models.pick_device(None))
    takes = memory.expected(model, loaded.recipe.training, dtype, how, packed)
    tensors = method.tensors_to_peft(adapter_tensors(model), config).values()
    return {
        "method": loaded.recipe.method["type"],
        "model": section.name,
        **manifest.parameter_counts(model),
        "adapted_modules": len(sites),
        "adapter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "base_bytes": takes.base,
        "training_bytes": takes.trained,
        "modules": [asdict(group) for group in _groups(model, sites)],
    }


def _set_labels(loaded: LoadedRecipe, config: Any, reporter: Reporter) -> None:
    """Gives the model's configuration as many labels as the recipe says, else its data where that lies here."""
    section, data = loaded.recipe.model, loaded.recipe.data
    if section.task in models.LANGUAGE_TASKS:
        return
    if section.num_labels is not None:
        config.num_labels = section.num_labels
    elif all(Path(source.path).exists() for source in data.train):
        labels = read_data(loaded.recipe).meaning.labels
        config.num_labels = len(labels.names) if labels is not None else config.num_labels
    else:
        reporter.note(f"the head is counted for {config.num_labels} labels: set model.num_labels where it has others")


def _groups(model: PreTrainedModel, sites: list[Site]) -> list[Group]:
    """Returns the adapted modules by name and shape, and after them the base's own parameters that train."""
    groups: dict[tuple[str, str], list[int]] = {}
    adapters = inject.adapters(model)
    for site in sites:
        size = sum(p.numel() for p in adapters[site.name].parameters() if p.requires_grad)
        groups.setdefault((_pattern(site.name) or "(the model)", site.size), []).append(size)
    shared = inject.shared_part(model)
    if shared is not None and (size := sum(p.numel() for p in shared.parameters() if p.requires_grad)):
        groups[f"(shared by all {len(sites)})", ""] = [size]
    for name, parameter in inject.trained_base(model).items():
        shape = " × ".join(map(str, parameter.shape))
        groups.setdefault((_pattern(name), shape), []).append(parameter.numel())
    return [Group(name, len(sizes), shape, sum(sizes)) for (name, shape), sizes in groups.items()]


def _pattern(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
