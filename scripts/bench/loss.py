"""The loss of a language model's head: all supervised rows at once against chunks of them.

Forward and backward pass of head and cross-entropy alone, float32, the head frozen. Times are taken in turns in one
process; memory is what a process of its own holds, at most, beside the head, the hidden states and their gradient.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING

from scripts.bench import timing
from scripts.bench.table import Cell, Options, Table

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = {
    "90 tokens × 49k (one chunk)": (90, 49_152, 576),
    "1,024 tokens × 49k": (1024, 49_152, 576),
    "512 tokens × 128k": (512, 128_256, 512),
    "4,096 tokens × 128k": (4096, 128_256, 512),
}
"""Supervised tokens N, vocabulary V, hidden size D."""
SMOKE = {"64 tokens × 1k": (64, 1000, 16)}
WAYS = ("plain", "chunked")
MOST_LOGITS = 200_000_000
"""Of cases with more logits N × V the chunks alone are measured: the other way holds three tensors of that size."""


def run(options: Options) -> list[Table]:
    """Returns seconds and peaks of both ways for every case."""
    cases = SMOKE if options.smoke else CASES
    rows: dict[str, dict[str, Cell]] = {}
    for name, sizes in cases.items():
        rows[name] = {f"{way} MB": peak(way, sizes, options.threads) for way in ways_for(sizes)}
    for name, sizes in cases.items():
        ways, row = ways_for(sizes), rows[name]
        seconds = timing.interleaved({way: prepared(way, *sizes) for way in ways}, options.rounds)
        row |= {f"{way} seconds": statistics.median(taken) for way, taken in seconds.items()}
        row["ratio"] = timing.ratios(seconds, "plain")["chunked"] if "plain" in ways else None
    notes = (
        f"Forward and backward pass, float32, the head frozen; medians of {options.rounds} rounds. MB: what is held "
        "beside the head, the hidden states and their gradient, at most. A dash: not measured, for its size.",
    )
    return [Table("Head and cross-entropy: all rows at once, and in chunks", rows, notes)]


def ways_for(sizes: tuple[int, int, int]) -> tuple[str, ...]:
    """Returns how a case is measured."""
    return WAYS if sizes[0] * sizes[1] <= MOST_LOGITS else WAYS[1:]


def prepared(way: str, num_tokens: int, vocabulary: int, width: int) -> Callable[[], None]:
    """Returns one forward and backward pass, to be repeated."""
    import torch
    from torch import nn

    from peftcli.ops.cross_entropy import Work, chunked_cross_entropy, chunked_cross_entropy_reference, rows_for

    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(num_tokens, width, requires_grad=True)
    hidden.grad = torch.zeros_like(hidden)
    work = Work(torch.randint(vocabulary, (num_tokens,)), head, rows_for(vocabulary))

    def step() -> None:
        if way == "chunked":
            chunked_cross_entropy(work, hidden)[0].backward()
        else:
            chunked_cross_entropy_reference(work, hidden).backward()

    return step


def peak(way: str, sizes: tuple[int, int, int], threads: int) -> float:
    """Returns what `measure` finds in a process of its own, in MB."""
    command = [sys.executable, "-m", "scripts.bench.loss", way, *map(str, sizes), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout))


def measure(way: str, num_tokens: int, vocabulary: int, width: int, threads: int) -> float:
    """Returns by how much, in MB, one pass raises the most memory that this process has held."""
    import torch

    from peftcli.training.meter import peak_host_bytes

    torch.set_num_threads(threads)
    prepared(way, 2, 100, 8)()  # whatever a first pass loads
    step = prepared(way, num_tokens, vocabulary, width)
    before = peak_host_bytes()
    step()
    return (peak_host_bytes() - before) / 1e6


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
