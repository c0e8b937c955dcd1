"""The command of the benchmarks: `python -m scripts.bench [PART …]`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.bench import timing
from scripts.bench.table import Options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scripts.bench.table import Table

PARTS = (
    *("end_to_end", "merging", "startup", "tokenization"),
    *("loss", "methods", "breakdown", "overhead", "memory", "packing", "execution", "scaling"),
)
"""The parts, in the order in which they run: those that start processes first, while this one is still small."""
BY_ROW = ("execution", "scaling")
"""The parts that can measure some of their rows."""
MODEL = Path("~/.cache/peftcli/SmolLM2-135M-Instruct")
"""Where `make model` puts the demo model."""


def main() -> None:
    """Runs the parts asked for and prints their tables."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description="Measure what peftcli costs.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what to measure: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    parser.add_argument("--model", type=Path, default=MODEL, help="what whole runs train (default: %(default)s)")
    parser.add_argument(
        "--only", type=_regex, default="", metavar="REGEX", help=f"measure these rows alone, of {' and '.join(BY_ROW)}"
    )
    parser.add_argument("--smoke", action="store_true", help="as little of everything as there can be")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", type=Path, help="write the tables into this file, too")
    args = parser.parse_args()
    if args.only and not set(args.parts or PARTS) <= set(BY_ROW):
        parser.error(f"--only chooses rows of {' and '.join(BY_ROW)}: name one of them alone")
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before anything imports torch
    os.environ["HF_HUB_OFFLINE"] = "1"
    rounds = 1 if args.smoke else args.rounds
    options = Options(rounds, args.smoke, args.threads, args.model.expanduser(), args.only)
    tables: dict[str, list[Table]] = {}
    for name in args.parts or PARTS:
        started = time.perf_counter()
        timing.log(f"part {name}")
        tables[name] = importlib.import_module(f"scripts.bench.{name}").run(options)
        if args.only and not any(table.rows for table in tables[name]):
            sys.exit(f"error: part {name} has no row in whose name {args.only!r} is found")
        timing.log(f"part {name} took {time.perf_counter() - started:.0f} s")
        if not args.json:
            print("\n\n".join(table.text() for table in tables[name]), end="\n\n", flush=True)
    if args.json:
        found = {
            name: [{"title": one.title, "rows": one.rows, "notes": list(one.notes)} for one in part]
            for name, part in tables.items()
        }
        print(json.dumps({**facts(args.threads), "parts": found}, indent=2))
    if args.markdown:
        args.markdown.write_text(markdown(args.threads, tables.values()), encoding="utf-8")


def _regex(text: str) -> str:
    """Returns `text`, which argparse refuses where it is no regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def facts(threads: int) -> dict[str, str | int]:
    """Returns on what and when it was measured."""
    names = ("torch", "transformers", "peft", "accelerate")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "threads": threads,
        "versions": ", ".join(f"{name} {version(name)}" for name in names),
    }


def processor() -> str:
    """Returns the processor's name, as far as the system tells it."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def markdown(threads: int, parts: Iterable[list[Table]]) -> str:
    """Returns all tables as one Markdown text that begins with date and machine."""
    found = facts(threads)
    first = f"{found['date']}, {found['machine']}, {threads} threads, {found['versions']}."
    tables = [table.markdown() for part in parts for table in part]
    return "\n\n".join([first, *tables]) + "\n"


if __name__ == "__main__":
    main()
