"""A process that runs commands one after the other and says what they did: `python -m tests.fuzz.offline FOLDER`.

Reads `plan.json` there, a list of command lines; writes `found.json`. There is no network while it runs.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.auditing import watched


def main():
    folder = Path(sys.argv[1]).resolve()
    os.chdir(folder)
    (folder / "tmp").mkdir()
    tempfile.tempdir = str(folder / "tmp")
    found = []
    with watched(folder, refuse=True) as seen:
        for arguments in json.loads(Path("plan.json").read_text()):
            begun = time.monotonic()
            before = {name: len(getattr(seen, name)) for name in ("network", "processes", "outside", "pickles", "ran")}
            code, stdout, stderr = run(arguments)
            new = {name: getattr(seen, name)[at:] for name, at in before.items()}
            found.append(
                {
                    "arguments": arguments,
                    "code": code,
                    "stdout": stdout,
                    "stderr": stderr,
                    "seconds": time.monotonic() - begun,
                    **new,
                }
            )
    Path("found.json").write_text(json.dumps(found, indent=1))


def run(arguments):
    from peftcli.cli import console
    from peftcli.cli.main import main as peftcli

    stdout, stderr = io.StringIO(), io.StringIO()
    sys.argv = ["peftcli", *arguments]
    code = None
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        console.stdout.file, console.stderr.file = stdout, stderr
        try:
            peftcli()
        except SystemExit as ended:
            code = ended.code
    return code, stdout.getvalue(), stderr.getvalue()


if __name__ == "__main__":
    main()
