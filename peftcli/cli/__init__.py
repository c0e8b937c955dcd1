"""The command line: Typer commands and rendering only.

Each command imports what it needs when it runs, so that `--help` is quick.
"""
