"""What the system itself refuses: a file size that a process may not exceed, a full disk, a folder that others want."""

import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

LIMIT = 6_000
"""Bytes: enough for a recipe and a lock, too little for a checkpoint."""


def run_cli(*arguments, limit=None, **environment):
    def set_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "peftcli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        preexec_fn=None if limit is None else set_limit,
    )


def assert_same_adapter(one, other):
    assert (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()


def test_a_file_size_limit_ends_a_run_that_can_go_on_without_it(recipe_file, train, tmp_path):
    path = recipe_file(training={"max_steps": 4, "save_steps": 2})
    train(path, "output_dir=whole")
    train(path)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    done = run_cli("train", path, "--resume", limit=LIMIT)
    assert done.returncode == 6, done.stderr
    assert "File too large" in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    train(path, resume=True)
    assert_same_adapter(tmp_path / "run", tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own that holds 400 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "peftcli-test", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_a_run_that_can_go_on_with_space(recipe_file, train, tmp_path, small_disk):
    path = recipe_file(training={"max_steps": 4, "save_steps": 2, "save_total_limit": None})
    train(path, "output_dir=whole")
    run = small_disk / "run"
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - 100_000))
    done = run_cli("train", path, f"output_dir={run}")
    assert done.returncode == 6, done.stderr
    assert "No space left on device" in done.stderr
    assert "free some space" in done.stderr
    ballast.unlink()
    train(path, f"output_dir={run}", resume=True)
    assert_same_adapter(run, tmp_path / "whole")


def test_on_a_read_only_disk_nothing_is_begun_and_everything_can_be_read(recipe_file, train, tmp_path, small_disk):
    path = recipe_file(training={"max_steps": 2})
    train(path, f"output_dir={small_disk / 'run'}")
    (small_disk / "cache").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for command in (
        ["train", path, f"output_dir={small_disk / 'new'}"],
        ["train", path, f"output_dir={small_disk / 'run'}", "--resume"],
        ["merge", small_disk / "run"],
    ):
        done = run_cli(*command)
        assert done.returncode == 6, done.stderr
        assert "Read-only file system" in done.stderr
        assert "loading the base model" not in done.stderr
        assert done.stderr.count("hint:") == 1
    caches = {"XDG_CACHE_HOME": str(small_disk / "cache"), "HF_HOME": str(small_disk / "cache")}
    for command in (["eval", small_disk / "run"], ["generate", small_disk / "run", "the cat"]):
        done = run_cli(*command, **caches)
        assert done.returncode == 0, done.stderr
    done = run_cli("train", path, "data.cache=true", **caches)
    assert done.returncode == 0, done.stderr
    assert "Read-only file system" in done.stderr  # and the data is encoded all the same


def test_of_ten_that_want_one_folder_one_gets_it(tmp_path):
    program = (
        "import pathlib, sys, time\nfrom peftcli import errors, locks\n"
        "try:\n with locks.locked(pathlib.Path(sys.argv[1])): print('won'); time.sleep(3)\n"
        "except errors.HostError as error: sys.exit(error.exit_code)"
    )

    def contend(_):
        return subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
        )

    with ThreadPoolExecutor(10) as pool:
        ended = list(pool.map(contend, range(10)))
    assert sorted(one.returncode for one in ended) == [0] + [6] * 9
    assert [one.stdout for one in ended].count("won\n") == 1
