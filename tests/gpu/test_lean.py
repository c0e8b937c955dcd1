"""What saves time or memory learns the same on a GPU as what does not, and saves it there."""

import gc

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from peftcli import inject, methods
from peftcli.ops import cross_entropy
from peftcli.ops.cross_entropy import Work, chunked_cross_entropy, rows_for
from peftcli.training import head, memory
from tests.conftest import Recorder, tiny_llama_config
from tests.gpu.conftest import DEVICE, REHEARSAL, losses, needs_cuda, needs_real_cuda
from tests.tolerances import EXACT, HALF, LOSS_CURVE

pytestmark = needs_cuda
NAME = str(DEVICE)
TOLERANCE = {"no": LOSS_CURVE, "bf16": HALF[torch.bfloat16]}
each_precision = pytest.mark.parametrize("precision", TOLERANCE)


@pytest.fixture
def run(train, tmp_path):
    """Trains a recipe with changes, and returns the losses it logged and its peak of memory in GB, 0 on a CPU."""

    def made(path, name, *changes):
        if not REHEARSAL:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        train(path, *changes, f"output_dir={name}", device=NAME)
        return losses(tmp_path / name), 0 if REHEARSAL else torch.cuda.max_memory_allocated() / 1e9

    return made


# torch's own: its compiler looks at what comes into a layer.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "hydralora"])
@each_precision
def test_compiled_layers_learn_the_same(precision, method, recipe, run):
    path, wanted = recipe(method={"type": method, "r": 4}), f"training.mixed_precision={precision}"
    plain, _ = run(path, "plain", wanted)
    compiled, _ = run(path, "compiled", wanted, "training.torch_compile=true")
    assert compiled == pytest.approx(plain, rel=TOLERANCE[precision])


@needs_real_cuda
@pytest.mark.parametrize("base", ["none", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_offloaded_activations_are_the_same(method, base, recipe, run):
    path = recipe(method={"type": method, "r": 4, "dropout": 0.2}, quantization={"type": base})
    plain, _ = run(path, "plain")
    offloaded, _ = run(path, "offloaded", "training.activation_offloading=true")
    assert offloaded == pytest.approx(plain, rel=EXACT[torch.float32])


@needs_real_cuda
def test_offloading_saves_memory(recipe, run, wide_folder):
    path = recipe(model={"name": str(wide_folder)}, training={"max_steps": 2, "per_device_train_batch_size": 32})
    _, plain = run(path, "plain")
    _, offloaded = run(path, "offloaded", "training.activation_offloading=true")
    assert offloaded < plain


@needs_real_cuda
@pytest.mark.parametrize("base", ["none", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "hydralora"])
@each_precision
def test_ligers_kernels_learn_the_same(precision, method, base, recipe, run):
    pytest.importorskip("liger_kernel", reason="needs the package liger-kernel")
    path = recipe(method={"type": method, "r": 4}, quantization={"type": base})
    wanted = f"training.mixed_precision={precision}"
    plain, _ = run(path, "plain", wanted)
    with_kernels, _ = run(path, "kernels", wanted, "training.use_liger_kernel=true")
    assert with_kernels == pytest.approx(plain, rel=TOLERANCE[precision])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@each_precision
def test_joined_samples_do_not_see_each_other(precision, attention, recipe, run):
    path, wanted = recipe(model={"attn_implementation": attention}), f"training.mixed_precision={precision}"
    padded, _ = run(path, "padded", wanted, "data.padding_free=false")
    joined, _ = run(path, "joined", wanted, "data.padding_free=true")
    assert joined == pytest.approx(padded, rel=TOLERANCE[precision])


@each_precision
def test_the_loss_in_chunks_is_the_loss(precision, recipe, run, monkeypatch):
    path, wanted = recipe(), f"training.mixed_precision={precision}"
    plain, _ = run(path, "plain", wanted)
    monkeypatch.setattr(cross_entropy, "FEWEST_ROWS", 2)
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    chunked, _ = run(path, "chunked", wanted)
    assert chunked == pytest.approx(plain, rel=TOLERANCE[precision])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_of_a_large_vocabulary_takes_little(dtype):
    """4,096 tokens of 128,000 classes in less than 300 MB beside hidden states and weights; whole logits take 2 GB."""
    count, width, vocabulary = (64, 32, 1000) if REHEARSAL else (4096, 512, 128_000)
    layer = nn.Linear(width, vocabulary, bias=False, device=DEVICE, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(count, width, device=DEVICE, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (count,), device=DEVICE)
    gc.collect()
    if not REHEARSAL:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    loss, _ = chunked_cross_entropy(Work(targets, layer, rows_for(vocabulary)), hidden)
    loss.backward()
    assert bool(torch.isfinite(hidden.grad).all())
    if not REHEARSAL:
        assert torch.cuda.max_memory_allocated() - before < 300e6


@needs_real_cuda
def test_a_batch_size_that_fits_is_found_where_little_is_left(recipe, train, wide_folder):
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(DEVICE)
    taken = torch.empty(int(free - memory.SPARE * total - 0.5e9), dtype=torch.uint8, device=DEVICE)
    recorder = Recorder()
    training = {"per_device_train_batch_size": "auto", "max_steps": 3, "mixed_precision": "bf16"}
    facts = train(recipe(model={"name": str(wide_folder)}, training=training), device=NAME, reporter=recorder)
    del taken
    assert facts["result"]["steps"] == 3
    assert any(" fits, " in note for note in recorder.notes)


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "hydralora"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_no_adapted_module_waits_for_the_gpu(method, precision):
    """But the first time: a program that waits at every module leaves the GPU with nothing to do in between."""
    config = methods.load(method).Config.model_validate({"type": method, "r": 4, "dropout": 0.1})
    model = AutoModelForCausalLM.from_config(tiny_llama_config()).to(DEVICE, precision)
    inject.graft(model, methods.load(method), config, seed=0)
    modules = [module for _, module in inject.grafted_modules(model.train())]
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == torch.bfloat16)

    def passes():
        for module in modules:
            x = torch.randn(2, 8, module.in_features, device=DEVICE, dtype=precision, requires_grad=True)
            with autocast:
                y = module(x)
            y.sum().backward()

    passes()
    if not REHEARSAL:
        torch.cuda.set_sync_debug_mode("error")
    try:
        passes()
    finally:
        if not REHEARSAL:
            torch.cuda.set_sync_debug_mode("default")
