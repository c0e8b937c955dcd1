"""What stands in for `python -m peftcli` where one process of a run is to fail: `FAILURE` says how, `AT` in which step.

The launcher runs this file as if it were the interpreter, with `-m peftcli` and the command line as arguments.
"""

import os
import signal
import sys
import time
from pathlib import Path

from peftcli import errors
from peftcli.cli.main import main
from peftcli.training.loop import Trainer

RANK = int(os.environ.get("RANK", "0"))


def fail(how, task):
    """Fails, or waits to be told to stop."""
    if how == "not finite":
        objective = task.objective
        object.__setattr__(task, "objective", lambda model, batch: objective(model, batch) * float("nan"))
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "refused":
        raise errors.DataError("row 7 is not what it seemed", hint="look at it")
    if how == "a bug":
        raise ZeroDivisionError("in one process")
    if how == "gone":
        os._exit(0)
    if how == "hangs":
        while True:
            time.sleep(1)


def watched(self, original=Trainer._step):
    """Stands in for `Trainer._step`."""
    if self.progress.step == int(os.environ["AT"]):
        if RANK == 1:
            fail(os.environ["FAILURE"], self.task)
        if os.environ["FAILURE"] == "waits":  # for a signal, in the middle of a step
            Path("waiting").write_text("")
            time.sleep(1.5)
    original(self)


if __name__ == "__main__":
    assert sys.argv[1:3] == ["-m", "peftcli"]
    sys.argv = ["peftcli", *sys.argv[3:]]
    Trainer._step = watched
    main()
