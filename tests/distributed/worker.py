"""What each process of a test's launch does: trains one recipe after another, so that imports are paid for once."""

import json
import os
import sys
from pathlib import Path

import torch

from peftcli import recipe
from peftcli.reporting import Silent
from peftcli.run.folder import TrainOptions
from peftcli.run.training import train
from peftcli.training import distributed
from tests.conftest import reset_accelerate


def main(jobs):
    """Does the jobs in the file `jobs`."""
    for job in json.loads(Path(jobs).read_text()):
        reset_accelerate()
        loaded = recipe.load(Path(job["recipe"]), job["overrides"])
        train(loaded, TrainOptions("cpu", resume=job["resume"]), Silent(), lambda _: None)


if __name__ == "__main__":
    distributed.begin(recipe.DistributedSection(), "no", torch.device("cpu"))  # one connection, which serves all jobs
    main(sys.argv[1])
    os._exit(0)  # torch and gloo now and then abort as the interpreter ends, with all work done
