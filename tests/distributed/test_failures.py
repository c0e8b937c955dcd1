"""However one process of a run fails, the run ends soon, says why once, exits with that reason, and can be resumed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.conftest import environment, furthest
from tests.tolerances import SAME_ON_RANKS

MAIN = "from peftcli.cli.main import main; main()"
STARTS = "import sys; sys.executable = {stand_in!r}; " + MAIN
SOON = 30
"""Seconds within which a run must have ended after one of its processes failed."""


class Run:
    """A run of two processes, started by peftcli's own launcher."""

    def __init__(self, workplace, name, failure, at=7, *changes):
        self.workplace, self.name = workplace, name
        self.folder = workplace.folder / f"{name}-place"
        self.folder.mkdir()
        stand_in = self.folder / "stand-in"
        script = Path(__file__).with_name("failing.py")
        stand_in.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
        stand_in.chmod(0o755)
        self.recipe = workplace.recipe(name, {"type": "lora", "r": 4}, optim="sgd", learning_rate=0.3)
        self.changes = ["training.per_device_train_batch_size=2", f"output_dir={workplace.folder / name}", *changes]
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTS.format(stand_in=str(stand_in)), *self.command("--num-processes=2")],
            env=environment(FAILURE=failure, AT=str(at)),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def command(self, *options):
        return ["train", str(self.recipe), *self.changes, "--device=cpu", *options]

    def until(self, path, seconds=60):
        """Waits until a file is there."""
        deadline = time.monotonic() + seconds
        while not path.exists() and self.process.poll() is None:
            assert time.monotonic() < deadline, f"no {path}"
            time.sleep(0.05)

    def ended(self, seconds=90):
        """Returns the exit code, what was said on stderr, and the seconds from the last sign of life to the end."""
        _, said = self.process.communicate(timeout=seconds)
        log = self.workplace.folder / self.name / "metrics.jsonl"
        return self.process.returncode, said, time.time() - log.stat().st_mtime

    def goes_on(self, *changes):
        """Resumes the run, unharmed, and returns its adapter."""
        done = subprocess.run(
            [sys.executable, "-m", "peftcli", *self.command(*changes, "--resume", "--num-processes=2")],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "resuming from checkpoint-" in done.stderr
        return self.workplace.adapter(self.name)


@pytest.fixture(scope="module")
def whole(workplace):
    """The adapter of a run that nothing happened to."""
    path = workplace.recipe("whole", {"type": "lora", "r": 4}, optim="sgd", learning_rate=0.3)
    workplace.alone([workplace.job("whole", path)])
    return workplace.adapter("whole")


KILLED = "process 1 of the run was killed by SIGKILL"
NOT_FINITE = "step 8: the loss is nan; the step was not applied"


@pytest.mark.parametrize(
    ("failure", "code", "reason"),
    [
        ("killed", 6, KILLED),
        ("not finite", 5, NOT_FINITE),
        ("refused", 3, "row 7 is not what it seemed"),
        ("a bug", 1, "this is a bug in peftcli: ZeroDivisionError('in one process')"),
        ("gone", 6, "a process of the run ended before its work was done and said nothing"),
    ],
)
def test_one_process_fails(failure, code, reason, workplace, whole):
    run = Run(workplace, failure.replace(" ", "-"), failure)
    found, said, seconds = run.ended()
    assert found == code, said
    assert said.count("error:") == 1, said
    assert reason in said
    assert "Traceback" not in said
    assert "hint:" in said
    assert seconds < SOON
    assert furthest(run.goes_on(), whole) <= SAME_ON_RANKS


@pytest.mark.parametrize(("failure", "code", "reason"), [("killed", 6, KILLED), ("not finite", 5, NOT_FINITE)])
def test_one_process_fails_that_has_half_of_the_base(failure, code, reason, workplace, whole):
    """The other one may be waiting for its half of a layer."""
    run = Run(workplace, f"{failure.replace(' ', '-')}-fsdp2", failure, 7, "distributed.strategy=fsdp2")
    found, said, seconds = run.ended()
    assert (found, said.count("error:")) == (code, 1), said
    assert reason in " ".join(said.split())
    assert seconds < SOON
    assert furthest(run.goes_on(), whole) <= SAME_ON_RANKS


@pytest.mark.parametrize(
    ("count", "arguments", "code"),
    [
        ("1", ["train", "no.yaml"], -signal.SIGABRT),
        ("2", ["train", "no.yaml"], 2),
        ("2", ["train", "--no-such-option"], 2),
        ("2", ["--version"], 0),
    ],
    ids=str,
)
def test_no_abort_of_a_dying_interpreter_replaces_what_one_process_of_several_exits_with(
    count, arguments, code, tmp_path
):
    """Threads of a connection do so, once in fifty runs; here it is certain. One process alone has no such threads."""
    done = subprocess.run(
        [sys.executable, "-c", f"import atexit, os; atexit.register(os.abort); {MAIN}", *arguments],
        env=environment(RANK="0", WORLD_SIZE=count, LOCAL_RANK="0"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "peftcli " in done.stdout if code == 0 else "no.yaml" in done.stderr or "--no-such-option" in done.stderr


def test_one_process_hangs(workplace, whole):
    run = Run(workplace, "hangs", "hangs", 7, "distributed.timeout=4")
    code, said, seconds = run.ended()
    assert code == 6, said
    assert said.count("error:") == 1, said
    assert "another process of this run has not answered for 4 seconds" in said
    assert "distributed.timeout" in said
    assert seconds < 4 + SOON + 15  # the one that hangs is given 30 seconds to end, and this machine may be busy
    assert furthest(run.goes_on("distributed.timeout=60"), whole) <= SAME_ON_RANKS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_asked_to_stop_they_save_after_the_same_step(number, workplace, whole):
    run = Run(workplace, number.name, "waits")
    run.until(run.folder / "waiting")
    run.process.send_signal(number)
    code, said, _ = run.ended()
    assert code == 75, said
    assert said.count("error:") == 1, said
    assert re.search(r"stopped after step 8 of 12; it is saved", said)
    assert (workplace.folder / number.name / "checkpoint-8").is_dir()
    assert furthest(run.goes_on(), whole) <= SAME_ON_RANKS


def test_a_second_ctrl_c_ends_it_at_once(workplace):
    run = Run(workplace, "impatient", "waits")
    run.until(run.folder / "waiting")
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    started = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    code, said, _ = run.ended()
    assert code == 130, said
    assert time.monotonic() - started < 5
    assert not (workplace.folder / "impatient" / "checkpoint-8").exists()


def test_a_worker_alone_may_be_told(workplace):
    """A scheduler that signals every process of a job."""
    run = Run(workplace, "workers", "waits")
    run.until(run.folder / "waiting")
    children = [
        int(line) for line in Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    ]
    assert len(children) == 2
    for child in children:
        os.kill(child, signal.SIGUSR1)
    code, said, _ = run.ended()
    assert code == 75, said
    assert said.count("error:") == 1, said


def test_what_all_find_wrong_is_said_once(workplace):
    run = Run(workplace, "wrong", "nothing", 7, "method.target_modules=[q_porj]")
    _, said = run.process.communicate(timeout=60)
    assert run.process.returncode == 2
    assert said.count("error:") == 1, said
    assert "q_porj" in said


def test_a_folder_that_is_taken_is_found_by_the_first(workplace, whole):
    run = Run(workplace, "taken", "nothing", 7, f"output_dir={workplace.folder / 'whole'}")
    _, said = run.process.communicate(timeout=60)
    assert run.process.returncode == 6, said
    assert said.count("error:") == 1, said
    assert "exists and is not empty" in said
