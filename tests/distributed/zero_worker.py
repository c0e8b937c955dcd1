"""What each process does to show how much of a base it holds: spreads one, trains a step, and counts."""

import json
import sys
from pathlib import Path

import torch

from peftcli import inject, methods
from peftcli.training import zero
from peftcli.training.zero_settings import ZeroSettings
from tests.conftest import tiny_llama_config
from tests.distributed.test_deepspeed import AT_ONCE


def main(folder):
    """Writes what this process found into `folder`."""
    from transformers import AutoModelForCausalLM

    torch.distributed.init_process_group("gloo")
    values = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "zero_optimization": AT_ONCE}
    settings, device = ZeroSettings(folder / "ds.json", values, 3, ()), torch.device("cpu")
    zero.begin(settings, device)
    model = AutoModelForCausalLM.from_config(tiny_llama_config())
    method = methods.load("dora")
    base = sum(parameter.numel() for parameter in model.parameters())
    inject.graft(model, method, method.Config(type="dora", r=2, target_modules="all-linear"), 0)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    said = zero.shard(model, settings, device)
    spread = [parameter for parameter in model.parameters() if zero._is_spread(parameter)]
    found = {"said": said, "base": base, "tensors": len(spread)}
    found["gathered_before"] = sum(parameter.numel() for parameter in spread)
    for _ in range(3):  # DeepSpeed does as it is told only once it has seen what follows what
        ids = torch.arange(4)[None] + torch.distributed.get_rank()
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in adapters)
    with torch.no_grad():
        model(input_ids=ids)
    found["gathered_after"] = sum(parameter.numel() for parameter in spread)
    found["share"] = sum(parameter.ds_tensor.numel() for parameter in spread)
    found["whole"] = sum(parameter.numel() for parameter in model.parameters() if not zero._is_spread(parameter))
    found["adapters"] = sum(parameter.numel() for parameter in adapters)
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
