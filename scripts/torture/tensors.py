"""Mutants of safetensors files: each is refused, or holds what its header says, and no interpreter ends over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save

from peftcli import headers
from peftcli.checkpoint.adapter import read_tensors
from peftcli.errors import ModelError
from peftcli.merge import stored
from scripts.torture.fuzzing import Fuzzing
from scripts.torture.mutations import bytes_mutant, value_mutant
from scripts.torture.outcome import Order, Outcome

UNIT, SHORT, LONG = "mutants", 4000, 200_000
DTYPES = ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "F16", "BF16", "I32", "F32", "F64", "C64", "X", "")
NAMES = ("../../x", "/etc/passwd", "", "\x00", "a" * 3000, "__metadata__", "__class__", "\u202e", "a.weight")


def run(order: Order) -> Outcome:
    """Reads `order.count` mutants as adapters are read, and as a merge reads its base."""
    outcome = Outcome("mutants of a safetensors file, each refused or read as its header says")
    random, fuzzing = order.random("tensors"), Fuzzing("tensors", outcome, order.count)
    seed, path = seed_file(), order.folder / "x.safetensors"
    for _ in range(order.count):
        kind = random.choice(tuple(KINDS))
        data = KINDS[kind](seed, random)
        path.write_bytes(data)
        fuzzing.ask(kind, data, partial(is_read, path))
    return fuzzing.finish()


def seed_file() -> bytes:
    """Returns a small file with several dtypes, an empty tensor and metadata."""
    torch.manual_seed(0)
    tensors = {
        "a.weight": torch.randn(3, 4),
        "b.weight": torch.randn(4, dtype=torch.float16),
        "c.weight": torch.arange(6, dtype=torch.uint8),
        "d.weight": torch.zeros(0, 2),
        "e.weight": torch.randn(2, dtype=torch.bfloat16),
    }
    return bytes(save(tensors, {"format": "pt"}))


def is_read(path: Path) -> bool:
    """Returns whether a file is read, by both readers alike; raises where anything but a refusal happens."""
    try:
        whole = read_tensors(path)
    except ModelError as error:
        str(error).encode()
        whole = None
    try:
        entries = stored.entries(path)
    except ModelError:
        entries = None
    can_only_be_copied = entries is not None and any(one.dtype not in stored.DTYPES for one in entries.values())
    assert (whole is None) == (entries is None) or can_only_be_copied, "one reader takes what the other refuses"
    if whole is None or entries is None:
        return entries is not None
    assert whole.keys() == entries.keys()
    for key, entry in entries.items():
        if entry.dtype in stored.DTYPES:
            assert entry.shape == tuple(whole[key].shape)
            ours, theirs = entry.read(), whole[key]
            assert ours.dtype == theirs.dtype
            assert not ours.numel() or bytes(stored.bytes_of(ours)) == bytes(stored.bytes_of(theirs.contiguous()))
    facts, _ = headers.read(path)
    assert facts.keys() == whole.keys()
    return True


def _header_mutant(data: bytes, random: Random) -> bytes:
    """Returns the file with another header of the right length: facts, dtypes, shapes, places and names changed."""
    length = int.from_bytes(data[:8], "little")
    header: Any = json.loads(data[8 : 8 + length])
    if random.random() < 0.2:
        return with_header(
            json.dumps(value_mutant(header, random)).encode("utf-8", "surrogatepass"), data[8 + length :]
        )
    for _ in range(random.choice((1, 1, 2, 3))):
        name = random.choice([key for key, value in header.items() if "dtype" in value])
        facts = header[name]
        match random.randrange(6):
            case 0:
                header = {key: facts if key == name else value for key, value in reversed(header.items())}
            case 1:
                header[name] = {**facts, "dtype": random.choice(DTYPES)}
            case 2:
                header[name] = {
                    **facts,
                    "shape": random.choice(([], [0], [-1], [2**62, 4], [12], [1] * 300, [1.5], "3")),
                }
            case 3:
                offsets = [value + random.choice((-8, -1, 1, 8, 2**40)) for value in facts["data_offsets"]]
                header[name] = {**facts, "data_offsets": offsets}
            case 4:
                header[random.choice(NAMES)] = facts
            case _:
                header[random.choice(NAMES)] = header.pop(name)
    return with_header(json.dumps(header).encode("utf-8", "surrogatepass"), data[8 + length :])


def _text_mutant(data: bytes, random: Random) -> bytes:
    """Returns the file with its header's text changed, and its length told rightly."""
    length = int.from_bytes(data[:8], "little")
    return with_header(bytes_mutant(data[8 : 8 + length], random), data[8 + length :])


def with_header(header: bytes, rest: bytes) -> bytes:
    """Returns a file with this header and these bytes of tensors."""
    return len(header).to_bytes(8, "little") + header + rest


KINDS: dict[str, Callable[[bytes, Random], bytes]] = {
    "bytes": bytes_mutant,
    "header": _header_mutant,
    "header's text": _text_mutant,
}
