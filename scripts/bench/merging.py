"""Merging an adapter: `peftcli merge` against PEFT's merge_and_unload and save_pretrained, in fresh processes.

LoRA of rank 16 on all linear layers, trained for one step by peftcli; both read its folder and write a model's. What
peftcli does beside that is in its time: it proves each merged layer, reads back what it wrote, copies the tokenizer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench import runs, timing
from scripts.bench.table import Cell, Options, Table

if TYPE_CHECKING:
    import torch

    from scripts.bench.timing import Measurement

OURS, THEIRS, IMPORTS = "peftcli merge", "PEFT: merge_and_unload, save_pretrained", "imports, and the model's classes"


def run(options: Options) -> list[Table]:
    """Returns seconds and peaks of both, and of the imports that both begin with."""
    runs.require_model(options.model)
    with tempfile.TemporaryDirectory(prefix="peftcli-bench-") as name:
        folder = Path(name)
        adapter, merged = folder / "out-adapter", {OURS: folder / "peftcli", THEIRS: folder / "peft"}
        timing.log("an adapter to merge")
        recipe = runs.write_recipe(folder, "adapter", options.model, runs.LORA, runs.ONE_STEP)
        timing.process([*runs.PEFTCLI, "train", recipe], options.threads)
        commands = {
            OURS: [*runs.PEFTCLI, "merge", str(adapter), "-o", str(merged[OURS]), "--overwrite"],
            THEIRS: mine("peft", options.model, adapter, merged[THEIRS]),
        }
        if not options.smoke:
            commands[IMPORTS] = mine("imports", options.model)
        found = timing.medians(timing.processes(commands, options.rounds, options.threads))
        output = subprocess.check_output(mine("difference", options.model, *merged.values()), text=True)
    difference = json.loads(output)
    note = (
        f"{options.model.name}, LoRA of rank 16 in {difference['changed']} weights; medians of {options.rounds} "
        f"rounds. The two folders' weights differ by {difference['largest']:.1e} at most."
    )
    return [Table("Merging an adapter", rows(found), (note,))]


def rows(found: Mapping[str, Measurement]) -> dict[str, dict[str, Cell]]:
    """Returns the figures of all contestants."""
    first, imports = found[OURS], found.get(IMPORTS)
    return {
        name: {
            "seconds": one.seconds,
            "ratio": one.seconds / first.seconds,
            "less the imports": one.seconds - imports.seconds if imports and name != IMPORTS else None,
            "peak GB": one.peak_gb,
            "ratio of peaks": one.peak_gb / first.peak_gb,
        }
        for name, one in found.items()
    }


def mine(*arguments: str | Path) -> list[str]:
    """Returns the command that runs one of this file's own functions in a fresh process."""
    return [sys.executable, "-m", "scripts.bench.merging", *map(str, arguments)]


def merge_with_peft(model: str, adapter: str, output: str) -> None:
    """Merges as PEFT's documentation says."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(output)


def import_all(model: str) -> None:
    """Imports what loading and running the model needs; makes it without its weights, since classes come late."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))


def compare(base: str, ours: str, theirs: str) -> None:
    """Prints how many of the base's weights both changed, and by how much the two folders differ at most."""
    before, a, b = weights(base), weights(ours), weights(theirs)
    changed = sum(not (before[name].equal(a[name]) or before[name].equal(b[name])) for name in before)
    largest = max(float((a[name].float() - b[name].float()).abs().max()) for name in before)
    print(json.dumps({"changed": changed, "largest": largest}))


def weights(folder: str) -> dict[str, torch.Tensor]:
    """Returns all tensors of a model's folder, by name."""
    from safetensors.torch import load_file

    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


OWN: dict[str, Callable[..., None]] = {"peft": merge_with_peft, "imports": import_all, "difference": compare}
"""What `mine` runs."""

if __name__ == "__main__":
    OWN[sys.argv[1]](*sys.argv[2:])
