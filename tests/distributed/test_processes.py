"""Which process this is, what two of them add up, and what is refused before anything begins."""

import os
import subprocess
import sys

import pytest
import torch

from peftcli import processes, recipe
from peftcli.errors import DataError, HostError, PeerLostError
from peftcli.processes import Place
from peftcli.training import distributed
from tests.distributed.conftest import environment


@pytest.fixture
def worker(monkeypatch):
    """Makes this process look like one that a launcher has started."""

    def make(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return make


def test_two_processes_add_up_what_each_has():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed.sums"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("all held") == 2


class TestHere:
    def test_one_process_alone(self):
        assert processes.here() == Place()
        assert processes.here().is_first

    def test_as_torchrun_says(self, worker):
        worker(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4)
        assert processes.here() == Place(5, 8, 1, 4, launched=True)

    @pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
    def test_half_of_it_is_no_launcher(self, missing, worker, monkeypatch):
        """Some schedulers set RANK and WORLD_SIZE for a machine; its processes are still to be started."""
        worker(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0)
        monkeypatch.delenv(missing)
        assert processes.here() == Place()


class TestThreads:
    @pytest.mark.parametrize(("set_to", "threads"), [(None, 3), ("1", 3), ("2", None)])
    def test_cores_are_shared_out_unless_the_user_says(self, set_to, threads, worker, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if set_to is not None:
            worker(OMP_NUM_THREADS=set_to)
        assert processes.cpu_threads(Place(1, 4, 1, 2, launched=True)) == threads

    def test_what_peftclis_own_launcher_passes_on_is_the_users(self, worker):
        worker(OMP_NUM_THREADS="1", PEFTCLI_LAUNCHED="1")
        assert processes.cpu_threads(Place(1, 2, 1, 2, launched=True)) is None

    def test_a_process_alone_has_what_torch_takes(self, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert processes.cpu_threads(Place()) is None


class TestWhoSpeaks:
    def test_a_process_alone(self):
        assert processes.speaks(DataError("no"), 3)

    def test_the_first_to_fail_and_no_other(self, worker, tmp_path):
        worker(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1)
        for rank in (0, 1):
            (tmp_path / str(rank)).mkdir()
        worker(TORCHELASTIC_ERROR_FILE=tmp_path / "1" / "error.json")
        assert processes.speaks(DataError("no"), 3)
        assert processes.outcome_in(tmp_path) == (1, 3)
        worker(RANK=0, LOCAL_RANK=0, TORCHELASTIC_ERROR_FILE=tmp_path / "0" / "error.json")
        assert not processes.speaks(None, 1)
        assert processes.outcome_in(tmp_path) == (1, 3)

    def test_a_consequence_is_nobodys_news(self, worker, tmp_path):
        worker(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, TORCHELASTIC_ERROR_FILE=tmp_path / "1" / "error.json")
        assert not processes.speaks(PeerLostError("gone"), 6)
        assert processes.outcome_in(tmp_path) is None

    def test_without_a_place_to_agree_the_first_process_does(self, worker, monkeypatch):
        monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
        worker(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1)
        assert not processes.speaks(DataError("no"), 3)
        assert processes.speaks(None, 1), "a bug in one process is news"
        worker(RANK=0)
        assert processes.speaks(DataError("no"), 3)

    def test_a_damaged_outcome_is_none(self, tmp_path):
        (tmp_path / processes.OUTCOME_FILE).write_text("{")
        assert processes.outcome_in(tmp_path) is None


class TestRefused:
    def begin(self, **fields):
        return distributed.begin(recipe.DistributedSection(**fields), "no", torch.device("cpu"))

    @pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
    def test_accelerates_own_way_to_spread_a_model(self, name, worker):
        worker(**{name: "true"})
        with pytest.raises(HostError, match=f"{name} is set"):
            self.begin()

    @pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed"])
    def test_a_strategy_that_needs_several(self, strategy):
        with pytest.raises(HostError, match=rf"distributed\.strategy: {strategy} .* this run has one"):
            self.begin(strategy=strategy)

    def test_fewer_processes_than_were_asked_for(self):
        """`accelerate launch --cpu --num_processes 2` starts one, and says nothing."""
        with pytest.raises(HostError, match="2 were asked for, and 1 were started"):
            self.begin(num_processes=2)

    def test_a_world_that_accelerate_does_not_see(self, worker, monkeypatch):
        worker(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0)
        monkeypatch.setattr(
            "accelerate.Accelerator", lambda **_: type("A", (), {"num_processes": 1, "process_index": 0})
        )
        with pytest.raises(HostError, match="2 processes were started and Accelerate runs 1"):
            self.begin()


def test_alone_nothing_is_sent():
    group = distributed.alone(torch.device("cpu"))
    rows = torch.ones(2, 2)
    assert group.sums(1, True) == [1.0, 1.0]
    assert group.rows(rows) is rows
    assert group.of_first(3) == 3
    group.wait()
    parameter = torch.nn.Parameter(torch.zeros(2))
    group.add_gradients({"a": parameter})
    assert parameter.grad is None
