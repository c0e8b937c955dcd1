"""The measurement of what a packed base costs: that it measures, not what."""

import gc
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftcli.quantization import quantize
from peftcli.recipe import QuantizationSection

SCRIPT = Path(__file__).parents[2] / "scripts" / "nf4_costs.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("nf4_costs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_measures_every_base(recipe_file, script):
    command = [sys.executable, SCRIPT, "--recipe", recipe_file(), "--bases", "nf4", "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["bases"]
    assert list(found) == ["float32", "nf4"]
    for row in found.values():
        assert row["imports_gb"] > 0.05
        assert min(row["loading_gb"], row["training_gb"]) > 0
        assert row["peak_gb"] == max(row["loading_gb"], row["training_gb"])
        assert min(row["seconds"], row["loss"], row["base_loss"]) > 0
        assert row["ratios"][0] <= row["ratio"] <= row["ratios"][1]
    dense, packed = found.values()
    assert "bits" not in dense
    assert (dense["ratio"], dense["share"]) == (1, 1)
    gains = [row["base_loss"] - row["loss"] for row in (dense, packed)]
    assert packed["share"] == pytest.approx(gains[1] / gains[0])
    assert packed["bits"] > 4.5  # and what the tables take
    assert packed["weights_gb"] < dense["weights_gb"]
    assert packed["base_loss"] != dense["base_loss"]
    lines = script.table(found).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| float32", "| nf4"]
    assert len({line.count("|") for line in lines}) == 1


def test_a_mistake_in_the_recipe_is_said_once(recipe_file):
    path = recipe_file(training={"max_stepz": 2})
    done = subprocess.run([sys.executable, SCRIPT, "--recipe", path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("max_stepz") == 1
    assert "Traceback" not in done.stderr


def held_by_the_process():
    gc.collect()
    # By type: `isinstance` would ask some objects of the libraries for their class, at which they warn.
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.device.type == "cpu"]
    # What compiling leaves behind, in a test before this one, has no memory to point to.
    tensors = [one for one in tensors if not type(one).__module__.startswith("torch._")]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


@pytest.mark.parametrize(
    "section", [{"double_quant": False}, {"double_quant": True}, {"type": "int8"}], ids=["single", "double", "int8"]
)
def test_every_byte_that_a_model_holds_is_counted(section, script, make_model):
    """Against all tensors that came into being with it, wherever they hang."""
    wanted = QuantizationSection(**section)
    quantize(make_model(), wanted)  # what the library itself keeps from the first time on
    before = held_by_the_process()
    model = make_model()
    quantize(model, wanted)
    after = held_by_the_process()
    assert script.num_bytes(script.held(model)) == sum(size for key, size in after.items() if key not in before)
