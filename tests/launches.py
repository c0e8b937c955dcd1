"""How tests read the command lines that start a run: as torchrun does, and as peftcli does."""

import shlex

import typer
from torch.distributed.run import get_args_parser

from peftcli.cli.main import app


def by_torchrun(arguments):
    """Returns what torchrun reads from `arguments`, which must start peftcli; peftcli's are `training_script_args`."""
    read = get_args_parser().parse_args(arguments)
    assert (read.module, read.training_script) == (True, "peftcli")
    return read


def by_shell(line):
    """Returns (variables, torchrun's arguments, peftcli's) of a line that starts a run with torchrun."""
    words = shlex.split(line)
    start = words.index("torchrun")
    read = by_torchrun(words[start + 1 :])
    return dict(word.split("=", 1) for word in words[:start]), read, read.training_script_args


def by_peftcli(arguments):
    """Returns the parameters that peftcli reads from `arguments`, which start with the command's name."""
    command = typer.main.get_command(app).commands[arguments[0]]
    return command.make_context(arguments[0], list(arguments[1:])).params
