"""The command of the torture: `python -m scripts.torture [PART …]`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench.table import Table
from scripts.torture.outcome import Order

if TYPE_CHECKING:
    from scripts.torture.outcome import Outcome

CRASHES = ("kills", "faults", "corruption", "rotation", "merges")
FUZZERS = ("recipes", "rows", "adapters", "tensors")
PARTS = (*CRASHES, *FUZZERS)
"""The parts. Each is a module with `run(order) -> Outcome` and with `UNIT`, `SHORT` and `LONG`: what it counts, and how
many of that a test and a night do."""


def main() -> None:
    """Runs the parts asked for, prints what each found, and exits 1 where something did not survive."""
    parser = argparse.ArgumentParser(prog="python -m scripts.torture", description="Break runs and count what is lost.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--count", type=int, help="how many kills, corruptions … of each part (default: as in a test)")
    parser.add_argument("--long", action="store_true", help="as many as a night has room for")
    parser.add_argument("--seed", type=int, default=0, help="what random choices follow from (default: %(default)s)")
    parser.add_argument("--case", action="append", default=[], help="only this case of a part that has some")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    found: dict[str, Any] = {}
    for name in args.parts or PARTS:
        part = importlib.import_module(f"scripts.torture.{name}")
        count = args.count or (part.LONG if args.long else part.SHORT)
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="torture-") as folder:
            started = time.perf_counter()
            outcome: Outcome = part.run(Order(count, Path(folder), args.seed, tuple(args.case)))
        seconds = round(time.perf_counter() - started, 1)
        found[name] = {"count": count, "unit": part.UNIT, "seconds": seconds, **vars(outcome)}
        if not args.json:
            print(_text(outcome, f"{count:,} {part.UNIT} asked for, {seconds} s"), end="\n\n", flush=True)
    if args.json:
        print(json.dumps(found, indent=2))
    sys.exit(int(any(part["failures"] for part in found.values())))


def _text(outcome: Outcome, summary: str) -> str:
    failures = [f"FAILED: {failure}" for failure in outcome.failures]
    return Table(outcome.title, outcome.rows, [*failures, f"{summary}, {len(failures)} failures"]).text()


if __name__ == "__main__":
    main()
