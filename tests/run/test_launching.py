"""What peftcli's own launcher starts, prints and returns. Here nothing is launched: tests/distributed does that."""

import json
import logging
import os
import signal

import pytest
import typer

from peftcli import processes
from peftcli.cli import training
from peftcli.cli.main import app
from peftcli.errors import HostError, RecipeError
from peftcli.recipe import DistributedSection
from peftcli.run import launching
from peftcli.run.launching import Launch
from peftcli.training import signals
from tests.launches import by_peftcli, by_shell

MEETING = ["--nnodes", "2", "--rdzv-endpoint", "gpu1:29500", "--rdzv-id", "17"]


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in (*names, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", processes.OWN_LAUNCHER):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back too
        monkeypatch.delenv(name)


@pytest.fixture
def gpus(monkeypatch):
    """Makes this machine seem to have as many GPUs as it is called with."""
    return lambda count: monkeypatch.setattr(launching, "_num_accelerators", lambda: count)


def test_a_line_for_one_machine():
    variables, torchrun, peftcli = by_shell(launching.line(Launch(per_machine=4), ["train", "r.yaml"]))
    assert (torchrun.standalone, torchrun.nproc_per_node, torchrun.rdzv_endpoint) == (True, "4", "")
    assert peftcli == ["train", "r.yaml"]
    assert "OMP_NUM_THREADS" not in variables


def test_a_line_for_several_machines():
    launch = Launch(per_machine=8, machines=3, endpoint="gpu1:29501", run_id="job 7", threads=2)
    variables, torchrun, _ = by_shell(launching.line(launch, ["train", "r.yaml"]))
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.standalone) == ("3", "8", False)
    assert (torchrun.rdzv_backend, torchrun.rdzv_endpoint, torchrun.rdzv_id) == ("c10d", "gpu1:29501", "job 7")
    assert variables["OMP_NUM_THREADS"] == "2"


def test_a_printed_torchrun_passes_on_every_signal_that_saves_a_run_and_waits_for_it():
    variables, torchrun, _ = by_shell(launching.line(Launch(per_machine=2), ["train", "r.yaml"]))
    assert {number.name for number in signals.SIGNALS} <= set(torchrun.signals_to_handle.split(","))
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == launching.GRACE_SECONDS


@pytest.mark.parametrize(
    "word",
    ["my recipe.yaml", "it's.yaml", 'a"b.yaml', "$HOME/r.yaml", "a\\b.yaml", "é;rm -rf x.yaml", "new\nline", "*"],
)
def test_odd_words_come_through_the_shell_whole(word):
    arguments = ["train", word, f"output_dir={word}"]
    assert by_shell(launching.line(Launch(2, 2, "gpu1:29500", word), arguments))[2] == arguments
    assert by_shell(launching.line(Launch(2, 2, "gpu1:29500", word), arguments))[1].rdzv_id == word


@pytest.mark.parametrize("joined", [False, True])
def test_no_option_of_the_launcher_leaks_to_the_worker(cli, recipe_file, joined):
    meeting = [f"{flag}={value}" for flag, value in zip(MEETING[::2], MEETING[1::2], strict=True)]
    path = recipe_file()
    options = ["--print-launch", *(meeting if joined else MEETING)]
    code, out, err = cli("train", *options[:3], path, "method.r=2", *options[3:], "--num-processes", "2", "--resume")
    assert (code, err) == (0, "")
    _, torchrun, peftcli = by_shell(out)
    assert peftcli == ["train", str(path), "method.r=2", "--num-processes", "2", "--resume"]
    assert (torchrun.nnodes, torchrun.rdzv_endpoint, torchrun.rdzv_id) == ("2", "gpu1:29500", "17")
    read = by_peftcli(peftcli)
    assert (read["nnodes"], read["rdzv_endpoint"], read["rdzv_id"], read["print_launch"]) == (1, None, None, False)
    assert (read["num_processes"], read["resume"]) == (2, True)


def test_every_launcher_option_is_one_that_train_has_and_takes_a_value():
    """`_worker_arguments` leaves them out by name, together with the word that follows."""
    command = typer.main.get_command(app).commands["train"]
    options = {flag: option for option in command.params for flag in option.opts}
    assert not any(options[flag].is_flag for flag in training.LAUNCH_OPTIONS)
    assert {flag for flag in options if flag.startswith(("--nnodes", "--rdzv"))} == set(training.LAUNCH_OPTIONS)


def test_a_value_that_looks_like_an_option_is_left_out_with_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["peftcli", "train", "r.yaml", "--rdzv-id", "--nnodes", "--resume"])
    assert training._worker_arguments() == ["train", "r.yaml", "--resume"]


def test_the_recipe_says_how_many_processes_unless_the_command_line_does(cli, recipe_file, gpus):
    gpus(8)
    path = recipe_file(distributed={"num_processes": 3})
    assert by_shell(cli("train", path, "--print-launch")[1])[1].nproc_per_node == "3"
    assert by_shell(cli("train", path, "--print-launch", "--num-processes", "5")[1])[1].nproc_per_node == "5"


@pytest.mark.parametrize(
    ("num_gpus", "device", "count", "threads"), [(4, None, 4, False), (4, "cpu", 1, True), (4, "cuda:2", 1, False)]
)
def test_left_to_itself_a_machine_has_one_process_for_each_gpu(gpus, num_gpus, device, count, threads):
    gpus(num_gpus)
    launch = launching.plan(DistributedSection(), device, 1, None, None)
    assert (launch.per_machine, launch.threads is not None) == (count, threads)


@pytest.mark.parametrize("device", [None, "cuda"])
def test_a_line_printed_where_there_is_no_gpu_uses_all_of_the_others(gpus, device):
    """A cluster's login node has none; one process a machine would leave most of the cluster idle without a word."""
    gpus(0)
    launch = launching.plan(DistributedSection(), device, 2, "gpu1:29500", None)
    variables, torchrun, _ = by_shell(launching.line(launch, ["train", "r.yaml"]))
    assert (torchrun.nproc_per_node, "OMP_NUM_THREADS" in variables) == ("gpu", False)


def test_several_machines_without_gpus_have_one_process_each(gpus, tmp_path):
    gpus(0)
    named = launching.plan(DistributedSection(), "cpu", 2, "gpu1:29500", None)
    assert by_shell(launching.line(named, []))[1].nproc_per_node == "1"
    assert launching._config(named, str(tmp_path)).nproc_per_node == 1
    left_out = launching.plan(DistributedSection(), None, 2, "gpu1:29500", None)
    assert launching._config(left_out, str(tmp_path)).nproc_per_node == 1
    assert left_out.threads == processes.threads_each(1)


def test_machines_need_a_place_to_meet():
    launch = launching.plan(DistributedSection(), "cpu", 2, None, None)
    assert "--rdzv-endpoint=HOST:29500" in launching.line(launch, [])  # to be filled in
    with pytest.raises(RecipeError, match="a place to meet") as raised:
        launching.start(launch, [])
    assert "--rdzv-endpoint" in raised.value.problems[0].hint


def test_one_named_device_cannot_be_several():
    with pytest.raises(RecipeError, match="cuda:1 is one device"):
        launching.plan(DistributedSection(num_processes=2), "cuda:1", 1, None, None)


@pytest.mark.parametrize(
    ("launch", "needed"),
    [(Launch(1), False), (Launch(2), True), (Launch(1, machines=2), True), (Launch(None, 2), True)],
)
def test_more_is_started_only_where_more_is_wanted_and_nobody_has_started_it(monkeypatch, launch, needed):
    assert launch.is_needed is needed
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert not launch.is_needed


class EndedError(Exception):
    """How the launcher ends where its workers' end is not what ended it."""

    def __init__(self, sigval=None):
        self.sigval = sigval


class RendezvousConnectionError(Exception):
    """Named as torch's, which has no public name: the machine where all meet is gone."""


def ends(monkeypatch, error, said=None):
    """Makes the launcher raise `error`, once a worker has left `said`, its exit code."""

    def run(launch, arguments, folder):
        if said is not None:
            with open(os.path.join(folder, processes.OUTCOME_FILE), "w") as file:  # noqa: PTH118, PTH123
                json.dump({"rank": 0, "exit_code": said}, file)
        raise error

    monkeypatch.setattr(launching, "_run", run)
    return launching.start(Launch(1, 2, "gpu1:29500", timeout=5), ["train", "r.yaml"])


@pytest.mark.parametrize(
    ("number", "said", "code"),
    [(signal.SIGUSR1, 75, 75), (signal.SIGTERM, 75, 75), (signal.SIGTERM, None, 143), (signal.SIGINT, None, 130)],
)
def test_after_a_signal_the_code_is_the_workers_if_they_have_said_one(monkeypatch, number, said, code):
    assert ends(monkeypatch, EndedError(number), said) == code


def test_a_run_that_has_saved_says_so_though_the_others_are_already_gone(monkeypatch):
    """The machine where all meet may end first, and the launchers of the others then find nobody there."""
    assert ends(monkeypatch, RendezvousConnectionError(), said=75) == 75


def test_machines_that_do_not_meet_are_told_of_it(monkeypatch):
    with pytest.raises(HostError, match="2 machines did not all meet at gpu1:29500 within 5 seconds"):
        ends(monkeypatch, RendezvousConnectionError())


def test_the_launcher_waits_for_a_checkpoint_and_leaves_the_talking_to_peftcli(monkeypatch, tmp_path):
    ends(monkeypatch, EndedError(signal.SIGUSR1), said=75)
    assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == str(launching.GRACE_SECONDS)
    assert launching._config(Launch(1), str(tmp_path)).shutdown_timeout == launching.GRACE_SECONDS
    for name in ("agent.server.api", "multiprocessing.api", "rendezvous.dynamic_rendezvous"):
        assert not logging.getLogger(f"torch.distributed.elastic.{name}").isEnabledFor(logging.ERROR)


def test_a_longer_wait_that_somebody_chose_is_left(monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    ends(monkeypatch, EndedError(signal.SIGUSR1), said=75)
    assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "3600"


@pytest.mark.parametrize(
    ("code", "said"),
    [(138, "ended by SIGUSR1\n"), (143, "ended by SIGTERM\n"), (130, "interrupted\n"), (75, ""), (0, "")],
)
def test_an_end_that_no_process_has_explained_is_named(cli, recipe_file, monkeypatch, code, said):
    monkeypatch.setattr(launching, "start", lambda launch, arguments: code)
    assert cli("train", recipe_file(), "--num-processes", "2", "--device", "cpu") == (code, "", said)
