"""Runs on one GPU: they learn what a CPU's learn, go on where they stopped, and hold what they promise."""

import gc
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peftcli import inject, methods, quantization
from peftcli.recipe import QuantizationSection, TrainingSection
from peftcli.run import applying, merging
from peftcli.run.subject import open_subject
from peftcli.training import optimizers
from tests.conftest import Recorder, tiny_llama_config
from tests.gpu.conftest import DEVICE, REHEARSAL, allocated, losses, needs_cuda, needs_real_cuda
from tests.tolerances import EXACT, HALF, LOSS_CURVE

pytestmark = needs_cuda
NAME = str(DEVICE)
TOLERANCE = {"no": LOSS_CURVE, "bf16": HALF[torch.bfloat16], "fp16": HALF[torch.float16]}
NF4 = {"type": "nf4", "compute_dtype": "bfloat16"}


# ---- as on a CPU ----


@pytest.mark.parametrize("wanted", ["no", "bf16", pytest.param("fp16", marks=needs_real_cuda)])
def test_it_learns_what_a_cpu_does(wanted, recipe, train, tmp_path):
    path = recipe()
    train(path, "output_dir=cpu", device="cpu")
    recorder = Recorder()
    facts = train(path, f"training.mixed_precision={wanted}", device=NAME, reporter=recorder)
    assert any(f"on {NAME}" in note and f"mixed precision {wanted}" in note for note in recorder.notes)
    expected, found = losses(tmp_path / "cpu"), losses(tmp_path / "run")
    assert len(found) == 12
    assert found == pytest.approx(expected, rel=TOLERANCE[wanted])
    on_cpu = json.loads((tmp_path / "cpu" / "manifest.json").read_text())
    evaluated = [one["result"]["eval"]["eval_loss"] for one in (facts, on_cpu)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=TOLERANCE[wanted])


@needs_real_cuda
def test_auto_is_bf16_where_the_hardware_has_it(recipe, train):
    recorder = Recorder()
    train(recipe(training={"max_steps": 1}), device=NAME, reporter=recorder)
    expected = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    assert any(note.endswith(f"mixed precision {expected}") for note in recorder.notes)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_on_nf4_it_learns_what_a_cpu_does_and_merges_there(name, recipe, train, tmp_path):
    """The merge packs the original weights on a CPU: what it writes must be what was trained beside on the GPU."""
    path = recipe(method={"type": name, "r": 4}, quantization=NF4)
    train(path, "output_dir=cpu", "quantization.compute_dtype=float32", device="cpu")
    facts = train(path, "training.mixed_precision=no", device=NAME)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "cpu"), rel=HALF[torch.bfloat16])
    subject = open_subject(tmp_path / "run", None, None)
    merging.merge(subject, tmp_path / "run" / "merged", None, Recorder(), overwrite=False)
    found = applying.evaluate(open_subject(tmp_path / "run", None, None), None, None, NAME, Recorder())
    trained = facts["result"]["eval"]["eval_loss"]
    assert found["adapter"]["eval_loss"] == pytest.approx(trained, rel=HALF[torch.bfloat16])
    assert found["merged"]["eval_loss"] == pytest.approx(trained, rel=HALF[torch.bfloat16])


def test_int8_trains(recipe, train, tmp_path):
    """On a GPU the inputs are rounded in training too, so that the path is its own."""
    train(recipe(quantization={"type": "int8"}), "training.mixed_precision=no", device=NAME)
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]


@pytest.mark.parametrize("wanted", ["no", "bf16"])
def test_gradient_checkpointing_learns_the_same(wanted, recipe, train, tmp_path):
    path = recipe(method={"type": "lora", "r": 4, "dropout": 0.2})
    for on in ("false", "true"):
        changes = (f"training.gradient_checkpointing={on}", f"training.mixed_precision={wanted}")
        train(path, *changes, f"output_dir={on}", device=NAME)
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=EXACT[torch.float32])


def test_one_device_of_several_may_be_named(recipe, cli, tmp_path):
    """A named one is used alone, however many there are."""
    name = "cpu" if REHEARSAL else "cuda:0"
    code, _, said = cli("train", recipe(training={"max_steps": 2}), "--device", name)
    assert code == 0, said
    assert f"on {name}" in " ".join(said.split())
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["processes"] == 1


# ---- going on ----


RESUMED = [
    ("adamw", "no"),
    pytest.param("adamw", "fp16", marks=needs_real_cuda),
    ("adamw_8bit", "no"),
    ("adamw_8bit", "bf16"),
    ("lion_8bit", "no"),
    ("paged_adamw_32bit", "no"),
    ("paged_adamw_8bit", "no"),
    pytest.param("paged_adamw_8bit", "fp16", marks=needs_real_cuda),
    ("adafactor", "no"),
]


@pytest.mark.parametrize(("optim", "wanted"), RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(optim, wanted, recipe, train, wide_folder, tmp_path):
    """With pages, 8 bits and the loss scale: all of it comes back from the checkpoint."""
    path = recipe(
        model={"name": str(wide_folder)},
        method={"type": "lora", "r": 200, "target_modules": ["q_proj"], "dropout": 0.2},
        training={"max_steps": 6, "save_steps": 3, "optim": optim, "mixed_precision": wanted, "learning_rate": 1e-3},
    )
    recorder = Recorder()
    train(path, "output_dir=whole", device=NAME, reporter=recorder)
    if optim.startswith("paged") and not REHEARSAL:
        assert any("are paged; " in note for note in recorder.notes)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    recorder = Recorder()
    train(path, device=NAME, resume=True, reporter=recorder)
    assert recorder.first_step == 3
    for file in ("adapter_model.safetensors", "checkpoint-6/optimizer.safetensors"):
        found, expected = (load_file(tmp_path / run / file) for run in ("run", "whole"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), file


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_an_optimizer_holds_its_moments_as_its_name_says(optim):
    model = nn.Sequential(nn.Linear(512, 256, bias=False)).to(DEVICE)
    settings = TrainingSection(optim=optim)
    optimizer = optimizers.make_optimizer(model, settings, 1e-3, 1e-3)
    model(torch.randn(4, 512, device=DEVICE)).square().mean().backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert bool((model[0].weight != before).all())
    moment = optimizer.state[model[0].weight]["state1"]
    assert moment.dtype == (torch.float32 if "32bit" in optim else torch.uint8)
    assert getattr(moment, "is_paged", False) == (optim.startswith("paged") and DEVICE.type == "cuda")


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_those_optimizers_learn_what_adamw_does(optim, recipe, train, wide_folder, tmp_path):
    path = recipe(
        model={"name": str(wide_folder)},
        method={"type": "lora", "r": 200, "target_modules": ["q_proj"]},
        training={"learning_rate": 1e-3, "mixed_precision": "no"},
    )
    for one in ("adamw", optim):
        train(path, f"training.optim={one}", f"output_dir={one}", device=NAME)
    found, expected = losses(tmp_path / optim), losses(tmp_path / "adamw")
    assert found == pytest.approx(expected, rel=HALF[torch.bfloat16] if "8bit" in optim else LOSS_CURVE)


# ---- memory ----


def held(kind):
    """Returns the bytes that a Llama of 50 million parameters and its LoRA take, its linear layers in `kind`."""
    from transformers import AutoModelForCausalLM

    gc.collect()
    before = allocated()
    sizes = {"hidden_size": 256, "num_hidden_layers": 1} if REHEARSAL else {"hidden_size": 1024, "num_hidden_layers": 4}
    config = tiny_llama_config(**sizes, intermediate_size=2 * sizes["hidden_size"])
    model = AutoModelForCausalLM.from_config(config).to(DEVICE, torch.bfloat16)
    if kind != "bf16":
        quantization.quantize(model, QuantizationSection(type=kind), {"lm_head"})
    lora = methods.load("lora")
    inject.graft(model, lora, lora.Config(r=4), 0)
    loss = model(input_ids=torch.arange(64, device=DEVICE)[None]).logits.float().square().mean()
    loss.backward()
    del loss
    gc.collect()
    return allocated() - before


def test_a_packed_base_takes_the_memory_of_its_bits():
    """16 bits a weight, 8, and 4.13; the embedding and the head, a fortieth of it, stay in bfloat16."""
    dense, int8, nf4 = (held(kind) for kind in ("bf16", "int8", "nf4"))
    if not REHEARSAL:
        assert 0.45 < int8 / dense < 0.65
        assert 0.2 < nf4 / dense < 0.4


def test_a_run_on_a_packed_base_peaks_lower(recipe, train, wide_folder):
    """From the first weight that is loaded on: they are packed one by one."""
    peaks = []
    for kind in ("none", "nf4"):
        if not REHEARSAL:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        changes = [] if kind == "none" else [f"quantization.type={kind}"]
        path = recipe(model={"name": str(wide_folder), "dtype": "bfloat16"}, training={"max_steps": 2})
        facts = train(path, *changes, f"output_dir={kind}", device=NAME)
        peaks.append(facts["result"]["train"]["memory_gb"])
    if not REHEARSAL:
        assert peaks[1] < peaks[0]
