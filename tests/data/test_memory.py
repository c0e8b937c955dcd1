"""Long data: what a process holds of it does not grow with the file."""

import json
import subprocess
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"word-of-some-length-{index}" for index in range(300)]
SLACK_MB = 8
"""Freed memory that the C library keeps; the 24 bytes a line that `Lines` holds come to 0.7 MB at 60 MB."""

WORKER = """
import sys, threading, time
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from peftcli.data import prepare
from peftcli.recipe.schema import DataSection

peak, done = 0, threading.Event()

def watch():  # of the process's own memory: pages of mapped files go whenever others need the room
    global peak
    while not done.wait(0.002):
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.partition("RssAnon:")[2].split()[0]))

tokenizer = PreTrainedTokenizerFast(tokenizer_file="tokenizer.json", eos_token="<end>")
threading.Thread(target=watch).start()
try:
    for name, cache in (("small.jsonl", True), ("large.jsonl", False), ("large.jsonl", True), ("large.jsonl", True)):
        section = DataSection.model_validate({"train": name, "max_length": 512, "cache": cache})
        prepared = prepare(section, tokenizer, vocab_size=400, max_positions=None, seed=0)
        print(peak / 1000, prepared.train_report.tokens)
finally:
    done.set()
"""


def write(path, megabytes):
    """Writes rows of 100 words."""
    texts = [" ".join(WORDS[(start * word) % 300] for word in range(1, 101)) for start in range(1, 101)]
    block = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path.write_text(block * round(megabytes * 1e6 / len(block)))


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(["<end>", *WORDS])}, "<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    write(tmp_path / "small.jsonl", 6)
    write(tmp_path / "large.jsonl", 60)
    done = subprocess.run([sys.executable, "-c", WORKER], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (small, tokens), *large = [map(float, line.split()) for line in done.stdout.splitlines()]
    for peak, found in large:
        assert found > 9 * tokens > 200_000
        assert peak < small + SLACK_MB
