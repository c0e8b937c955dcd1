"""From rows of text to token ids and masks: peftcli against the preparation of TRL's SFTTrainer.

Each round takes a fresh process for each tool (`tokenization_worker.py`), which encodes the rows first without a cache
and then from its own. peftcli's time begins with the file; TRL's with the rows that `datasets` has read already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench import timing
from scripts.bench.runs import REPOSITORY, TRAIN_FILE
from scripts.bench.table import Cell, Options, Table

WORKER = Path(__file__).with_name("tokenization_worker.py")
TRL_PYTHON = REPOSITORY / ".venv-bench/bin/python"
KINDS = {"prompt-completion": "Rows of prompt and completion", "chat": "Chats of one turn"}


def run(options: Options) -> list[Table]:
    """Returns rows a second of both tools, without and with their caches."""
    model = options.model.expanduser()
    if not (options.smoke or model.is_dir()):
        sys.exit("error: the demo model is missing\n\nhint: make model")
    with tempfile.TemporaryDirectory(prefix="peftcli-bench-") as name:
        folder = Path(name)
        tokenizer = small_tokenizer(folder / "tokenizer") if options.smoke else model
        return [table(kind, folder, tokenizer, options) for kind in KINDS]


def table(kind: str, folder: Path, tokenizer: Path, options: Options) -> Table:
    """Returns the figures for one kind of rows."""
    num_rows, rounds = (64, 1) if options.smoke else (8000, options.rounds)
    write_rows(folder, kind, num_rows)
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        tools = contestants(smoke=options.smoke)
        turn = number % len(tools)
        for tool, python in [*tools.items()][turn:] + [*tools.items()][:turn]:
            timing.log(f"{kind}: round {number + 1} of {rounds}: {tool}")
            command = [python, str(WORKER), tool, str(folder / f"{kind}-{tool.split()[0]}.jsonl"), str(tokenizer)]
            for label, one in measured(command, options.threads).items():
                found.setdefault(label, []).append(one)
    first = next(iter(found.values()))
    rows: dict[str, dict[str, Cell]] = {
        label: {
            "rows a second": num_rows / median(one["seconds"] for one in each),
            "ratio of times": median(own["seconds"] / to["seconds"] for own, to in zip(each, first, strict=True)),
            "tokens": each[0]["tokens"],
            "learned": each[0]["learned"],
        }
        for label, each in found.items()
    }
    whose = "a small tokenizer" if options.smoke else f"the tokenizer of {tokenizer.name}"
    notes = (
        f"{num_rows:,} rows, {whose}; medians of {rounds} rounds. Reading the file is in peftcli's time and not in "
        "TRL's.",
    )
    return Table(f"{KINDS[kind]} to tokens", rows, notes)


def contestants(*, smoke: bool) -> dict[str, str]:
    """Returns the Python that each tool runs in."""
    tools = {"peftcli": sys.executable}
    if smoke:
        return tools
    if TRL_PYTHON.exists():
        return tools | {"TRL": str(TRL_PYTHON), "TRL with a process for each core": str(TRL_PYTHON)}
    timing.log(f"{TRL_PYTHON} is missing: measuring peftcli alone (make bench installs it)")
    return tools


def measured(command: list[str], threads: int) -> dict[str, dict[str, Any]]:
    """Returns what a worker found, by label. Its caches are in a folder of its own, so that it begins without any."""
    with tempfile.TemporaryDirectory(prefix="peftcli-bench-") as caches:
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": str(threads),
            "RAYON_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": f"{caches}/datasets",
            "XDG_CACHE_HOME": caches,
            "TRL_TELEMETRY": "0",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_rows(folder: Path, kind: str, num_rows: int) -> None:
    """Writes the same rows in the form that each tool takes."""
    with (folder / f"{kind}-peftcli.jsonl").open("w") as ours, (folder / f"{kind}-TRL.jsonl").open("w") as theirs:
        for prompt, completion in texts(num_rows):
            row: dict[str, Any] = {"prompt": prompt, "completion": completion}
            if kind == "chat":
                question, answer = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
                ours.write(json.dumps({"messages": [question, answer]}) + "\n")
                row = {"prompt": [question], "completion": [answer]}  # TRL learns the answer alone in this form
            else:
                ours.write(json.dumps(row) + "\n")
            theirs.write(json.dumps(row) + "\n")


def texts(num_rows: int) -> Iterator[tuple[str, str]]:
    """Yields prompts and completions, no two alike, of two definitions of the demo data each."""
    rows = [json.loads(line) for line in TRAIN_FILE.read_text(encoding="utf-8").splitlines()]
    for index in range(num_rows):
        first, second = rows[index % len(rows)], rows[(7 * index + index // len(rows)) % len(rows)]
        yield f"{index}. {first['prompt']}", f"{first['completion']}; {second['completion']}"


def small_tokenizer(folder: Path) -> Path:
    """Makes a tokenizer with a chat template in `folder`, which is returned."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((" ".join(pair) for pair in texts(100)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder
