"""Trains a recipe on a Ray cluster, with one of Ray's workers for each process. Was not run on a Ray cluster.

    python configs/ray_train.py        (or `ray job submit -- python configs/ray_train.py`)

Ray connects the workers and sets RANK, WORLD_SIZE and LOCAL_RANK; peftcli finds both and starts nothing itself.
Change the constants. Workers run in folders of Ray's own: paths, in the recipe too, must be absolute and shared by all
machines. A folder that holds a run is gone on with, so that a worker that Ray restarts loses no more than the steps
since the last checkpoint: set training.save_steps. A signal stops a worker at once, without another checkpoint.
"""

from pathlib import Path

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

RECIPE = "/shared/recipe.yaml"
RUN = "/shared/runs/my-run"
NUM_PROCESSES = 16
RESTARTS = 3


def work() -> None:
    """Does one worker's part of the run."""
    from peftcli.cli.main import app

    resume = ["--resume"] if Path(RUN, "recipe.yaml").exists() else []
    app(["train", RECIPE, f"output_dir={RUN}", *resume], standalone_mode=False)


if __name__ == "__main__":
    TorchTrainer(
        work,
        scaling_config=ScalingConfig(num_workers=NUM_PROCESSES, use_gpu=True),
        run_config=RunConfig(storage_path=f"{RUN}-ray", failure_config=FailureConfig(max_failures=RESTARTS)),
    ).fit()
