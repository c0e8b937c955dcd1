"""A folder belongs to one run at a time."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from peftcli import locks
from peftcli.errors import HostError

HOLDER = """
import sys, time
from pathlib import Path
from peftcli import locks
with locks.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_process(tmp_path):
    """Another process that holds the folder's lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_is_held_by_one_process_until_that_ends(tmp_path, other_process):
    with pytest.raises(HostError, match=f"is in use by another run .process {other_process.pid} on "):
        locks.locked(tmp_path).__enter__()
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    with locks.locked(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / locks.LOCK_FILE).read_text()


def test_a_lock_is_given_back_and_not_shared(tmp_path):
    for _ in range(2):
        with locks.locked(tmp_path), pytest.raises(HostError, match="is in use by another run"):
            locks.locked(tmp_path).__enter__()
    (tmp_path / "other").mkdir()
    with locks.locked(tmp_path), locks.locked(tmp_path / "other"):
        pass
    with pytest.raises(HostError, match="cannot write"):
        locks.locked(tmp_path / "nowhere").__enter__()


@pytest.mark.parametrize("failing", ["ftruncate", "write"])
def test_a_lock_on_a_full_disk_is_explained(failing, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(HostError, match=r"cannot write .*lock: No space left"):
        locks.locked(tmp_path).__enter__()
