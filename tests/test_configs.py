"""The templates of configs/, each run as far as that is possible without a cluster: with stubs of what it has."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from itertools import chain
from pathlib import Path

import jsonschema
import pytest
import torch.distributed.run
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from peftcli.errors import Interrupted
from peftcli.manifest import MANIFEST_FILE
from peftcli.run import launching
from peftcli.training import signals
from tests import ray_worker
from tests.launches import by_peftcli, by_torchrun

FOLDER = Path(__file__).parents[1] / "configs"
TESTED = {
    "README.md",
    "constraints.txt",
    "deepspeed_zero3.json",
    "kubeflow.yaml",
    "ray_train.py",
    "skypilot.yaml",
    "slurm.sbatch",
    "ssh.sh",
}

RECORD = 'printf "%s\\0" "$@" >"$(mktemp "$RECORD/{name}.XXXXXX")"\necho $$ >"$RECORD/pid-{name}"\n'
"""What a stub begins with: it keeps its arguments, in a file for each call."""

AFTER = "\nexit 99\n"
"""Appended to a script whose last command must take the shell's place, so that it gets the signals."""


class Stubs:
    """Programs that keep what they are called with, first on PATH."""

    def __init__(self, folder):
        self.bin, self.record = folder / "bin", folder / "record"
        self.bin.mkdir()
        self.record.mkdir()
        self.environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "RECORD": str(self.record)}

    def add(self, name, body):
        path = self.bin / name
        path.write_text("#!/bin/bash\n" + RECORD.format(name=name) + body, encoding="utf-8")
        path.chmod(0o755)

    def start(self, command, cwd, **variables):
        """Starts `command` with the stubs and nothing of this process's environment."""
        # A shell cannot trap a signal that it was started to ignore, as tests in the background are.
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            return subprocess.Popen(
                command, cwd=cwd, env={**self.environment, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        finally:
            signal.signal(signal.SIGINT, before)

    def run(self, command, cwd, **variables):
        """Returns the exit code of `command`, which must not write to stderr."""
        process = self.start(command, cwd, **variables)
        said = process.communicate(timeout=60)[1].decode()
        assert said == ""
        self.pid = process.pid
        return process.returncode

    def calls(self, name):
        """Returns the arguments of each call of a stub, in no order."""
        found = [path.read_text(encoding="utf-8").split("\0")[:-1] for path in self.record.glob(f"{name}.*")]
        return sorted(found)

    def call(self, name):
        """Returns the arguments of a stub's only call."""
        (only,) = self.calls(name)
        return only

    def forget(self):
        for path in self.record.iterdir():
            path.unlink()


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A folder to start in, whose name a careless script would split."""
    path = tmp_path / "shared folder"
    path.mkdir()
    return path


def start_a_run(run):
    """Leaves what every run has from its first step on."""
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("", encoding="utf-8")


def read_yaml(name):
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def test_every_file_is_tested_and_listed():
    files = {path.name for path in FOLDER.iterdir()}
    assert files == TESTED
    listed = re.findall(r"^\| \[`([^`]+)`\]\(([^)]+)\)", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    assert all(name == link for name, link in listed)
    assert {name for name, _ in listed} == files - {"README.md"}


def test_what_was_not_tried_is_said():
    for name in sorted(TESTED - {"README.md", "constraints.txt"}):
        row = next(line for line in (FOLDER / "README.md").read_text("utf-8").splitlines() if f"[`{name}`]" in line)
        assert row.rstrip(" |").endswith("no"), row


def test_constraints_pin_one_version_each_of_all_that_is_asked_for():
    lines = (FOLDER / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins)
    assert all(str(pin.specifier).count("==") == 1 for pin in pins)
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    for requirement in map(Requirement, chain(project["dependencies"], *extras)):
        name = canonicalize_name(requirement.name)
        if name not in ("peftcli", "torch"):  # torch is of the device's own build
            assert requirement.specifier.contains(versions[name]), requirement


# SLURM

SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done
highest=0
for node in 0 1; do
  SLURM_NODEID=$node "$@"; code=$?
  [ "$code" -gt "$highest" ] && highest=$code
done
exit "$highest"
"""
"""As srun does, runs the command on each machine and returns the highest exit code."""


@pytest.fixture
def slurm(stubs, folder):
    """Runs the SLURM script with the exit codes of peftcli on two machines; returns its own."""
    stubs.add("scontrol", 'if [ "$1" = show ]; then printf "node-07\\nnode-12\\n"; fi\n')
    stubs.add("srun", SRUN)
    stubs.add("peftcli", 'codes=($CODES); exit "${codes[$SLURM_NODEID]}"\n')

    def run(*codes):
        stubs.forget()
        return stubs.run(
            ["bash", FOLDER / "slurm.sbatch"],
            folder,
            CODES=" ".join(map(str, codes)),
            SLURM_JOB_ID="4711",
            SLURM_JOB_NUM_NODES="2",
            SLURM_JOB_NODELIST="node-[07,12]",
            SLURM_CPUS_PER_TASK="32",
        )

    return run


def requeued(stubs):
    return [call for call in stubs.calls("scontrol") if call[0] == "requeue"]


def test_slurm_starts_the_same_command_on_every_machine(slurm, stubs):
    assert slurm(0, 0) == 0
    one, other = stubs.calls("peftcli")
    assert one == other
    read = by_peftcli(one)
    assert (read["recipe"], read["overrides"]) == (Path("recipe.yaml"), ["output_dir=runs/my-run"])
    assert (read["nnodes"], read["rdzv_endpoint"], read["rdzv_id"]) == (2, "node-07:14711", "4711")
    assert (read["resume"], read["overwrite"], read["num_processes"]) == (False, False, None)
    assert ["show", "hostnames", "node-[07,12]"] in stubs.calls("scontrol")
    assert requeued(stubs) == []


def test_slurm_goes_on_where_a_run_was_begun(slurm, stubs, folder):
    start_a_run(folder / "runs" / "my-run")
    assert slurm(0, 0) == 0
    assert by_peftcli(stubs.calls("peftcli")[0])["resume"] is True


def test_slurm_starts_anew_where_nothing_was_begun(slurm, stubs, folder):
    """A job that was requeued before it had begun must not resume what is not there."""
    (folder / "runs" / "my-run").mkdir(parents=True)
    slurm(0, 0)
    assert by_peftcli(stubs.calls("peftcli")[0])["resume"] is False


@pytest.mark.parametrize("codes", [(75, 75), (6, 75), (75, 0), (75, 1)])
def test_slurm_requeues_a_run_that_is_saved(slurm, stubs, codes):
    """A machine whose processes were told nothing may call itself cut off, with a lower code."""
    assert slurm(*codes) == Interrupted.exit_code == 75
    assert requeued(stubs) == [["requeue", "4711"]]


@pytest.mark.parametrize("codes", [(4, 4), (0, 4), (2, 2), (1, 0), (138, 138), (143, 6)])
def test_slurm_fails_with_every_other_code(slurm, stubs, codes):
    assert slurm(*codes) == max(codes)
    assert requeued(stubs) == []


def test_slurm_lets_every_machine_end_by_itself(slurm, stubs):
    """A task that srun kills counts as 128 and more, which would hide the 75 of the others."""
    slurm(75, 75)
    options = [word for word in stubs.call("srun") if word.startswith("--")]
    assert {"--kill-on-bad-exit=0", "--wait=0"} <= set(options)
    assert "--cpus-per-task=32" in options  # srun does not take it over from sbatch


def test_slurm_warns_the_tasks_in_a_way_that_they_hear():
    script = (FOLDER / "slurm.sbatch").read_text(encoding="utf-8")
    head, _, body = script.partition("\n\n")
    assert "#SBATCH" not in body  # SLURM reads them only before the first command
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in re.findall("^#SBATCH.*", head, re.M))
    name, seconds = options["signal"].split("@")  # `B:` before it would warn the shell alone
    assert signal.Signals[name] in signals.SIGNALS
    assert name in launching.SIGNALS.split(",")
    assert int(seconds) >= 60
    assert (options["ntasks-per-node"], "requeue" in options) == ("1", True)


# SkyPilot

SKYPILOT = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        **{name: {"type": "string"} for name in ("name", "workdir", "setup", "run")},
        "num_nodes": {"type": "integer"},
        "envs": {"type": "object", "additionalProperties": {"type": "string"}},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                **{name: {"type": "string"} for name in ("infra", "accelerators", "image_id", "disk_size")},
                "use_spot": {"type": "boolean"},
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "strategy": {"type": "string"},
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                        "recover_on_exit_codes": {
                            "type": "array",
                            "items": {"type": "integer", "minimum": 0, "maximum": 255, "not": {"const": 137}},
                        },
                    },
                },
            },
        },
        "file_mounts": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    **{name: {"type": "string"} for name in ("name", "source")},
                    "store": {"enum": ["s3", "gcs", "azure", "r2", "oci", "ibm"]},
                    "persistent": {"type": "boolean"},
                    "mode": {"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
                },
            },
        },
    },
}
"""The fields of SkyPilot's documented task format that a template may need."""


@pytest.fixture
def skypilot(stubs, folder):
    """Runs the SkyPilot template's `run` on one machine of two, with its variables; returns the exit code."""
    stubs.add("peftcli", 'exit "$CODE"\n')
    task = read_yaml("skypilot.yaml")

    def run(code=0, **variables):
        stubs.forget()
        variables = {**task["envs"], "RUN": str(folder / "my run"), **variables}
        cluster = {
            "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
            "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.9",
            "SKYPILOT_NODE_RANK": "1",
            "SKYPILOT_NUM_GPUS_PER_NODE": "8",
            "SKYPILOT_TASK_ID": "sky-managed-2026-11-28-01-02-03-000001_peftcli_1-0",
        }
        return stubs.run(["bash", "-c", task["run"] + AFTER], folder, CODE=str(code), **cluster, **variables)

    return run


def test_skypilot_knows_every_field():
    task = read_yaml("skypilot.yaml")
    jsonschema.validate(task, SKYPILOT)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [Interrupted.exit_code]


def test_skypilot_keeps_the_run_where_it_outlives_the_machines():
    """In a bucket that can be appended to, as a run's log of metrics is."""
    task = read_yaml("skypilot.yaml")
    (place,) = [place for place in task["file_mounts"] if task["envs"]["RUN"].startswith(f"{place}/")]
    assert task["file_mounts"][place]["mode"] == "MOUNT_CACHED"


def test_skypilot_starts_each_machine(skypilot, stubs, folder):
    assert skypilot(RECIPE="my recipe.yaml") == 0
    read = by_peftcli(stubs.call("peftcli"))
    assert (read["recipe"], read["overrides"]) == (Path("my recipe.yaml"), [f"output_dir={folder / 'my run'}"])
    assert (read["nnodes"], read["num_processes"], read["rdzv_endpoint"]) == (2, 8, "10.0.0.4:29500")
    assert read["rdzv_id"].startswith("sky-managed-")
    assert read["resume"] is False


def test_skypilot_goes_on_where_a_run_was_begun(skypilot, stubs, folder):
    start_a_run(folder / "my run")
    skypilot()
    assert by_peftcli(stubs.call("peftcli"))["resume"] is True


@pytest.mark.parametrize("code", [75, 4])
def test_skypilot_hands_signals_and_exit_code_through(skypilot, stubs, code):
    assert skypilot(code) == code
    assert int((stubs.record / "pid-peftcli").read_text()) == stubs.pid


@pytest.mark.parametrize("block", ["setup", "run"])
def test_skypilot_blocks_are_bash(block):
    subprocess.run(["bash", "-n", "-c", read_yaml("skypilot.yaml")[block]], check=True)


# Kubeflow


def strict(**properties):
    return {"type": "object", "additionalProperties": False, "properties": properties}


TEXT, ENVIRONMENT = {"type": "string"}, strict(name={"type": "string"}, value={"type": "string"})
POD = strict(
    terminationGracePeriodSeconds={"type": "integer", "minimum": 0},
    nodeSelector={"type": "object"},
    volumes={"type": "array", "items": {"required": ["name"]}},
    containers={
        "type": "array",
        "items": {
            **strict(
                name={"const": "node"}, volumeMounts={"type": "array", "items": strict(name=TEXT, mountPath=TEXT)}
            ),
            "required": ["name"],
        },
    },
)
JOBS = {
    "type": "array",
    "items": strict(name={"const": "node"}, template=strict(spec=strict(template=strict(spec=POD)))),
}
KUBEFLOW = {
    **strict(
        apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
        kind={"const": "TrainJob"},
        metadata={**strict(name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}), "required": ["name"]},
        spec={
            **strict(
                runtimeRef={**strict(name={"const": "torch-distributed"}), "required": ["name"]},
                trainer=strict(
                    image=TEXT,
                    command={"type": "array", "items": TEXT},
                    args={"type": "array", "items": TEXT},
                    env={"type": "array", "items": ENVIRONMENT},
                    numNodes={"type": "integer", "minimum": 1},
                    resourcesPerNode=strict(limits={"type": "object"}, requests={"type": "object"}),
                    numProcPerNode={"type": "integer", "minimum": 1},
                ),
                runtimePatches={
                    "type": "array",
                    "items": {
                        **strict(
                            manager=TEXT,
                            trainingRuntimeSpec=strict(template=strict(spec=strict(replicatedJobs=JOBS))),
                        ),
                        "required": ["manager"],
                    },
                },
            ),
            "required": ["runtimeRef"],
        },
    ),
    "required": ["apiVersion", "kind", "metadata", "spec"],
}
"""The part of the TrainJob's definition, in Kubeflow Trainer 2.2 and 2.3, that a template may need."""


@pytest.fixture
def kubeflow(stubs, folder):
    """Runs the container's command of the Kubeflow template; returns the exit code."""
    stubs.add("torchrun", 'exit "$CODE"\n')
    trainer = read_yaml("kubeflow.yaml")["spec"]["trainer"]

    def run(code=0):
        stubs.forget()
        environment = {one["name"]: one["value"] for one in trainer["env"]} | {"RUN": str(folder / "my run")}
        return stubs.run(
            [*trainer["command"], *trainer["args"][:-1], trainer["args"][-1] + AFTER],
            folder,
            CODE=str(code),
            **environment,
        )

    return run


def test_kubeflow_knows_every_field():
    jsonschema.validate(read_yaml("kubeflow.yaml"), KUBEFLOW)


def test_kubeflow_sets_nothing_that_the_trainer_sets():
    names = {one["name"] for one in read_yaml("kubeflow.yaml")["spec"]["trainer"]["env"]}
    assert not any(name.startswith("PET_") for name in names)


def test_kubeflow_gives_a_run_time_to_save():
    spec = read_yaml("kubeflow.yaml")["spec"]
    (patch,) = spec["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    environment = {one["name"]: one["value"] for one in spec["trainer"]["env"]}
    assert 30 < int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    (mounted,) = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
    assert all(environment[name].startswith(f"{mounted}/") for name in ("RECIPE", "RUN"))
    assert [one["name"] for one in pod["volumes"]] == [one["name"] for one in pod["containers"][0]["volumeMounts"]]


def test_kubeflow_starts_each_machine_with_what_the_trainer_tells_it(kubeflow, stubs, folder, monkeypatch):
    assert kubeflow() == 0
    told = {"NNODES": "2", "NPROC_PER_NODE": "8", "NODE_RANK": "1", "MASTER_PORT": "29500"}
    for name, value in {**told, "MASTER_ADDR": "my-run-node-0-0.my-run"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    torchrun = by_torchrun(stubs.call("torchrun"))
    config, *_ = torch.distributed.run.config_from_args(torchrun)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 8)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("static", "my-run-node-0-0.my-run:29500")
    assert {number.name for number in signals.SIGNALS} <= set(config.signals_to_handle.split(","))
    read = by_peftcli(torchrun.training_script_args)
    assert (read["recipe"], read["overrides"]) == (Path("/runs/recipe.yaml"), [f"output_dir={folder / 'my run'}"])
    assert (read["resume"], read["nnodes"]) == (False, 1)


def test_kubeflow_goes_on_where_a_run_was_begun(kubeflow, stubs, folder):
    start_a_run(folder / "my run")
    kubeflow()
    assert by_peftcli(by_torchrun(stubs.call("torchrun")).training_script_args)["resume"] is True


def test_kubeflow_hands_signals_and_exit_code_through(kubeflow, stubs):
    assert kubeflow(1) == 1
    assert int((stubs.record / "pid-torchrun").read_text()) == stubs.pid


# Ray


@pytest.fixture
def ray(monkeypatch):
    for name, module in ray_worker.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ray_worker.TorchTrainer, "started", None)


def test_ray_starts_a_worker_for_each_process(ray):
    module = ray_worker.template("__main__")
    started = ray_worker.TorchTrainer.started
    assert started.work is module.work
    assert started.scaling == ray_worker.ScalingConfig(num_workers=module.NUM_PROCESSES, use_gpu=True)
    assert started.run.failure_config == ray_worker.FailureConfig(max_failures=module.RESTARTS)
    assert not Path(started.run.storage_path).is_relative_to(module.RUN)  # a run's folder must be empty


def test_ray_does_nothing_when_a_worker_loads_it(ray):
    ray_worker.template()
    assert ray_worker.TorchTrainer.started is None


@pytest.mark.parametrize("begun", [False, True])
def test_ray_starts_or_goes_on(ray, monkeypatch, tmp_path, begun):
    called = []
    monkeypatch.setattr("peftcli.cli.main.app", lambda arguments, **options: called.append((arguments, options)))
    module = ray_worker.template()
    monkeypatch.setattr(module, "RUN", str(tmp_path / "run"))
    if begun:
        start_a_run(tmp_path / "run")
    module.work()
    ((arguments, options),) = called
    assert options == {"standalone_mode": False}  # an error is Ray's to see, not an exit
    read = by_peftcli(arguments)
    assert (read["recipe"], read["overrides"]) == (Path(module.RECIPE), [f"output_dir={tmp_path / 'run'}"])
    assert read["resume"] is begun


def test_ray_workers_train_one_model_together(recipe_file, tmp_path):
    """Two real processes, connected as Ray connects its workers before their work begins."""
    recipe, run = recipe_file(training={"max_steps": 2}), tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.ray_worker"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), "2", str(port), recipe, run],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(FOLDER.parent)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=200)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    facts = json.loads((run / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert (facts["processes"], facts["backend"], facts["result"]["steps"]) == (2, "gloo", 2)


# ssh

SSH = 'host=$4; shift 4; cd /; HOST=$host exec bash -c "$*"\n'
PEFTCLI = 'if [ "$HOST" = gpu1 ]; then sleep "$SLEEP_1"; exit "$CODE_1"; else sleep "$SLEEP_2"; exit "$CODE_2"; fi\n'
UNTIL_STOPPED = 'pwd >"$RECORD/in-$HOST"; until [ -e "$RECORD/stop-$HOST" ]; do sleep 0.05; done; sleep 0.5; exit 75\n'


def run_ssh(stubs, folder, *arguments, codes=(0, 0), seconds=(0, 0)):
    stubs.add("ssh", SSH)
    stubs.add("peftcli", PEFTCLI)
    variables = {f"CODE_{i}": str(code) for i, code in enumerate(codes, start=1)}
    variables |= {f"SLEEP_{i}": str(delay) for i, delay in enumerate(seconds, start=1)}
    return stubs.run([FOLDER / "ssh.sh", *arguments], folder, **variables)


def test_ssh_starts_the_same_command_on_every_machine(stubs, folder):
    arguments = ["my recipe.yaml", "output_dir=it's here", "method.r=8", "--resume"]
    assert run_ssh(stubs, folder, *arguments) == 0
    one, other = stubs.calls("peftcli")
    assert one == other
    read = by_peftcli(one)
    assert (read["recipe"], read["overrides"]) == (Path(arguments[0]), arguments[1:3])
    assert (read["nnodes"], read["rdzv_endpoint"], read["resume"]) == (2, "gpu1:29500", True)
    assert [call[3] for call in stubs.calls("ssh")] == ["gpu1", "gpu2"]


def test_ssh_gives_each_start_a_name_of_its_own(stubs, folder):
    run_ssh(stubs, folder, "r.yaml")
    run_ssh(stubs, folder, "r.yaml")
    assert len({by_peftcli(call)["rdzv_id"] for call in stubs.calls("peftcli")}) == 2


@pytest.mark.parametrize(
    ("codes", "seconds", "code"),
    [((4, 6), (0, 0.5), 4), ((6, 4), (0.5, 0), 4), ((0, 3), (0, 0), 3), ((0, 3), (0.5, 0), 3), ((75, 75), (0, 0), 75)],
)
def test_ssh_ends_with_the_code_of_the_machine_that_failed_first(stubs, folder, codes, seconds, code):
    assert run_ssh(stubs, folder, "r.yaml", codes=codes, seconds=seconds) == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ssh_passes_a_stop_on_and_waits_until_the_run_is_saved(stubs, folder, number):
    stubs.add("ssh", SSH)
    stubs.add("peftcli", UNTIL_STOPPED)
    stubs.add("pkill", 'touch "$RECORD/stop-$HOST"\n')
    process = stubs.start([FOLDER / "ssh.sh", "r.yaml"], folder)
    places = [stubs.record / f"in-{host}" for host in ("gpu1", "gpu2")]
    until = time.monotonic() + 30
    while not all(place.exists() and place.read_text() for place in places):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert {place.read_text().rstrip() for place in places} == {str(folder)}
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 75
    name = by_peftcli(stubs.calls("peftcli")[0])["rdzv_id"]
    assert stubs.calls("pkill") == [["-USR1", "-o", "-f", name]] * 2
