"""The `peftcli` program: its commands, and how every error becomes a message and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from peftcli import __version__, processes, startup
from peftcli.cli import applying, console, reference, training
from peftcli.cli.secrets import redacted
from peftcli.errors import EXIT_BUG, EXIT_INTERRUPTED_TWICE, PeftcliError, RecipeError

app = typer.Typer(
    name="peftcli",
    help="Parameter-efficient fine-tuning from a YAML recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "train": training.train,
    "eval": applying.evaluate,
    "merge": applying.merge,
    "export": applying.export,
    "generate": applying.generate,
    "readout": applying.readout,
    "plan": training.plan,
    "validate": training.validate,
    "preview": training.preview,
    "methods": reference.methods,
    "recipes": reference.recipes,
    "schema": reference.schema,
    "env": reference.env,
}
for _name, _command in COMMANDS.items():
    app.command(name=_name)(_command)


def _print_version(value: bool) -> None:
    if value:
        console.stdout.print(f"peftcli {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> None:
    """Parameter-efficient fine-tuning from a YAML recipe."""


def main() -> NoReturn:
    """Runs the command line and exits with the code that says how it went."""
    startup.begin()
    try:
        _run()
    except PeftcliError as error:
        if "--debug" in sys.argv:
            sys.stderr.write(redacted(traceback.format_exc()))
        if processes.speaks(error, error.exit_code):
            console.print_error(error)
        _leave(error.exit_code)
    except SystemExit as ended:
        if ended.code == EXIT_INTERRUPTED_TWICE:  # Typer's end for Ctrl-C: here outside training, with nothing to save
            console.stderr.print("interrupted")
        _leave(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    except Exception:
        if "--debug" in sys.argv:
            sys.stderr.write(redacted(traceback.format_exc()))
        if processes.speaks(None, EXIT_BUG):
            console.stderr.print(f"[bold red]error:[/] this is a bug in peftcli: {console.shown(_save_traceback())}")
            console.stderr.print("\n[bold cyan]hint:[/] report it with that file, which holds the traceback")
        _leave(EXIT_BUG)
    _leave(0)


def _leave(exit_code: int) -> NoReturn:
    """Exits with `exit_code`; one process of several at once, without taking its interpreter down.

    The threads through which it talked with the others may still be there, always if it leaves in the middle of that. A
    C++ library that finds its threads alive as it is unloaded aborts the process, which would be another exit code.
    """
    place = processes.here()
    if place.launched and place.count > 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody may read it any more
                stream.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _run() -> None:
    """Runs the command line; a name that no file can have is a mistake in it, wherever that is noticed."""
    try:
        app(standalone_mode=True)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise RecipeError(f"{str(error.filename)[:60]}… is too long for a file's name") from error


def _save_traceback() -> str:
    with tempfile.NamedTemporaryFile("w", prefix="peftcli-bug-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(redacted(traceback.format_exc()))
    return f"{sys.exc_info()[1]!r}; the traceback is in {file.name}"
