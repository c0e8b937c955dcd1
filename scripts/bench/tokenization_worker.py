"""One process of the part `tokenization`: TOOL FILE TOKENIZER. Prints what it measured as JSON.

Imports nothing of peftcli for TRL, which lives in an environment of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LENGTH = 512
WARM_UP_ROWS = 10


def main(tool: str, file: str, tokenizer_folder: str) -> None:
    """Measures one tool and prints seconds, tokens and supervised tokens of each of its ways."""
    with _collector_put_off() if tool == "peftcli" else contextlib.nullcontext():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    with tempfile.TemporaryDirectory(prefix="peftcli-bench-") as folder:
        warm_up = Path(folder) / "warm-up.jsonl"
        warm_up.write_text("".join(Path(file).read_text().splitlines(keepends=True)[:WARM_UP_ROWS]))
        measure = peftcli if tool == "peftcli" else trl
        print(json.dumps(measure(tool, str(warm_up), file, tokenizer, folder)))


@contextlib.contextmanager
def _collector_put_off() -> Iterator[None]:
    """Keeps the garbage collector from what is made while entered, as `peftcli train` does until its model is open."""
    from peftcli import startup

    startup.begin()
    yield
    startup.done()


def peftcli(tool: str, warm_up: str, file: str, tokenizer: Any, _: str) -> dict[str, dict[str, Any]]:
    """Returns what peftcli takes from the file to the encoded samples: anew, and when it has them in its cache."""
    from peftcli.data import prepare
    from peftcli.recipe.schema import DataSection

    def once(train: str, *, cache: bool) -> dict[str, Any]:
        section = DataSection.model_validate({"train": train, "max_length": MAX_LENGTH, "cache": cache})
        started = time.perf_counter()
        found = prepare(section, tokenizer, vocab_size=len(tokenizer), max_positions=None, seed=0)
        seconds = time.perf_counter() - started
        report: Any = found.train_report
        return {"seconds": seconds, "tokens": report.tokens, "learned": report.supervised}

    once(warm_up, cache=True)
    anew = once(file, cache=False)
    once(file, cache=True)
    return {tool: anew, f"{tool}, from its cache": once(file, cache=True)}


def trl(tool: str, warm_up: str, file: str, tokenizer: Any, folder: str) -> dict[str, dict[str, Any]]:
    """Returns what the SFTTrainer's preparation takes from rows that are read: anew, and from the cache of datasets."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    datasets.disable_progress_bars()
    seconds = []

    class Timed(SFTTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            found = super()._prepare_dataset(*args, **kwargs)
            seconds.append(time.perf_counter() - started)
            return found

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    config = SFTConfig(
        output_dir=f"{folder}/out",
        max_length=MAX_LENGTH,
        use_cpu=True,
        bf16=False,
        report_to="none",
        dataset_num_proc=os.cpu_count() if tool != "TRL" else None,
    )

    def once(train: str) -> dict[str, Any]:
        rows = datasets.load_dataset("json", data_files=train, split="train")
        trainer = Timed(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        labels = trainer.train_dataset["labels"]
        learned = sum(label != -100 for one in labels for label in one)
        return {"seconds": seconds[-1], "tokens": sum(map(len, labels)), "learned": learned}

    once(warm_up)
    return {tool: once(file), f"{tool}, from its cache": once(file)}


if __name__ == "__main__":
    main(*sys.argv[1:])
