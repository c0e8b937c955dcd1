"""Adapter folders: what is written is read again, and what is not whole, not known or not fitting is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from peftcli import files, inject
from peftcli.checkpoint.adapter import BASE_PREFIX, CONFIG_FILE, WEIGHTS_FILE, attach, read_adapter, save_adapter
from peftcli.checkpoint.seal import SEAL_FILE
from peftcli.errors import HostError, ModelError, NumericalError
from tests.conftest import tiny_llama_config
from tests.methods.building import adapt, logits, origin_of, randomise, token_ids

TARGETS = ["q_proj", "down_proj"]
A_KEY = f"{BASE_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
B_KEY = f"{BASE_PREFIX}model.layers.1.mlp.down_proj.lora_B.weight"
M_KEY = f"{BASE_PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector"


def write(folder, model, name="lora", targets=TARGETS, **fields):
    """Adapts `model` with random tensors and saves its adapter."""
    config, _ = adapt(model, name, targets, **{"r": 4, "alpha": 6.0, **fields})
    randomise(model)
    folder.mkdir(exist_ok=True)
    save_adapter(folder, model, origin_of(name, config, base_model="org/base"))
    return config


@pytest.fixture
def saved(tmp_path, make_model):
    """Returns the folder of an adapter that is whole; `saved("dora")` that of a DoRA."""

    def make(name="lora", **fields):
        write(tmp_path / name, make_model(), name, **fields)
        return tmp_path / name

    return make


def read_config(folder):
    return json.loads((folder / CONFIG_FILE).read_text())


def set_config(**changes):
    """Returns a damage: fields of the JSON changed, or taken out where the value is `...`."""

    def damage(folder):
        fields = {**read_config(folder), **changes}
        kept = {key: value for key, value in fields.items() if value is not ...}
        (folder / CONFIG_FILE).write_text(json.dumps(kept))

    return damage


def set_tensors(change):
    """Returns a damage: the file's tensors after `change` has edited the dictionary."""

    def damage(folder):
        tensors = load_file(folder / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_FILE)

    return damage


def put(key, make):
    return set_tensors(lambda tensors: tensors.update({key: make(tensors.get(key))}))


def poke(value):
    def make(tensor):
        tensor.flatten()[-1] = value
        return tensor

    return make


def cut(name, share):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def only_a_pickle(folder):
    (folder / WEIGHTS_FILE).unlink()
    torch.save({}, folder / "adapter_model.bin")


def swap_lengths(tensors):
    """A and B change places: the same number of values, each of another shape."""
    tensors[A_KEY] = tensors[A_KEY].t().contiguous()


TENSOR_DAMAGES = {
    "a tensor is missing": (set_tensors(lambda t: t.pop(A_KEY)), f"{A_KEY} is missing"),
    "a tensor is left over": (put(A_KEY + "2", lambda _: torch.zeros(2)), f"{A_KEY}2 belongs to no adapted module"),
    "a tensor was renamed": (set_tensors(lambda t: t.update({"x": t.pop(A_KEY)})), f"{A_KEY} is missing; x belongs to"),
    "a module too many": (
        put(A_KEY.replace("q_proj", "k_proj"), lambda _: torch.zeros(4, 48)),
        "k_proj.lora_A.weight belongs to no adapted module",
    ),
    "a row too many": (put(A_KEY, lambda t: torch.cat([t, t[:1]])), "has shape [5, 48], not [4, 48]"),
    "a column too few": (put(A_KEY, lambda t: t[:, 1:].contiguous()), "has shape [4, 47], not [4, 48]"),
    "transposed": (set_tensors(swap_lengths), "has shape [48, 4], not [4, 48]"),
    "one value for all": (put(B_KEY, lambda _: torch.ones(())), f"{B_KEY} has shape [], not [48, 4]"),
    "whole numbers": (put(B_KEY, lambda t: t.int()), f"{B_KEY} holds torch.int32"),
    "truth values": (put(B_KEY, lambda t: t > 0), f"{B_KEY} holds torch.bool"),
    "NaN": (put(B_KEY, poke(float("nan"))), f"{B_KEY} holds values that are not finite"),
    "infinity": (put(B_KEY, poke(float("-inf"))), f"{B_KEY} holds values that are not finite"),
    "a base weight": (
        put(BASE_PREFIX + "model.norm.weight", lambda _: torch.zeros(48)),
        "other than this base model's",
    ),
    "no tensors": (set_tensors(dict.clear), f"{A_KEY} is missing"),
    "no weights file": (lambda folder: (folder / WEIGHTS_FILE).unlink(), f"it has no {WEIGHTS_FILE}"),
    "a pickle alone": (only_a_pickle, "adapter_model.bin is a pickle and is never read"),
    "an empty file": (cut(WEIGHTS_FILE, 0), f"{WEIGHTS_FILE} is damaged"),
    "half a file": (cut(WEIGHTS_FILE, 0.5), f"{WEIGHTS_FILE} is damaged"),
    "all but its last bytes": (cut(WEIGHTS_FILE, 0.99), f"{WEIGHTS_FILE} is damaged"),
    "no safetensors": (lambda folder: (folder / WEIGHTS_FILE).write_text("hello there"), f"{WEIGHTS_FILE} is damaged"),
}

CONFIG_DAMAGES = {
    "no config": (lambda folder: (folder / CONFIG_FILE).unlink(), f"it has no {CONFIG_FILE}"),
    "an empty config": (cut(CONFIG_FILE, 0), f"{CONFIG_FILE} cannot be read"),
    "half a config": (cut(CONFIG_FILE, 0.5), f"{CONFIG_FILE} cannot be read"),
    "a list": (lambda folder: (folder / CONFIG_FILE).write_text("[]"), f"{CONFIG_FILE} cannot be read"),
    "no text": (lambda folder: (folder / CONFIG_FILE).write_bytes(b"\xff\xfe{}"), f"{CONFIG_FILE} cannot be read"),
    "no peft_type": (set_config(peft_type=...), "peft_type None is not a method of this version"),
    "another method": (set_config(peft_type="LOHA"), "peft_type LOHA is not a method of this version"),
    "no r": (set_config(r=...), f"{CONFIG_FILE}: r is missing"),
    "r is null": (set_config(r=None), f"{CONFIG_FILE}: r"),
    "r is zero": (set_config(r=0), f"{CONFIG_FILE}: r"),
    "r is text": (set_config(r="4"), f"{CONFIG_FILE}: r"),
    "another r": (set_config(r=8), "has shape [4, 48], not [8, 48]"),
    "no alpha": (set_config(lora_alpha=...), f"{CONFIG_FILE}: lora_alpha is missing"),
    "alpha is null": (set_config(lora_alpha=None), f"{CONFIG_FILE} cannot be read"),
    "alpha is text": (set_config(lora_alpha="six"), f"{CONFIG_FILE} cannot be read"),
    "alpha is zero": (set_config(lora_alpha=0), f"{CONFIG_FILE}: alpha"),
    "alpha is infinite": (set_config(lora_alpha=float("inf")), f"{CONFIG_FILE}: alpha"),
    "alpha is not a number": (set_config(lora_alpha=float("nan")), f"{CONFIG_FILE}: alpha"),
    "all is dropped": (set_config(lora_dropout=1.0), f"{CONFIG_FILE}: dropout"),
    "ranks are a list": (set_config(rank_pattern=["q_proj"]), f"{CONFIG_FILE} cannot be read"),
    "a rank is null": (set_config(rank_pattern={"q_proj": None}), f"{CONFIG_FILE}: rank_pattern"),
    "an alpha of a module is null": (set_config(alpha_pattern={"q_proj": None}), f"{CONFIG_FILE} cannot be read"),
    "a rank's pattern is broken": (set_config(rank_pattern={"(q": 4}), "not a regular expression"),
    "a rank of no module": (set_config(rank_pattern={"v_proj": 4}), "v_proj matches none of the adapted modules"),
    "another rank of a module": (set_config(rank_pattern={"q_proj": 2}), "has shape [4, 48], not [2, 48]"),
    "no targets": (set_config(target_modules=...), f"{CONFIG_FILE}: target_modules is missing"),
    "targets are null": (set_config(target_modules=None), f"{CONFIG_FILE}: target_modules"),
    "targets are numbers": (set_config(target_modules=[1]), f"{CONFIG_FILE}: target_modules"),
    "a target too few": (set_config(target_modules=["q_proj"]), "down_proj.lora_A.weight belongs to no adapted module"),
    "a target too many": (set_config(target_modules=[*TARGETS, "v_proj"]), "v_proj.lora_A.weight is missing"),
    "a target of no model": (set_config(target_modules=[*TARGETS, "c_attn"]), 'no module matches "c_attn"'),
    "a broken pattern": (set_config(target_modules="(q_proj"), "is not a regular expression"),
    "an exclusion": (set_config(exclude_modules=["q_proj"]), "q_proj.lora_A.weight belongs to no adapted module"),
    "fewer layers": (set_config(layers_to_transform=[0]), "layers.1.mlp.down_proj.lora_A.weight belongs to no adapted"),
    "one layer": (set_config(layers_to_transform=0), "layers.1.mlp.down_proj.lora_A.weight belongs to no adapted"),
    "a layer that is not there": (set_config(layers_to_transform=[0, 1, 2]), "there is no layer 2"),
    "layers as text": (set_config(layers_to_transform="0"), f"{CONFIG_FILE}: layers"),
    "called a DoRA": (set_config(use_dora=True), "lora_magnitude_vector is missing"),
}

UNSUPPORTED = {
    "bias": "all",
    "lora_bias": True,
    "trainable_token_indices": [3],
    "target_parameters": ["experts.gate_up_proj"],
    "layer_replication": [[0, 1]],
    "layers_pattern": "layers",
    "alora_invocation_tokens": [1, 2],
    "megatron_config": {"x": 1},
    "use_qalora": True,
    "ensure_weight_tying": True,
    "a_setting_of_tomorrow": 1,
}
CHANGE_THE_BASE = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA"]


def refuses(folder, model, expected):
    with pytest.raises(ModelError) as raised:
        attach(model, read_adapter(folder))
    assert expected in str(raised.value)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(("damage", "expected"), TENSOR_DAMAGES.values(), ids=TENSOR_DAMAGES)
def test_damaged_tensors_are_refused_by_name(damage, expected, saved, make_model):
    folder = saved()
    damage(folder)
    refuses(folder, make_model(), expected)


@pytest.mark.parametrize(("damage", "expected"), CONFIG_DAMAGES.values(), ids=CONFIG_DAMAGES)
def test_a_damaged_config_is_refused_by_name(damage, expected, saved, make_model):
    folder = saved()
    damage(folder)
    refuses(folder, make_model(), expected)


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_a_setting_that_would_be_lost_is_refused_by_name(key, value, saved, make_model):
    folder = saved()
    set_config(**{key: value})(folder)
    refuses(folder, make_model(), f"the adapter uses {key} = {value}")


def test_settings_that_would_be_lost_are_all_named(saved, make_model):
    folder = saved()
    set_config(bias="lora_only", layer_replication=[[0, 2]])(folder)
    refuses(folder, make_model(), "layer_replication = [[0, 2]], bias = lora_only, which")


@pytest.mark.parametrize("init", CHANGE_THE_BASE)
def test_a_start_that_moved_the_base_is_refused(init, saved, make_model):
    folder = saved()
    set_config(init_lora_weights=init)(folder)
    refuses(folder, make_model(), f"init_lora_weights = {init} (its base is not the one it names)")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", None])
def test_a_start_that_did_not_is_no_matter(init, saved, make_model):
    folder = saved()
    set_config(init_lora_weights=init)(folder)
    attach(make_model(), read_adapter(folder))


def test_settings_at_rest_are_no_matter(saved, make_model):
    folder = saved()
    set_config(lora_bias=False, layers_pattern=None, loftq_config={}, eva_config=None, fan_in_fan_out=True)(folder)
    attach(make_model(), read_adapter(folder))


def test_a_dora_that_is_called_a_lora(saved, make_model):
    folder = saved("dora")
    set_config(use_dora=False)(folder)
    refuses(folder, make_model(), f"{M_KEY} belongs to no adapted module")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m[None], "has shape [1, 48], not [48]"),
        (lambda m: m * float("nan"), "holds values that are not finite"),
    ],
)
def test_a_doras_magnitudes_are_checked_too(change, expected, saved, make_model):
    folder = saved("dora")
    put(M_KEY, change)(folder)
    refuses(folder, make_model(), f"{M_KEY} {expected}")


def test_at_most_ten_tensors_are_named(saved, make_model):
    folder = saved(targets="all-linear")
    set_tensors(dict.clear)(folder)
    with pytest.raises(ModelError) as raised:
        attach(make_model(), read_adapter(folder))
    assert str(raised.value).count(" is missing") == 10
    assert " and 18 more" in str(raised.value)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ModelError, match="there is no such folder"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=f"it has no {CONFIG_FILE}") as raised:
        read_adapter(tmp_path)
    assert WEIGHTS_FILE in raised.value.problems[0].hint


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("gpt2", {}, "does not fit this base model: method.target_modules: no module matches"),
        ("llama", {"hidden_size": 64}, "has shape [4, 48], not [4, 64]"),
        ("llama", {"num_hidden_layers": 1}, "model.layers.1.mlp.down_proj.lora_A.weight belongs to no adapted module"),
        ("llama", {"num_hidden_layers": 3}, "model.layers.2.mlp.down_proj.lora_A.weight is missing"),
    ],
)
def test_another_base_is_refused(family, changes, expected, saved, make_model):
    refuses(saved(), make_model(family, **changes), expected)


# ---- what is written ----


def test_what_the_config_says(saved):
    folder = saved("dora", dropout=0.1, rslora=True, rank_pattern={"q_proj": 2})
    fields = read_config(folder)
    assert fields == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "revision": "main",
        "inference_mode": True,
        "target_modules": ["down_proj", "q_proj"],
        "modules_to_save": None,
        "r": 4,
        "lora_alpha": 6.0,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "use_dora": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {},
    }
    assert {file.name for file in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, SEAL_FILE}


@pytest.mark.parametrize(("name", "init"), [("lora", "kaiming"), ("dora", "kaiming"), ("lora", "pissa")])
def test_what_is_read_is_what_was_configured(name, init, saved):
    fields = {"dropout": 0.1, "rslora": True, "alpha": None}
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 5.0}}
    adapter = read_adapter(saved(name, init=init, **fields, **patterns))
    growth = 2 if init == "pissa" else 1
    assert (adapter.method.Config.model_fields["type"].default, adapter.base_model) == (name, "org/base")
    assert (adapter.config.r, adapter.config.rank_at("x.q_proj"), adapter.config.dropout) == (
        4 * growth,
        2 * growth,
        0.1,
    )
    scales = [adapter.config.scale_at(f"model.layers.{layer}.mlp.down_proj") for layer in (0, 1)]
    assert scales == [pytest.approx(8 / 4**0.5), pytest.approx(5 / 4**0.5)]
    assert adapter.config.scale_at("model.layers.1.self_attn.q_proj") == pytest.approx(4 / 2**0.5)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "mlp.down_proj"], ["down_proj", "q_proj"]),
        (["layers.0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]),
        (r".*\.(up|gate)_proj", ["gate_proj", "up_proj"]),
    ],
    ids=str,
)
def test_targets_are_written_as_short_as_they_can_be(targets, expected, saved):
    assert read_config(saved(targets=targets))["target_modules"] == expected


def test_a_name_that_another_module_shares_is_written_with_its_path(make_model, tmp_path):
    """GPT-2 has a c_proj in its attention and one in its MLP."""
    write(tmp_path / "a", make_model("gpt2"), targets=["attn.c_proj"])
    paths = [f"transformer.h.{layer}.attn.c_proj" for layer in (0, 1)]
    assert read_config(tmp_path / "a")["target_modules"] == paths


def test_a_pissa_adapter_is_read_as_a_lora_of_twice_the_rank(make_model, tmp_path):
    model, ids = make_model(), token_ids()
    write(tmp_path / "a", model, init="pissa")
    again = make_model()
    attach(again, read_adapter(tmp_path / "a"))
    assert {len(adapter.A) for adapter in inject.adapters(again).values()} == {8}
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_half_precision_files_are_read_into_float32(saved, make_model):
    folder = saved()
    half = {key: tensor.bfloat16() for key, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(half, folder / WEIGHTS_FILE)
    model = make_model()
    attach(model, read_adapter(folder))
    adapter = inject.adapters(model)["model.layers.0.self_attn.q_proj"]
    assert adapter.A.dtype == torch.float32
    assert torch.equal(adapter.A, half[A_KEY].float())


def test_a_write_that_went_wrong_is_noticed(make_model, tmp_path, monkeypatch):
    honest = files.write_safetensors

    def damaging(path, tensors, metadata=None):
        honest(path, {**tensors, A_KEY: tensors[A_KEY] + 1e-7}, metadata)

    monkeypatch.setattr(files, "write_safetensors", damaging)
    with pytest.raises(ModelError, match="differs from the adapter in memory"):
        write(tmp_path / "a", make_model())


def test_what_is_not_finite_is_not_written(make_model, tmp_path):
    model = make_model()
    config, _ = adapt(model, "lora", TARGETS)
    next(iter(inject.adapters(model).values())).B.data[0, 0] = float("inf")
    with pytest.raises(NumericalError, match=r"cannot be saved: .*q_proj\.lora_B\.weight holds values that"):
        save_adapter(tmp_path, model, origin_of("lora", config))
    assert not list(tmp_path.iterdir())


def test_what_is_empty_is_not_written(make_model, tmp_path):
    """As a tensor is whose numbers are on other processes."""
    model = make_model()
    config, _ = adapt(model, "lora", TARGETS)
    adapter = next(iter(inject.adapters(model).values()))
    adapter.B.data = adapter.B.data[:0]
    with pytest.raises(ModelError, match=r"the adapter cannot be saved: .*q_proj\.lora_B\.weight is empty"):
        save_adapter(tmp_path, model, origin_of("lora", config))
    assert not list(tmp_path.iterdir())


def test_a_config_that_went_wrong_is_noticed(make_model, tmp_path, monkeypatch):
    honest = files.write_json

    def damaging(path, fields):
        honest(path, {**fields, "lora_alpha": 7} if path.name == CONFIG_FILE else fields)

    monkeypatch.setattr(files, "write_json", damaging)
    with pytest.raises(ModelError, match=r"lora_alpha was 6\.0, is 7, a moment ago"):
        write(tmp_path / "a", make_model())


@pytest.mark.parametrize("heads", [["classifier", "score"], ["score"]])
def test_heads_that_peft_lists_whichever_there_is(heads, saved, make_model):
    """PEFT names both for every labelling model; but one of them must be there."""
    folder = saved()
    set_config(modules_to_save=heads)(folder)
    refuses(folder, make_model(), f"modules_to_save: no module matches {', '.join(heads)}")
    config = tiny_llama_config(num_labels=3)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    refuses(folder, model, "score.weight is missing")


def test_a_folder_that_cannot_be_written(make_model, tmp_path):
    model = make_model()
    config, _ = adapt(model, "lora", TARGETS)
    with pytest.raises(HostError, match="cannot write"):
        save_adapter(tmp_path / "nowhere", model, origin_of("lora", config))


def test_tensors_are_read_by_name_not_by_order(saved, make_model):
    folder = saved()
    model, again, ids = make_model(), make_model(), token_ids()
    attach(model, read_adapter(folder))
    tensors = load_file(folder / WEIGHTS_FILE)
    other = shutil.copytree(folder, folder.with_name("other"))
    save_file(dict(reversed(tensors.items())), other / WEIGHTS_FILE)
    attach(again, read_adapter(other))
    assert torch.equal(logits(model, ids), logits(again, ids))
