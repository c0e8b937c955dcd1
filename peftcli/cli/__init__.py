"""The command line: Typer commands and rendering only. Nothing here imports torch before a command needs it."""
