"""A DeepSpeed file beside a recipe: what is filled in, what must agree, and what is refused."""

import json

import pytest

from peftcli import recipe
from peftcli.errors import RecipeError
from peftcli.run.inspecting import validate
from peftcli.training import zero_settings
from tests.conftest import Recorder
from tests.distributed.conftest import ROOT

USUAL = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
"""As other trainers' examples have it."""


@pytest.fixture
def loaded(recipe_file, tmp_path):
    """Returns a recipe whose DeepSpeed file says `values`, or is `text`."""

    def load(values=None, text=None, **training):
        (tmp_path / "ds.json").write_text(json.dumps(values) if text is None else text)
        settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, **training}
        section = {"strategy": "deepspeed", "deepspeed_config": "ds.json"}
        return recipe.load(recipe_file(training=settings, distributed=section))

    return load


def problems(*arguments, **named):
    with pytest.raises(RecipeError) as raised:
        zero_settings.read(*arguments, **named)
    return raised.value.problems


def test_what_the_recipe_says_is_filled_in(loaded):
    found = zero_settings.read(loaded(USUAL), "bf16", 3)
    own = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
    }
    assert found.values == {**USUAL, **own}
    assert found.stage == 3
    left_out = {"zero_optimization": USUAL["zero_optimization"]}
    assert zero_settings.read(loaded(left_out), "bf16", 3).values == {**left_out, **own}


def test_what_does_nothing_is_said(loaded):
    found = zero_settings.read(loaded(USUAL), "no", 2)
    about_training = ["contiguous_gradients", "sub_group_size", "reduce_bucket_size"]
    about_training.append("stage3_gather_16bit_weights_on_model_save")
    assert found.idle == ("zero_allow_untested_optimizer", *(f"zero_optimization.{key}" for key in about_training))
    (remark,) = found.remarks(1000)
    assert remark.endswith(", ".join(found.idle))
    minimal = json.loads((ROOT / "configs" / "deepspeed_zero3.json").read_text())
    assert not list(zero_settings.read(loaded(minimal), "no", 2).remarks(1000))


def test_a_stage_that_spreads_what_trains_is_said_to_be_ddp(loaded):
    found = zero_settings.read(loaded({"zero_optimization": {"stage": 2, "overlap_comm": True}}), "no", 2)
    first, second = found.remarks(1234)
    assert "ZeRO-2" in first
    assert "1,234 parameters" in first
    assert "strategy ddp" in first
    assert second.endswith("zero_optimization.overlap_comm")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"train_batch_size": 8},
            "train_batch_size: 8 contradicts training.per_device_train_batch_size: 4 samples × 2",
        ),
        ({"train_micro_batch_size_per_gpu": 2}, "contradicts training.per_device_train_batch_size: 4"),
        ({"gradient_accumulation_steps": 1}, "contradicts training.gradient_accumulation_steps: 2"),
        ({"gradient_clipping": 1.0}, "gradient_clipping: 1.0 contradicts training.max_grad_norm: 0.5"),
        ({"bf16": {"enabled": False}}, "bf16.enabled: false contradicts training.mixed_precision: auto, which is bf16"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: true contradicts training.mixed_precision: auto, which is bf16"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer: DeepSpeed would replace what the recipe asks for"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: DeepSpeed would replace"),
        ({"flops_profiler": {"enabled": True}}, "flops_profiler: nothing here reads it"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage: must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: must be 1, 2 or 3"),
        ({"zero_optimization": True}, "zero_optimization.stage: must be 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights: it would round the base's weights",
        ),
    ],
)
def test_what_is_refused(loaded, values, message):
    (problem,) = problems(loaded({"zero_optimization": {"stage": 3}, **values}), "bf16", 3)
    assert message in problem.message
    assert problem.where == "ds.json"
    assert problem.hint


def test_everything_at_once(loaded):
    assert len(problems(loaded({"optimizer": {}, "gradient_clipping": 2.0, "amp": {}}), "no", 2)) == 4


def test_values_that_agree(loaded):
    values = {"zero_optimization": {"stage": 3}, "gradient_clipping": 0, "train_batch_size": 16, "fp16": {}}
    assert zero_settings.read(loaded(values, max_grad_norm=None), "no", 2).values["gradient_clipping"] == 0


@pytest.mark.parametrize(
    ("text", "message", "where"),
    [
        ('{"zero_optimization":\n {"stage": 3,}}', "not valid JSON", "ds.json:2"),
        ("", "not valid JSON", "ds.json:1"),
        ("[]", "not a DeepSpeed configuration", "ds.json"),
        ('{"a": 1, "a": 2}', "ds.json cannot be read: a is there twice", "recipe.yaml:"),
    ],
)
def test_a_file_that_is_none(loaded, text, message, where):
    (problem,) = problems(loaded(text=text))
    assert message in problem.message
    assert where in problem.where


def test_no_file(loaded, tmp_path):
    wanted = loaded({})
    (tmp_path / "ds.json").unlink()
    (problem,) = problems(wanted)
    assert problem.message == "distributed.deepspeed_config: ds.json does not exist"
    assert "recipe.yaml:" in problem.where
    (tmp_path / "ds.json").mkdir()
    assert "cannot be read" in problems(wanted)[0].message


def test_it_is_looked_at_before_anything_runs(loaded):
    with pytest.raises(RecipeError, match=r"contradicts training\.max_grad_norm"):
        validate(loaded({"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}), Recorder())


def test_other_strategies_have_none(recipe_file):
    assert zero_settings.read(recipe.load(recipe_file()), "no", 2) is None
