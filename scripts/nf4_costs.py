"""Measures what a base in 4 or 8 bits costs and saves on a CPU: memory, the time of a step, and accuracy.

    make costs                                       # memory and time: a few minutes on two CPU cores
    python scripts/nf4_costs.py --losses             # and accuracy, a training for each row: ten minutes more
    python scripts/nf4_costs.py --bases nf4 --recipe recipes/dora_smollm2.yaml

Everything is the recipe's own (recipes/quickstart.yaml: LoRA of rank 16 on all linear layers of SmolLM2-135M) but for
its section `quantization`:

- weights: every byte of the loaded base, the packed layers' scales and tables among them.
- memory: the peak of a process that loads and trains a few steps, fresh ones for each row. From it is taken what it had
  reached when all was imported and nothing loaded, which is printed too.
- time: all bases live in one process and take each step in turn, each round beginning with another one: a shared
  machine's speed drifts. What counts is the ratio to float32 in the same round. Where others use the machine, that in
  CPU seconds is the steadier one, with OMP_NUM_THREADS=1: threads that wait for each other compute too.
- losses: the whole recipe, trained and evaluated. A base in fewer bits starts from another loss and ends at another;
  its share is what it gains over its own base, by what float32 gains over its own. Given too: from float32's base.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli import recipe
from peftcli.errors import PeftcliError
from peftcli.reporting import Silent

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from peftcli.recipe import LoadedRecipe
    from peftcli.run.opening import Base

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
BASES: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "nf4": {"type": "nf4", "double_quant": False},
    "nf4-double": {"type": "nf4", "double_quant": True},
    "int8": {"type": "int8"},
}
"""Each row's section `quantization`; the first is what the others are compared with."""

Row = dict[str, Any]


def main() -> None:
    """Prints the table, as Markdown or as JSON."""
    parser = argparse.ArgumentParser(description="Measure what a base in 4 or 8 bits costs and saves.")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="what to train (default: recipes/quickstart.yaml)")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), help="beside float32 (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="of interleaved steps (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="that memory is measured over (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=3, help="memory is the median of (default: %(default)s)")
    parser.add_argument("--losses", action="store_true", help="train the whole recipe on each base, too")
    parser.add_argument("--smoke", action="store_true", help="as little of everything as there can be: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--memory-of", choices=BASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.steps, args.processes, args.losses = 1, 1, 1, True
    try:
        if args.memory_of:
            print(json.dumps(memory(args, args.memory_of)))
            return
        rows = measure(args)
    except PeftcliError as error:
        sys.exit(f"error: {error}")
    if args.json:
        print(json.dumps({"machine": machine(), "rounds": args.rounds, "steps": args.steps, "bases": rows}, indent=2))
        return
    print(
        f"{table(rows)}\n\nTimes are ratios to float32 in the same of {args.rounds} rounds; peaks are over {args.steps}"
    )
    print(
        f"steps in {args.processes} processes, without what the imports take. Medians (least – greatest). {machine()}"
    )


def measure(args: argparse.Namespace) -> dict[str, Row]:
    """Returns what was found of each base, float32 first."""
    recipe.load(args.recipe)  # a mistake in it is said once
    names = [name for name in BASES if name in ("float32", *args.bases)]
    # Memory comes first: a process inherits the peak of the one that starts it, and this one is still small.
    rows = {name: medians([in_own_process(args, name) for _ in range(args.processes)]) for name in names}
    log("time")
    for name, found in step_times(args, names).items():
        rows[name].update(found)
    for name in names if args.losses else ():
        log(f"losses: {name}")
        rows[name].update(losses(args, name))
        rows[name].update(shares(rows[name], rows["float32"]))
    return rows


def shares(row: Row, first: Row) -> Row:
    """Returns what training gained, by what the `first` base gained: over the row's own base, and over the first one.

    The second does not count what training makes good of the loss that packing the base began with.
    """
    gained = first["base_loss"] - first["loss"]
    if gained <= 0:
        return {}
    return {
        "share": (row["base_loss"] - row["loss"]) / gained,
        "share_from_first": (first["base_loss"] - row["loss"]) / gained,
    }


def medians(runs: Sequence[Row]) -> Row:
    """Returns the median of each figure over several processes, and the least and the greatest of their peaks."""
    peaks = [run["peak_gb"] for run in runs]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]} | {
        "peaks_gb": [min(peaks), max(peaks)]
    }


def in_own_process(args: argparse.Namespace, name: str) -> Row:
    """Returns what `memory` finds in a process of its own.

    Raises:
        SystemExit: It failed; its output was shown.
    """
    log(f"memory: {name}")
    own = ["--recipe", str(args.recipe), "--steps", str(args.steps), "--memory-of", name]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, *own], env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"error: the memory of {name} could not be measured")
    found: Row = json.loads(done.stdout)
    return found


def load(args: argparse.Namespace, base: str, *changes: str) -> LoadedRecipe:
    """Returns the recipe on the base of that name, with `changes` such as `method.r=8`."""
    fixed = (f"quantization={json.dumps(BASES[base])}", "model.dtype=float32", "training.mixed_precision=no")
    return recipe.load(args.recipe, (*fixed, *changes))


def train(loaded: LoadedRecipe, reporter: Silent) -> Row:
    """Returns the manifest of a training on the CPU."""
    from peftcli.run.folder import TrainOptions
    from peftcli.run.training import train as run

    return run(loaded, TrainOptions("cpu"), reporter, lambda segments: None)


def memory(args: argparse.Namespace, base: str) -> Row:
    """Returns the bytes of the base's weights, and the peak of this process over loading and a few steps."""
    from peftcli.training.meter import peak_memory_gb

    with tempfile.TemporaryDirectory(prefix="peftcli-costs-") as folder:
        changes = (f"training.max_steps={args.steps}", "data.eval=null", "training.eval_steps=null")
        loaded = load(args, base, *changes, "training.save_steps=null", f"output_dir={folder}/run")
        import_everything(loaded)
        imported, watch = peak_memory_gb(), Watch()
        train(loaded, watch)
        since = peak_memory_gb()
    return {
        **weights(loaded),
        "imports_gb": imported,
        "loading_gb": watch.loading_gb - imported,
        "training_gb": since - imported,
        "peak_gb": max(watch.loading_gb, since) - imported,
    }


class Watch(Silent):
    """A reporter that keeps the peak of the process's memory when the first step begins, and starts a new one."""

    loading_gb = 0.0

    def begin(self, total_steps: int, first_step: int) -> None:
        """Notes the peak of everything before the loop."""
        from peftcli.training.meter import peak_memory_gb

        self.loading_gb = peak_memory_gb()
        with contextlib.suppress(OSError):  # Linux alone can forget a peak; elsewhere training's is that of both
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def import_everything(loaded: LoadedRecipe) -> None:
    """Imports what a training does, the model's own code and bitsandbytes among it, and loads nothing."""
    import accelerate  # noqa: F401

    from peftcli import models, quantization
    from peftcli.run import training  # noqa: F401
    from peftcli.run.opening import open_base
    from peftcli.training import loop  # noqa: F401

    quantization.bitsandbytes()
    models.skeleton(open_base(loaded.recipe.model).config, loaded.recipe.model.task)


def weights(loaded: LoadedRecipe) -> Row:
    """Returns the bytes of the base's weights, and the bits that one of a packed layer takes, on average."""
    from peftcli.quantization import is_quantised, num_weights

    _, model = open_model(loaded)
    found: Row = {"weights_gb": num_bytes(held(model)) / 1e9}
    packed: list[Any] = [module for module in model.modules() if is_quantised(module)]
    if packed:
        count: int = sum(num_weights(module.weight) for module in packed)
        found["bits"] = 8 * num_bytes(tensor for module in packed for tensor in of_weight(module)) / count
    return found


def open_model(loaded: LoadedRecipe) -> tuple[Base, PreTrainedModel]:
    """Returns the recipe's base, opened and loaded on the CPU."""
    import torch

    from peftcli.run.opening import load_weights, open_base

    base = open_base(loaded.recipe.model, packed=loaded.recipe.quantization)
    return base, load_weights(base, torch.device("cpu"))[0]


def held(model: Any) -> Iterator[Tensor]:
    """Yields all tensors that a model holds; some may share their bytes."""
    from peftcli.quantization import is_quantised

    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if is_quantised(module):
            yield from of_weight(module)


def of_weight(layer: Any) -> Iterator[Tensor]:
    """Yields the packed weight of a layer and all that it takes to read it."""
    import torch

    yield layer.weight
    parts = [getattr(layer.weight, "quant_state", None), getattr(layer, "state", None)]
    while parts:
        for value in vars(parts.pop() or argparse.Namespace()).values():
            if isinstance(value, torch.Tensor):
                yield value
            elif type(value).__name__ == "QuantState":  # the scales' own
                parts.append(value)


def num_bytes(tensors: Any) -> int:
    """Returns how many bytes tensors take, each counted once however many of them share it."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def step_times(args: argparse.Namespace, names: list[str]) -> dict[str, Row]:
    """Returns each base's median seconds a step, by the clock and of computing, and its ratios to the first base's."""
    steps = {name: stepper(load(args, name)) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(args.rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken = steps[name](number)
            if number:  # the first step makes the optimizer's state
                times[name].append(taken)
    first = times[names[0]]
    return {name: {**compared("", own, first, 0), **compared("cpu_", own, first, 1)} for name, own in times.items()}


def compared(prefix: str, own: Sequence[tuple[float, float]], first: Sequence[tuple[float, float]], which: int) -> Row:
    """Returns the median of `own` seconds, and of the ratios to the `first` base's, with their least and greatest."""
    ratios = [one[which] / other[which] for one, other in zip(own, first, strict=True)]
    return {
        f"{prefix}seconds": statistics.median(one[which] for one in own),
        f"{prefix}ratio": statistics.median(ratios),
        f"{prefix}ratios": [min(ratios), max(ratios)],
    }


def stepper(loaded: LoadedRecipe) -> Callable[[int], tuple[float, float]]:
    """Returns what does the recipe's optimizer step of a number on a base of its own, and says what it took.

    That is in seconds, by the clock and of all the process's threads together.
    """
    from torch.nn.utils import clip_grad_norm_

    from peftcli import inject
    from peftcli.data.sampling import StepPlan
    from peftcli.run.fitting import check_method
    from peftcli.run.opening import encode_data, make_batcher, read_data
    from peftcli.training import checks, loss, optimizers
    from peftcli.training.objectives import objective

    settings, (method, config) = loaded.recipe.training, check_method(loaded)
    base, model = open_model(loaded)
    samples = encode_data(loaded.recipe, read_data(loaded.recipe), base).train
    batcher = make_batcher(samples, base, joins=checks.joins_exactly(model))
    inject.graft(model, method, config, settings.seed)
    model.train()
    rate = settings.learning_rate or method.default_learning_rate
    optimizer = optimizers.make_optimizer(model, settings, rate, rate)
    parameters = list(optimizers.trainable_parameters(model).values())
    plan = StepPlan(len(samples), settings.micro_batch_size, 1, settings.seed)
    summed = objective(loaded.recipe.model.task)

    def step(number: int) -> tuple[float, float]:
        started, computed = time.perf_counter(), time.process_time()
        (indices,) = plan.step(number)
        batch = batcher.batch(indices)
        loss.seed_noise(settings.seed, number)
        (summed(model, batch) / batch.num_supervised).backward()
        clip_grad_norm_(parameters, settings.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started, time.process_time() - computed

    return step


def losses(args: argparse.Namespace, name: str) -> Row:
    """Returns the evaluation loss of the base, and of base and adapter after the recipe's training."""
    with tempfile.TemporaryDirectory(prefix="peftcli-costs-") as folder:
        changes = ("training.max_steps=3",) if args.smoke else ()
        at_end = ("training.eval_steps=null", "training.save_steps=null", f"output_dir={folder}/run")
        loaded = load(args, name, *changes, *at_end)
        trained = train(loaded, Silent())["result"]["eval"]["eval_loss"]
    return {"base_loss": base_loss(loaded), "loss": trained}


def base_loss(loaded: LoadedRecipe) -> float:
    """Returns the evaluation loss of the recipe's base as it is."""
    import torch

    from peftcli.evaluation.tasks import evaluator
    from peftcli.run.opening import encode_data, make_batcher, read_data
    from peftcli.training.checks import joins_exactly

    base, model = open_model(loaded)
    samples = encode_data(loaded.recipe, read_data(loaded.recipe), base).eval
    assert samples is not None
    batcher = make_batcher(samples, base, joins=joins_exactly(model))
    size, kind = loaded.recipe.training.per_device_eval_batch_size, base.meaning.kind
    found: float = evaluator(base.section.task, kind)(model, batcher, size, torch.device("cpu"))["eval_loss"]
    return found


def table(rows: dict[str, Row]) -> str:
    """Returns the rows as Markdown; columns that nothing was measured for are left out."""
    first = next(iter(rows.values()))
    columns: dict[str, Callable[[Row], str]] = {
        "weights, MB": lambda row: f"{1e3 * row['weights_gb']:.1f} ({row['weights_gb'] / first['weights_gb']:.2f})",
        "bits a packed weight": lambda row: f"{row['bits']:.3f}" if "bits" in row else "–",
        "peak of loading, MB": lambda row: f"{1e3 * row['loading_gb']:.0f}",
        "peak of training, MB": lambda row: f"{1e3 * row['training_gb']:.0f}",
        "peak, MB": lambda row: "{:.0f} ({:.0f} – {:.0f})".format(
            *(1e3 * value for value in (row["peak_gb"], *row["peaks_gb"]))
        ),
        "imports before, MB": lambda row: f"{1e3 * row['imports_gb']:.0f}",
        "time of a step": lambda row: "{:.2f} ({:.2f} – {:.2f})".format(row["ratio"], *row["ratios"]),
        "in CPU seconds": lambda row: "{:.2f} ({:.2f} – {:.2f})".format(row["cpu_ratio"], *row["cpu_ratios"]),
    }
    if "loss" in first:
        columns["loss of the base"] = lambda row: f"{row['base_loss']:.4f}"
        columns["after training"] = lambda row: f"{row['loss']:.4f}"
        columns["share"] = lambda row: f"{row['share']:.1%}" if "share" in row else "–"
        columns["from float32's base"] = lambda row: f"{row['share_from_first']:.1%}" if "share" in row else "–"
    lines = [["base", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(show(row) for show in columns.values())] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """Returns what the figures were measured on."""
    from importlib.metadata import version

    import torch

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "bitsandbytes"))
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads, {libraries}"


def log(text: str) -> None:
    """Prints progress to stderr."""
    print(f"{text} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
