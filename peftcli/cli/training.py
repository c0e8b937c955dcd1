"""Commands on a recipe: train, plan, validate, preview."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcli import processes
from peftcli.cli import console
from peftcli.cli.progress import make_reporter
from peftcli.errors import EXIT_INTERRUPTED_TWICE, RecipeError

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Fields to override, such as method.r=8.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps … Left out: the best there is.")]


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that output_dir holds.")] = False,
    device: Device = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on each machine. Left out: the recipe's, or one a GPU.")
    ] = None,
    nnodes: Annotated[int, typer.Option(min=1, help="Machines, on each of which the same command is started.")] = 1,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the machines meet: the first one.")
    ] = None,
    rdzv_id: Annotated[str | None, typer.Option(help="Tells this run from others that meet there.")] = None,
    print_launch: Annotated[
        bool, typer.Option("--print-launch", help="Print the torchrun line for each machine, and do nothing.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Train an adapter as a recipe says, on every GPU of this machine or on several machines."""
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other", hint="keep the one that is meant")
    from peftcli.recipe import load
    from peftcli.run import launching

    counted = [] if num_processes is None else [f"distributed.num_processes={num_processes}"]
    loaded = load(recipe, [*(overrides or []), *counted])
    launch = launching.plan(loaded.recipe.distributed, device, nnodes, rdzv_endpoint, rdzv_id)
    if print_launch:
        typer.echo(launching.line(launch, _worker_arguments()))
        return
    if launch.is_needed:
        code = launching.start(launch, sys.argv[1:])
        if code > 128 and code != EXIT_INTERRUPTED_TWICE:  # outside training, with nothing to save
            console.stderr.print(f"ended by {signal.Signals(code - 128).name}")
        raise typer.Exit(code)
    from peftcli.run.folder import TrainOptions
    from peftcli.run.training import train as run_train

    facts = run_train(
        loaded,
        TrainOptions(device, resume, overwrite),
        make_reporter(),
        lambda segments: console.print_sample(segments, "the first training sample"),
    )
    processes.say_done()
    if not facts:  # another process speaks for the run
        return
    if json:
        console.print_json(facts)
        return
    folder, result = console.shown(str(loaded.recipe.output_dir)), facts["result"]
    evaluated = f", evaluation loss {result['eval']['eval_loss']:.4f}" if result["eval"] else ""
    console.stderr.print(f"done: {result['steps']} steps in {result['seconds']:.0f} s{evaluated}; adapter in {folder}")
    writes = f" · peftcli generate {folder} PROMPT" if loaded.recipe.model.task.endswith("-lm") else ""
    console.stderr.print(f"next: peftcli eval {folder} · peftcli merge {folder}{writes}")


LAUNCH_OPTIONS = ("--nnodes", "--rdzv-endpoint", "--rdzv-id")


def _worker_arguments() -> list[str]:
    """Returns the command line less what is for the launcher alone."""
    kept, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word.partition("=")[0] not in (*LAUNCH_OPTIONS, "--print-launch"):
            kept.append(word)
        skip = not skip and word in LAUNCH_OPTIONS
    return kept


def plan(recipe: RecipePath, overrides: Overrides = None, json: AsJson = False) -> None:
    """Count what a recipe would train, from the model's configuration alone: no weights, no data."""
    from peftcli.recipe import load

    loaded = load(recipe, overrides or [])
    from peftcli.run.planning import plan as run_plan

    facts = run_plan(loaded, make_reporter())
    if json:
        console.print_json(facts)
        return
    rows = [[one["modules"], f"{one['count']:,}", one["shape"], f"{one['params']:,}"] for one in facts["modules"]]
    console.print_table(
        ["trained", "count", "shape", "parameters"], rows, title=f"{facts['method']} on {facts['model']}"
    )
    console.stdout.print()
    console.print_table(["", "parameters"], _totals(facts))


def _totals(facts: dict[str, Any]) -> list[list[str]]:
    """Returns the rows that sum a plan up; those of parts that the model does not have are left out."""
    trainable, percent = facts["trainable_params"], facts["trainable_percent"]
    rows = [["trained", f"{trainable:,} ({percent:.4f} % of all)"]]
    for key, name in (("head_params", "in the task's head"), ("router_params", "in routers")):
        if facts[key]:
            rows += [[f"  {name}", f"{facts[key]:,}"], [f"  less those {name}", f"{trainable - facts[key]:,}"]]
    rows += [["base model", f"{facts['base_params']:,}"], ["all", f"{facts['total_params']:,}"]]
    sizes = {
        "adapter on disk": "adapter_bytes",
        "base weights in memory": "base_bytes",
        "what trains, gradients, moments": "training_bytes",
    }
    return [*rows, *([name, f"{facts[key] / 1e6:,.2f} MB"] for name, key in sizes.items())]


def validate(
    recipe: RecipePath,
    overrides: Overrides = None,
    form_only: Annotated[
        bool, typer.Option("--form-only", help="Check the recipe alone: no model, no data, in under a second.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Check a recipe, its data and its modules without loading weights."""
    from peftcli.recipe import load

    loaded = load(recipe, overrides or [])
    found: dict[str, object] = {"recipe": str(recipe), "method": loaded.recipe.method["type"]}
    if not form_only:
        from peftcli.run.inspecting import validate as run_validate

        found = run_validate(loaded, make_reporter())
    if json:
        console.print_json(found)
    else:
        facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items() if name != "recipe")
        console.stdout.print(console.shown(f"{recipe} is valid: {facts}"))


def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many samples to show.")] = 3,
    json: AsJson = False,
) -> None:
    """Show samples as training will see them, with what is learned marked."""
    from peftcli.recipe import load

    loaded = load(recipe, overrides or [])
    from peftcli.run.inspecting import preview as run_preview

    samples, lines = run_preview(loaded, make_reporter(), count)
    if json:
        shown = [[{"text": part.text, "supervised": part.supervised} for part in sample] for sample in samples]
        console.print_json({"samples": shown, "report": lines})
        return
    for line in lines:
        console.stdout.print(line)
    for number, sample in enumerate(samples, start=1):
        console.print_sample(sample, f"sample {number}", to=console.stdout)
