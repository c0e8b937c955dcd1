"""One worker of a Ray cluster, as far as it can be had without Ray: does the work of configs/ray_train.py.

It is started with a rank, the number of workers, a port, a recipe and a run's folder. As Ray's, it has the variables
that Ray sets, is connected before the work begins, and does it outside the main thread.
"""

import importlib.util
import os
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import Path

TEMPLATE = Path(__file__).parents[1] / "configs" / "ray_train.py"


@dataclass
class ScalingConfig:
    num_workers: int = 1
    use_gpu: bool = False


@dataclass
class FailureConfig:
    max_failures: int = 0


@dataclass
class RunConfig:
    storage_path: str | None = None
    failure_config: FailureConfig | None = None


class TorchTrainer:
    """Keeps what it is made with; `started` is the last one whose `fit` was called."""

    started = None

    def __init__(self, train_loop_per_worker, *, scaling_config=None, run_config=None):
        self.work, self.scaling, self.run = train_loop_per_worker, scaling_config, run_config

    def fit(self):
        TorchTrainer.started = self


def modules():
    """Returns what stands for the modules of Ray that the template imports."""
    ray, train, torch = (types.ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch"))
    train.ScalingConfig, train.RunConfig, train.FailureConfig = ScalingConfig, RunConfig, FailureConfig
    torch.TorchTrainer = TorchTrainer
    return {"ray": ray, "ray.train": train, "ray.train.torch": torch}


def template(name="ray_train"):
    """Returns the template as a module of that name, which runs it if it is `__main__`."""
    spec = importlib.util.spec_from_file_location(name, TEMPLATE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(rank, count, port, recipe, run):
    import torch.distributed

    sys.modules.update(modules())
    os.environ.update(RANK=rank, WORLD_SIZE=count, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=count, NODE_RANK="0")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port, ACCELERATE_TORCH_DEVICE="cpu")
    torch.distributed.init_process_group("gloo", init_method="env://", rank=int(rank), world_size=int(count))
    module, failed = template(), []
    module.RECIPE, module.RUN = recipe, run

    def work():
        try:
            module.work()
        except BaseException as error:
            failed.append(error)
            raise

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stderr.flush()
    os._exit(bool(failed))  # as Ray ends its workers; connections' threads may abort an interpreter that is taken down


if __name__ == "__main__":
    main(*sys.argv[1:])
