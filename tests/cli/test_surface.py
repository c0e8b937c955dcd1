"""The command line that people's scripts rely on. A change here is a change for them, and belongs in CHANGELOG."""

import typer

from peftcli.cli.main import app

COMMANDS = {
    "train": [
        "recipe",
        "overrides",
        "--resume",
        "--overwrite",
        "--device",
        "--num-processes",
        "--nnodes",
        "--rdzv-endpoint",
        "--rdzv-id",
        "--print-launch",
        "--json",
    ],
    "eval": ["run", "--adapter", "--model", "--data", "--batch-size", "--device", "--force", "--json"],
    "merge": [
        "run",
        "--adapter",
        "--model",
        "-o",
        "--output",
        "--dtype",
        "--base",
        "--verify",
        "--overwrite",
        "--force",
        "--json",
    ],
    "export": [
        "run",
        "--to",
        "--adapter",
        "--model",
        "-o",
        "--output",
        "--rank",
        "--lossy",
        "--overwrite",
        "--force",
        "--json",
    ],
    "readout": ["run", "--adapter", "--model", "-k", "--nearest", "--force", "--json"],
    "generate": [
        "run",
        "prompts",
        "--adapter",
        "--model",
        "--prompt-file",
        "--base",
        "--max-new-tokens",
        "--device",
        "--force",
        "--json",
    ],
    "plan": ["recipe", "overrides", "--json"],
    "validate": ["recipe", "overrides", "--form-only", "--json"],
    "preview": ["recipe", "overrides", "-n", "--count", "--json"],
    "methods": ["name", "--json"],
    "recipes": ["name", "--json"],
    "schema": ["--json"],
    "env": ["--json"],
}


def names(command):
    """Returns a command's arguments by name and its options by their flags, less `--help`."""
    return [
        flag
        for parameter in command.params
        for flag in (parameter.opts if parameter.param_type_name == "option" else [parameter.name])
        if flag not in ("--help", "-h")
    ]


def test_commands_and_options():
    group = typer.main.get_command(app)
    assert {name: names(command) for name, command in group.commands.items()} == COMMANDS
    assert names(group) == ["--version", "--debug", "--install-completion", "--show-completion"]


def test_no_flag_has_a_twin_that_is_never_meant():
    """Typer would make `--no-json` of every flag."""
    group = typer.main.get_command(app)
    twins = [option.secondary_opts for command in group.commands.values() for option in command.params]
    assert not any(twins)


def test_every_command_and_option_says_what_it_is():
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert command.help, name
        for parameter in command.params:
            hidden = getattr(parameter, "hidden", False)
            assert hidden or getattr(parameter, "help", None), f"{name} {parameter.name}"
