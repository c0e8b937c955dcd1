"""What an adapted module costs beside its arithmetic: Python, autograd and the calls of small operations.

Four tokens go forward and back through the part `methods`' rows on a Llama of 8 layers (hidden 32), on one thread, so
that there is next to nothing to compute. On a CPU it is what a small step's time goes into; a GPU computes meanwhile,
and waits where this takes longer than what it computes.
"""

from __future__ import annotations

import copy
import re
from statistics import median

from scripts.bench import methods, timing
from scripts.bench.table import Cell, Options, Table

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def run(options: Options) -> list[Table]:
    """Returns the microseconds of a module with an adapter less those of one without."""
    import torch

    torch.set_num_threads(1)
    rounds = 1 if options.smoke else 10 * options.rounds
    ids = torch.arange(4)[None]
    model = methods.with_inputs_that_need_a_gradient(methods.llama(1 if options.smoke else 8, sizes=TINY))
    rows: dict[str, dict[str, Cell]] = {}
    for name in methods.OURS:
        timing.log(f"overhead of {name}: {rounds} rounds")
        makers = {methods.FLOOR: methods.frozen, "peftcli": methods.ours(name, methods.targets_of(name))}
        if name not in methods.WITHOUT_PEFT:
            makers["PEFT"] = methods.peft(name, methods.targets_of(name))
        models = {tool: make(copy.deepcopy(model)) for tool, make in makers.items()}
        num_modules = sum(bool(re.fullmatch(methods.targets_of(name), one)) for one, _ in model.named_modules())
        passes = {tool: methods.step(one, ids, optimizes=False) for tool, one in models.items()}
        seconds = timing.interleaved(passes, rounds, unmeasured=3)
        bare = seconds.pop(methods.FLOOR)
        rows[name] = {
            f"{tool}, µs": median(own - other for own, other in zip(each, bare, strict=True)) / num_modules * 1e6
            for tool, each in seconds.items()
        }
    torch.set_num_threads(options.threads)
    note = f"Forward and backward pass of one of its modules, medians of {rounds} interleaved rounds; one thread."
    return [Table("An adapted module beside its arithmetic", rows, (note,))]
