"""Commands on a run's folder or an adapter's: eval, merge, export, generate, readout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.metrics import metrics_table, metrics_title
from peftcli.cli.progress import make_reporter
from peftcli.cli.training import AsJson, Device
from peftcli.errors import DataError, RecipeError

if TYPE_CHECKING:
    from peftcli.merge import Agreement
    from peftcli.reporting import Reporter
    from peftcli.run.merging import Merged
    from peftcli.run.subject import Subject

Run = Annotated[Path | None, typer.Argument(help="A run's folder: the output_dir of train.", show_default=False)]
Adapter = Annotated[
    Path | None,
    typer.Option(help="An adapter's folder, peftcli's or PEFT's, in place of the run's.", show_default=False),
]
Model = Annotated[str | None, typer.Option(help="The base model, where it is not where the adapter says.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Apply an adapter that has changed since it was written, or was trained on another base."
    ),
]


def evaluate(
    run: Run = None,
    adapter: Adapter = None,
    model: Model = None,
    data: Annotated[Path | None, typer.Option(help="A file to evaluate on, in place of the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples a pass. Left out: the recipe's.")] = None,
    device: Device = None,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Measure base, adapter and merged model side by side on the same data."""
    from peftcli.run.applying import evaluate as run_evaluate

    subject, reporter = _opened(run, adapter, model, force=force)
    results = run_evaluate(subject, data, batch_size, device, reporter)
    if json:
        console.print_json(results)
    else:
        console.print_table(*metrics_table(results), title=metrics_title(next(iter(results.values()))))


def merge(
    run: Run = None,
    adapter: Adapter = None,
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to. Left out: `merged` in the run's folder.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Left out: as the base is stored.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="For a quantised base: dequantised, what was trained against, or original; measures both. "
            "Left out: dequantised."
        ),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            help="What is compared: layers, each as it is merged, in the memory of one; or whole models' logits, too. "
            "Left out: layers, and for a quantised base logits."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Merge the adapter into the base model's weights, and prove that the result is the same model."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise RecipeError(f'--dtype: "{dtype}" is none of float32, bfloat16, float16')
    if base not in (None, "dequantised", "original"):
        raise RecipeError(f'--base: "{base}" is none of dequantised, original')
    if verify not in (None, "layers", "logits"):
        raise RecipeError(f'--verify: "{verify}" is none of layers, logits')
    if base is not None and verify == "layers":
        raise RecipeError("--verify: with --base whole models are measured", hint="leave --verify out")
    from peftcli.run import MERGED_FOLDER
    from peftcli.run.merging import merge as run_merge
    from peftcli.run.merging import merge_onto

    subject, reporter = _opened(run, adapter, model, force=force)
    target = output or (run or subject.adapter.folder) / MERGED_FOLDER
    if base is not None:
        both, count = merge_onto(subject, target, dtype, base, reporter, overwrite=overwrite)
        facts = {**vars(both[base]), "base": base, "compared": {name: vars(one) for name, one in both.items()}}
        said = [_agreement(f"onto the {name} base, compared", one) for name, one in both.items()]
    else:
        done = run_merge(subject, target, dtype, reporter, overwrite=overwrite, verify=verify)
        count, (facts, said) = done.count, _proven(done)
    if json:
        console.print_json({"folder": str(target), "merged_weights": count, **facts})
        return
    console.stdout.print(f"merged {count} weights into {console.shown(str(target))}")
    for line in said:
        console.stdout.print(line)


def _proven(done: Merged) -> tuple[dict[str, Any], list[str]]:
    """Returns what was found of a merge, for scripts and in sentences."""
    facts: dict[str, Any] = {"layers": done.layers, "max_layer_difference": done.layer_difference}
    difference = f"{done.layer_difference:.1e} of a layer's largest output"
    said = [f"verified {done.layers} layers: largest difference {difference}"]
    if done.agreement is not None:
        facts |= vars(done.agreement)
        said.append(_agreement("verified", done.agreement))
    return facts, said


def export(
    run: Run = None,
    to: Annotated[str, typer.Option(help="The format to write: lora.")] = "lora",
    adapter: Adapter = None,
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to. Left out: `lora` in the run's folder.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="For what is not exactly a LoRA: the rank of the nearest one.")
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="For updates that differ from token to token: write their mean.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Write the adapter as a LoRA, which PEFT, vLLM and llama.cpp can serve, and measure how near it is."""
    if to != "lora":
        raise RecipeError(f'--to: "{to}" is not a format that adapters are exported to', hint="lora")
    from dataclasses import asdict

    from peftcli.run import EXPORT_FOLDER
    from peftcli.run.exporting import export_as_lora

    subject, reporter = _opened(run, adapter, model, force=force)
    target = output or (run or subject.adapter.folder) / EXPORT_FOLDER
    done = export_as_lora(subject, target, rank, reporter, lossy=lossy, overwrite=overwrite)
    if json:
        console.print_json({"folder": str(target), **asdict(done)})
        return
    kind = "exactly" if done.exact else "nearly"
    console.stdout.print(
        f"wrote {console.shown(str(target))}: {kind} the adapter, as a LoRA on {done.modules} modules of rank up to "
        f"{done.largest_rank}"
    )
    if done.update_error:
        console.stdout.print(f"its updates are off by up to {100 * done.update_error:.1f} % (Frobenius norm)")
    console.stdout.print(_agreement("verified" if done.exact else "compared", done.agreement))


def _opened(run: Path | None, adapter: Path | None, model: str | None, *, force: bool) -> tuple[Subject, Reporter]:
    """Returns the subject that the command line names, and where progress goes; says what was not verified of it."""
    from peftcli.run.subject import open_subject

    subject, reporter = open_subject(run, adapter, model, force=force), make_reporter()
    for remark in subject.remarks:
        reporter.note(remark)
    return subject, reporter


def _agreement(verb: str, found: Agreement) -> str:
    """Returns how near two models are, in a sentence."""
    return (
        f"{verb} on {found.positions} positions: largest difference {found.max_difference:.1e} of the largest "
        f"logit, same choice at {100 * found.same_choice:.1f} %, mean divergence {found.mean_divergence:.1e} nats"
    )


def readout(
    run: Run = None,
    adapter: Adapter = None,
    model: Model = None,
    nearest: Annotated[int, typer.Option("-k", "--nearest", min=1, help="How many tokens to show for each.")] = 5,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Show the real tokens nearest to each virtual token of a trained prompt."""
    from peftcli.run.applying import readout as run_readout

    subject, reporter = _opened(run, adapter, model, force=force)
    found = run_readout(subject, nearest, reporter)
    if json:
        console.print_json(found)
        return
    rows = [
        [
            str(one["prompt"]),
            str(one["position"]),
            "  ".join(f"{token!r} {distance:.3f}" for token, distance in one["nearest"]),
        ]
        for one in found
    ]
    console.print_table(["prompt", "position", "nearest tokens, cosine distance"], rows)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # too long for a name: it is a prompt
        return False


def generate(
    run: Run = None,
    prompts: Annotated[list[str] | None, typer.Argument(help="What to answer.", show_default=False)] = None,
    adapter: Adapter = None,
    model: Model = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with a prompt on each line.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Show the base model's answer beside the adapter's.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    device: Device = None,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Answer prompts, put to the model as in training."""
    wanted = list(prompts or [])
    if run is not None and adapter is not None and not _is_folder(run):
        wanted.insert(0, str(run))  # with --adapter the first word may be a prompt
        run = None
    wanted = [text.replace("\\n", "\n") for text in wanted] + _lines(prompt_file)
    if not wanted:
        raise RecipeError("there is no prompt", hint="write one after the run's folder, or name a --prompt-file")
    from peftcli.run.applying import generate as run_generate

    changes: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    subject, reporter = _opened(run, adapter, model, force=force)
    answers = []
    for answer in run_generate(subject, wanted, changes, device, reporter, with_base=base):
        answers.append(answer)
        if not json:
            _print_answer(answer)
    if json:
        console.print_json(answers)


def _print_answer(answer: dict[str, str]) -> None:
    width = max(len(name) for name in answer)
    for name, text in answer.items():
        lines = text.strip().splitlines() or ["(nothing)"]
        console.stdout.print(f"[bold]{name.ljust(width)}[/]  ", end="")
        console.stdout.print(("\n" + " " * (width + 2)).join(lines), markup=False)
    console.stdout.print()


def _lines(path: Path | None) -> list[str]:
    """Returns the prompts in a file, one a line; blank lines are skipped."""
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt-file: {path} cannot be read: {error}") from error
    return [line.replace("\\n", "\n") for line in text.splitlines() if line.strip()]
