"""What each process of a test's launch does: trains one recipe after another, so that imports are paid for once."""

import contextlib
import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from peftcli import recipe
from peftcli.ops import cross_entropy
from peftcli.reporting import Silent
from peftcli.run.folder import TrainOptions
from peftcli.run.training import train
from peftcli.training import distributed, head
from tests.conftest import reset_accelerate


def main(jobs):
    """Does the jobs in the file `jobs`."""
    for job in json.loads(Path(jobs).read_text()):
        reset_accelerate()
        loaded = recipe.load(Path(job["recipe"]), job["overrides"])
        with chunks_of_two_tokens() if job.get("in_chunks") else contextlib.nullcontext():
            train(loaded, TrainOptions("cpu", resume=job["resume"]), Silent(), lambda _: None)


def chunks_of_two_tokens():
    """Has the loss of a tiny model computed as that of a large one is: the head's logits a few tokens at a time."""
    stack = contextlib.ExitStack()
    stack.enter_context(patch.object(cross_entropy, "FEWEST_ROWS", 2))
    stack.enter_context(patch.object(head, "CHUNK_BYTES", 1))
    return stack


if __name__ == "__main__":
    distributed.begin(recipe.DistributedSection(), "no", torch.device("cpu"))  # one connection, which serves all jobs
    main(sys.argv[1])
    os._exit(0)  # torch and gloo now and then abort as the interpreter ends, with all work done
