"""Two launchers on this machine as two machines of one process each: they meet, train together, and end together."""

import socket
import subprocess
import sys
import time

import pytest

from tests.distributed.conftest import environment, furthest
from tests.tolerances import SAME_ON_RANKS

HALVES = ["training.per_device_train_batch_size=2", "--device=cpu", "--num-processes=1"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(workplace, command):
    return subprocess.Popen(
        command,
        env=environment(),
        cwd=workplace.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(runs, seconds=120):
    """Returns each run's exit code and what it said."""
    found = []
    for run in runs:
        said = run.communicate(timeout=seconds)[1]
        found.append((run.returncode, said))
    return found


@pytest.fixture(scope="module")
def path(workplace):
    path = workplace.recipe("machines", {"type": "lora", "r": 4}, optim="sgd", learning_rate=0.3)
    workplace.alone([workplace.job("machines-one", path)])
    return path


def own(path, name, workplace, endpoint, *options):
    """Returns peftcli's own command for one of two machines."""
    arguments = ["train", str(path), f"output_dir={workplace.folder / name}", *HALVES, "--nnodes=2", *options]
    return [sys.executable, "-m", "peftcli", *arguments, f"--rdzv-endpoint={endpoint}", f"--rdzv-id={name}"]


def test_the_same_command_on_both(workplace, path):
    endpoint = f"localhost:{free_port()}"
    runs = ended([start(workplace, own(path, "machines-own", workplace, endpoint)) for _ in range(2)])
    assert [code for code, _ in runs] == [0, 0], "\n\n".join(said for _, said in runs)
    assert furthest(workplace.adapter("machines-one"), workplace.adapter("machines-own")) <= SAME_ON_RANKS
    assert workplace.manifest("machines-own")["processes"] == 2


def test_the_printed_line_on_both(workplace, path):
    """What `--print-launch` says is torchrun's, and does the same."""
    endpoint = f"localhost:{free_port()}"
    asked = [*own(path, "machines-torchrun", workplace, endpoint), "--print-launch"]
    line = subprocess.run(asked, env=environment(), capture_output=True, text=True, timeout=60, check=True).stdout
    assert line.count("\n") == 1
    words = line.split()
    command = [sys.executable, "-m", "torch.distributed.run", *words[words.index("torchrun") + 1 :]]
    runs = ended([start(workplace, command) for _ in range(2)])
    for code, said in runs:  # torchrun fails of itself where the machine on which all met is the first to leave
        assert code == 0 or "RendezvousConnectionError" in said, "\n\n".join(said for _, said in runs)
    assert furthest(workplace.adapter("machines-one"), workplace.adapter("machines-torchrun")) <= SAME_ON_RANKS


def test_a_machine_that_does_not_come(workplace, path):
    endpoint = f"localhost:{free_port()}"
    started = time.monotonic()
    run = start(workplace, own(path, "machines-half", workplace, endpoint, "distributed.timeout=5"))
    ((code, said),) = ended([run], 60)
    assert code == 6, said
    assert said.count("error:") == 1, said
    assert f"2 machines did not all meet at {endpoint} within 5 seconds" in said
    assert "Traceback" not in said
    assert time.monotonic() - started < 30
    assert not (workplace.folder / "machines-half").exists()


def test_one_machine_without_a_place_to_meet(workplace, path):
    command = [sys.executable, "-m", "peftcli", "train", str(path), "--nnodes=2"]
    ((code, said),) = ended([start(workplace, command)], 60)
    assert code == 2, said
    assert "--rdzv-endpoint HOST:29500" in said
