"""What each process of a test's launch does: trains one recipe after another, so that imports are paid for once."""

import contextlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from peftcli import recipe
from peftcli.ops import cross_entropy
from peftcli.reporting import Silent
from peftcli.run.folder import TrainOptions
from peftcli.run.training import train
from peftcli.training import compiling, distributed, head
from tests.conftest import reset_accelerate


def main(jobs):
    """Does the jobs in the file `jobs`."""
    for job in json.loads(Path(jobs).read_text()):
        reset_accelerate()
        loaded = recipe.load(Path(job["recipe"]), job["overrides"])
        with CIRCUMSTANCES[job.get("under")]():
            train(loaded, TrainOptions("cpu", resume=job["resume"]), Silent(), lambda _: None)


def traced_alone():
    """Has the code of layers traced and taken apart, without what it takes longest to make: machine code."""
    return patch.object(compiling, "compile_layers", partial(compiling.compile_layers, backend="eager"))


def chunks_of_two_tokens():
    """Has the loss of a tiny model computed as that of a large one is: the head's logits a few tokens at a time."""
    stack = contextlib.ExitStack()
    stack.enter_context(patch.object(cross_entropy, "FEWEST_ROWS", 2))
    stack.enter_context(patch.object(head, "CHUNK_BYTES", 1))
    return stack


CIRCUMSTANCES = {None: contextlib.nullcontext, "chunks": chunks_of_two_tokens, "traced": traced_alone}


if __name__ == "__main__":
    distributed.begin(recipe.DistributedSection(), "no", torch.device("cpu"))  # one connection, which serves all jobs
    main(sys.argv[1])
    os._exit(0)  # torch and gloo now and then abort as the interpreter ends, with all work done
