"""What can be wrong with an adapter's folder or its base, each with what is to be said of it.

The first 28 are those that were tried on PEFT 0.21.2, which loads nine of them without a word and seven with a warning.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peftcli.checkpoint.adapter import BASE_PREFIX, CONFIG_FILE, WEIGHTS_FILE, attach, save_adapter
from peftcli.checkpoint.seal import SEAL_FILE
from peftcli.data.meaning import LABELS_FILE
from peftcli.errors import PeftcliError
from peftcli.files import write_json
from peftcli.recipe import ModelSection
from peftcli.run.fingerprint import fingerprint
from peftcli.run.opening import load_weights, open_base
from peftcli.run.subject import open_subject
from tests.methods.building import adapt, origin_of, randomise

TARGETS = ("q_proj", "v_proj")
A_KEY = f"{BASE_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
B_KEY = f"{BASE_PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight"
OTHER_BASE = "are not those that the adapter was trained on"
SEALED = "has changed since it was written"
Damage = Callable[[Path, Path], None]
"""What is done to an adapter's folder and its base's."""


@dataclass(frozen=True)
class Mutation:
    """Something that is wrong.

    Attributes:
        damage: How it comes about.
        said: What is said of it, whether or not the adapter has a seal; None where names, shapes and settings fit.
        sealed: What is said instead where it has one; an adapter without, or with --force, then loads if it fits.
    """

    damage: Damage
    said: str | None = None
    sealed: str | None = None


def config(**changes: Any) -> Damage:
    """Returns a damage: fields of the adapter's config changed, or taken out where the value is `...`."""

    def damage(adapter: Path, _: Path) -> None:
        fields = {**json.loads((adapter / CONFIG_FILE).read_text()), **changes}
        kept = {key: value for key, value in fields.items() if value is not ...}
        (adapter / CONFIG_FILE).write_text(json.dumps(kept))

    return damage


def tensors(
    change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS_FILE, *, of_base: bool = False
) -> Damage:
    """Returns a damage: `change` has edited the tensors of a file of the adapter, or of the base."""

    def damage(adapter: Path, base: Path) -> None:
        path = (base if of_base else adapter) / file
        found = {key: tensor.clone() for key, tensor in load_file(path).items()}
        change(found)
        save_file(found, path, {"format": "pt"})

    return damage


def content(change: Callable[[bytearray], Any], name: str = WEIGHTS_FILE) -> Damage:
    """Returns a damage: `change` has edited the bytes of one of the adapter's files."""

    def damage(adapter: Path, _: Path) -> None:
        data = bytearray((adapter / name).read_bytes())
        change(data)
        (adapter / name).write_bytes(data)

    return damage


def of_base(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    return tensors(change, "model.safetensors", of_base=True)


def drop(*parts: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Returns a change: the tensors are gone whose key has one of `parts`."""

    def change(found: dict[str, torch.Tensor]) -> None:
        for key in [key for key in found if any(part in key for part in parts)]:
            del found[key]

    return change


def put(key: str, make: Callable[[Any], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda found: found.update({key: make(found.get(key))})


def rename(found: dict[str, torch.Tensor]) -> None:
    for key in list(found):
        found[key.replace("lora_A", "lora_a")] = found.pop(key)


def poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor.flatten()[-1] = value
        return tensor

    return make


def flip(data: bytearray) -> None:
    """The lowest bit of the last number's mantissa."""
    data[-4] ^= 1


def zero(data: bytearray) -> None:
    data[-1024:] = bytes(1024)


def pickle_alone(adapter: Path, _: Path) -> None:
    """A pickle that leaves a file behind wherever it is read."""

    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (adapter / "canary",))

    (adapter / WEIGHTS_FILE).unlink()
    torch.save({"x": Canary()}, adapter / "adapter_model.bin")


def edited_seal(adapter: Path, _: Path) -> None:
    text = (adapter / SEAL_FILE).read_text()
    assert '"lora_alpha": 8.0' in text
    (adapter / SEAL_FILE).write_text(text.replace('"lora_alpha": 8.0', '"lora_alpha": 80.0'))


def swapped_tasks(adapter: Path, _: Path) -> None:
    facts = json.loads((adapter / LABELS_FILE).read_text())
    write_json(adapter / LABELS_FILE, {**facts, "tasks": facts["tasks"][::-1]})


def renamed_base(adapter: Path, base: Path) -> None:
    config(base_model_name_or_path=str(shutil.copytree(base, base.with_name("other"))))(adapter, base)


def negate(found: dict[str, torch.Tensor]) -> None:
    for tensor in found.values():
        tensor.neg_()


def nudge(found: dict[str, torch.Tensor]) -> None:
    """One weight, by less than bfloat16 resolves."""
    found["model.layers.1.mlp.up_proj.weight"].mul_(1.0001)


THE_28 = {
    "one lora_B missing": Mutation(tensors(drop(B_KEY)), f"{B_KEY} is missing"),
    "all lora_B missing": Mutation(tensors(drop("lora_B")), "lora_B.weight is missing"),
    "no tensors": Mutation(tensors(drop("")), f"{A_KEY} is missing"),
    "keys renamed": Mutation(tensors(rename), "lora_a.weight belongs to no adapted module"),
    "peft_type changed": Mutation(config(peft_type="LOHA"), "peft_type LOHA is not a method of this version"),
    "extra keys": Mutation(
        tensors(put(A_KEY.replace("layers.0", "layers.9"), lambda _: torch.zeros(4, 48))),
        "layers.9.self_attn.q_proj.lora_A.weight belongs to no adapted module",
    ),
    "a target that has tensors is not named": Mutation(
        config(target_modules=["q_proj"]), "v_proj.lora_A.weight belongs to no adapted module"
    ),
    "one unknown target": Mutation(config(target_modules=[*TARGETS, "q_porj"]), 'no module matches "q_porj"'),
    "unknown layers": Mutation(config(layers_to_transform=[0, 99]), "there is no layer 99"),
    "modules_to_save unknown": Mutation(config(modules_to_save=["zzz"]), "modules_to_save: no module matches zzz"),
    "r is 0": Mutation(config(r=0), f"{CONFIG_FILE}: r: Input should be greater than"),
    "r is larger than the layer": Mutation(config(r=10000), "has shape [4, 48], not [10000, 48]"),
    "alpha is 0": Mutation(config(lora_alpha=0), f"{CONFIG_FILE}: alpha: Input should be greater than 0"),
    "alpha is negative": Mutation(config(lora_alpha=-8), f"{CONFIG_FILE}: alpha: Input should be greater than 0"),
    "dropout is 1": Mutation(config(lora_dropout=1.0), f"{CONFIG_FILE}: dropout: Input should be less than 1"),
    "alpha is 100 times larger": Mutation(config(lora_alpha=800.0), sealed="lora_alpha was 8.0, is 800.0"),
    "use_rslora flipped": Mutation(config(use_rslora=True), sealed="use_rslora was false, is true"),
    "alpha deleted": Mutation(config(lora_alpha=...), f"{CONFIG_FILE}: lora_alpha is missing"),
    "use_dora flipped": Mutation(config(use_dora=True), "lora_magnitude_vector is missing"),
    "unknown config key": Mutation(config(of_tomorrow=1), "of_tomorrow = 1, which this version does not have"),
    "rank_pattern unmatched": Mutation(
        config(rank_pattern={"zzz": 2}), "rank_pattern: zzz matches none of the adapted modules"
    ),
    "another base, by name": Mutation(renamed_base, sealed="base_model_name_or_path was "),
    "another base of the same shape": Mutation(of_base(negate), sealed=OTHER_BASE),
    "r edited": Mutation(config(r=8), "has shape [4, 48], not [8, 48]"),
    "a size-0 tensor": Mutation(tensors(put(A_KEY, lambda _: torch.zeros(0))), "has shape [0], not [4, 48]"),
    "a bit flipped": Mutation(content(flip), sealed=SEALED),
    "1 KB zeroed": Mutation(content(zero), sealed=SEALED),
    "NaN inside": Mutation(tensors(put(B_KEY, poke(float("nan")))), f"{B_KEY} holds values that are not finite"),
}

FURTHER = {
    "r is negative": Mutation(config(r=-4), f"{CONFIG_FILE}: r: Input should be greater than"),
    "r is a fraction": Mutation(config(r=4.5), f"{CONFIG_FILE}: r"),
    "dropout is 1.5": Mutation(config(lora_dropout=1.5), f"{CONFIG_FILE}: dropout: Input should be less than 1"),
    "dropout is negative": Mutation(config(lora_dropout=-0.1), f"{CONFIG_FILE}: dropout"),
    "alpha is NaN": Mutation(config(lora_alpha=float("nan")), f"{CONFIG_FILE}: alpha"),
    "alpha_pattern unmatched": Mutation(config(alpha_pattern={"zzz": 2}), "alpha_pattern: zzz matches none"),
    "an alpha of one module": Mutation(config(alpha_pattern={"q_proj": 80.0}), sealed="alpha_pattern was {}, is"),
    "a start that moved the base": Mutation(config(init_lora_weights="pissa"), "its base is not the one it names"),
    "biases that were trained": Mutation(config(bias="all"), "bias = all, which this version does not have"),
    "layers that are fewer": Mutation(config(layers_to_transform=[0]), "belongs to no adapted module"),
    "a task that it is not": Mutation(config(task_type="SEQ_CLS"), sealed="task_type was "),
    "a revision that it is not": Mutation(config(revision="v2"), sealed="revision was null, is"),
    "a key that is not there": Mutation(config(loftq_config={}), sealed="loftq_config was not there, is {}"),
    "infinity inside": Mutation(tensors(put(B_KEY, poke(float("inf")))), f"{B_KEY} holds values that are not finite"),
    "A and B swapped": Mutation(
        tensors(put(A_KEY, lambda one: one.t().contiguous())), "has shape [48, 4], not [4, 48]"
    ),
    "two modules swapped": Mutation(
        tensors(
            lambda found: found.update(
                {A_KEY: found[A_KEY.replace("q_proj", "v_proj")], A_KEY.replace("q_proj", "v_proj"): found[A_KEY]}
            )
        ),
        sealed=SEALED,
    ),
    "rounded to half": Mutation(
        tensors(lambda found: found.update({key: one.half() for key, one in found.items()})), sealed=SEALED
    ),
    "whole numbers": Mutation(tensors(put(B_KEY, lambda one: one.int())), f"{B_KEY} holds torch.int32"),
    "a name that leads elsewhere": Mutation(
        tensors(put("../../x", lambda _: torch.zeros(2))), "../../x belongs to no adapted module"
    ),
    "truncated": Mutation(content(lambda data: data.__delitem__(slice(-100, None))), f"{WEIGHTS_FILE} is damaged"),
    "0 bytes": Mutation(content(bytearray.clear), f"{WEIGHTS_FILE} is damaged"),
    "trailing bytes": Mutation(content(lambda data: data.extend(b"more")), f"{WEIGHTS_FILE} is damaged"),
    "a bad header": Mutation(content(lambda data: data.__setitem__(slice(0, 8), b"\xff" * 8)), "is damaged"),
    "another header": Mutation(content(lambda data: data.__setitem__(9, 0)), f"{WEIGHTS_FILE} is damaged"),
    "a malicious pickle": Mutation(pickle_alone, "adapter_model.bin is a pickle and is never read"),
    "no weights": Mutation(lambda adapter, _: (adapter / WEIGHTS_FILE).unlink(), f"it has no {WEIGHTS_FILE}"),
    "no config": Mutation(lambda adapter, _: (adapter / CONFIG_FILE).unlink(), f"it has no {CONFIG_FILE}"),
    "half a config": Mutation(
        content(lambda data: data.__delitem__(slice(40, None)), CONFIG_FILE), f"{CONFIG_FILE} cannot be read"
    ),
    "a list for a config": Mutation(
        content(lambda data: data.__setitem__(slice(None), b"[]"), CONFIG_FILE), "expected a JSON object"
    ),
    "half a seal": Mutation(
        content(lambda data: data.__delitem__(slice(40, None)), SEAL_FILE), sealed=f"{SEAL_FILE} cannot be used"
    ),
    "a seal that was edited": Mutation(edited_seal, sealed=f"{SEAL_FILE} cannot be used: it has changed"),
    "tasks in another order": Mutation(swapped_tasks, sealed=f"{LABELS_FILE} {SEALED}"),
    "a base that was trained further": Mutation(of_base(nudge), sealed=OTHER_BASE),
    "a base that lacks a weight": Mutation(
        of_base(drop("layers.1.mlp.up_proj.weight")),
        "lacks weights that the model needs: model.layers.1.mlp.up_proj.weight",
        sealed=OTHER_BASE,
    ),
    "a base with NaN": Mutation(of_base(put("model.norm.weight", poke(float("nan")))), sealed=OTHER_BASE),
}

MUTATIONS = THE_28 | FURTHER


def write_subject(folder: Path, model_folder: Path) -> tuple[Path, Path]:
    """Writes an adapter that has learned something of a copy of a tiny Llama, sealed; returns both folders."""
    adapter, base = folder / "adapter", folder / "base"
    shutil.copytree(model_folder, base)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings, _ = adapt(model, "lora", list(TARGETS), r=4, alpha=8.0)
    randomise(model)
    adapter.mkdir()
    write_json(adapter / LABELS_FILE, {"task": "causal-lm", "kind": None, "labels": [], "tasks": ["a", "b"]})
    known = fingerprint(open_base(ModelSection(name=str(base))))
    save_adapter(adapter, model, origin_of("lora", settings, base_model=str(base), revision=None, fingerprint=known))
    return adapter, base


def refusal(mutation: Mutation, folder: Path, *, seal: bool = True, force: bool = False) -> PeftcliError | list[str]:
    """Damages a copy of what `write_subject` has written, and returns with what it is refused, or what is remarked.

    Args:
        mutation: The damage.
        folder: Holds the copy.
        seal: Whether the adapter keeps its seal.
        force: Whether it is forced.
    """
    adapter, base = folder / "adapter", folder / "base"
    mutation.damage(adapter, base)
    if not seal:
        (adapter / SEAL_FILE).unlink()
    try:
        subject = open_subject(None, adapter, str(base), force=force)
        model, _ = load_weights(subject.base, torch.device("cpu"))
        attach(model, subject.adapter)
    except PeftcliError as error:
        return error
    return list(subject.remarks)


def count_refused(mutations: dict[str, Mutation], folder: Path, model_folder: Path) -> tuple[int, list[str]]:
    """Returns how many of `mutations` are refused with exit code 4 and the reason, and the names of the others."""
    write_subject(folder / "whole", model_folder)
    others = []
    for number, (name, mutation) in enumerate(mutations.items()):
        found = refusal(mutation, shutil.copytree(folder / "whole", folder / str(number)))
        wanted = mutation.sealed or mutation.said or ""
        if not (isinstance(found, PeftcliError) and found.exit_code == 4 and wanted in str(found)):
            others.append(name)
    return len(mutations) - len(others), others
