"""What each of two processes of a test's launch does: spreads packed models, and notes what arrives where it computes.

A weight's packed bytes, read as floating-point numbers, are NaNs of many kinds. Whatever carries them from one process
to another must not take them for numbers, of which one NaN would be as good as another.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from peftcli import inject, methods, quantization, sharding
from peftcli.recipe import QuantizationSection
from tests.conftest import tiny_llama_config
from tests.gpu.conftest import BACKEND, DEVICE, REHEARSAL, WIDE, allocated

STORAGES = ("uint8", "bfloat16", "float16", "float32")


def odd_bytes(count):
    """Returns every pair of bytes in turn, every second four of them made a NaN of float32 with another payload."""
    pairs = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    found = pairs.repeat(count // len(pairs) + 1)[:count].clone()
    fours = found[: count // 8 * 8].view(-1, 8)
    fours[:, 6] |= 0x81  # the exponent's last bit, and the first of the mantissa
    fours[:, 7] |= 0x7F
    return found


def packed_llama(storage):
    """Returns a Llama, on the CPU as a run holds it until it is spread, and the bytes of its packed weights by name."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(tiny_llama_config(**WIDE)).requires_grad_(False)
    section = QuantizationSection(storage_dtype=storage, compute_dtype="float32")
    quantization.quantize(model, section, {"lm_head"}, DEVICE, torch.device("cpu"))
    packed = {name: module for name, module in model.named_modules() if quantization.is_quantised(module)}
    bytes_of = {}
    for name, module in packed.items():
        raw = module.weight.data.view(torch.uint8)
        raw.copy_(odd_bytes(raw.numel()).view_as(raw))
        bytes_of[name] = raw.flatten().clone()
    return model, packed, bytes_of


def arrived(storage, count):
    """Returns what a process finds when a model packed as `storage` is spread over `count` and used once."""
    model, packed, expected = packed_llama(storage)
    lora = methods.load("lora")
    inject.graft(model, lora, lora.Config(r=4), 0)
    whole = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    before = allocated()
    sharding.shard(model, DEVICE, count)
    held = allocated() - before
    wrong, looked_at = [], 0

    def look(name, when):
        def hook(module, *_):
            nonlocal looked_at
            looked_at += 1
            if not torch.equal(module.weight.detach().view(torch.uint8).flatten().cpu(), expected[name]):
                wrong.append(f"{name} {when}")

        return hook

    for name, module in packed.items():
        module.register_forward_pre_hook(look(name, "on the way forward"))
        module.register_full_backward_pre_hook(look(name, "on the way back"))
    ids = torch.arange(24, device=DEVICE)[None]
    model.train()(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    gradients = [part.B.grad for part in inject.adapters(model).values()]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    return {"wrong": wrong, "looked_at": looked_at, "packed": len(packed), "held": held, "whole": whole}


def main(folder):
    """Writes what this process found for each storage to `folder`."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not REHEARSAL:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(BACKEND)
    found = {storage: arrived(storage, count) for storage in STORAGES}
    (Path(folder) / f"found-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
