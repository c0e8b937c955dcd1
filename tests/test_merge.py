"""Merged folders: plain transformers loads them and answers as base and adapter did."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli import merge, models
from peftcli.checkpoint.adapter import BASE_PREFIX, CONFIG_FILE, WEIGHTS_FILE, attach, read_adapter, save_adapter
from peftcli.errors import ModelError
from tests.methods.building import adapt, assert_close, logits, origin_of, randomise, token_ids
from tests.tolerances import EXACT, HALF

TOLERANCE = EXACT[torch.float32]
BOTH_ENDS = {"llama": ("embed_tokens", "lm_head"), "gpt2": ("wte", "lm_head")}
PREFIX = {"llama": "model.", "gpt2": "transformer."}


def load(folder, dtype=torch.float32):
    """Loads a folder as anyone would; not one weight may be missing, left over or of another shape."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def tensors_of(folder):
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


class Merging:
    """A base folder, an adapter on it with random tensors, and what merging one into the other gives."""

    def __init__(self, folder, model):
        self.base, self.adapter_folder, self.target = folder / "base", folder / "adapter", folder / "merged"
        model.save_pretrained(self.base)
        self.target.mkdir()

    def shard(self):
        model = load(self.base)
        (self.base / merge.SINGLE_FILE).unlink()
        model.save_pretrained(self.base, max_shard_size="20KB")
        assert len(list(self.base.glob("*.safetensors"))) > 5
        return self

    def rewrite(self, change):
        """Applies `change` to the base's tensors."""
        save_file(change(load_file(self.base / merge.SINGLE_FILE)), self.base / merge.SINGLE_FILE, {"format": "pt"})
        return self

    def adapt(self, method="lora", target_modules="all-linear", scale=0.1, **fields):
        model = load(self.base)
        config, _ = adapt(model, method, target_modules, **fields)
        randomise(model, scale)
        self.adapter_folder.mkdir()
        save_adapter(self.adapter_folder, model, origin_of(method, config, base_model=str(self.base)))
        return self

    def run(self, dtype=None):
        from transformers import AutoConfig

        skeleton = models.skeleton(AutoConfig.from_pretrained(self.base))
        return merge.merge_files(self.base, skeleton, read_adapter(self.adapter_folder), self.target, dtype)

    def adapted(self, dtype=torch.float32):
        model = load(self.base, dtype)
        attach(model, read_adapter(self.adapter_folder))
        return model

    def agrees(self):
        ids = token_ids()
        expected = logits(self.adapted(), ids)
        assert_close(logits(load(self.target), ids), expected, TOLERANCE)
        assert not torch.allclose(logits(load(self.base), ids), expected, rtol=0, atol=1e-3), "nothing was adapted"


@pytest.fixture
def make(tmp_path, make_model):
    def made(family="llama", dtype=torch.float32, *, tied=False):
        return Merging(tmp_path, make_model(family, dtype, tie_word_embeddings=tied))

    return made


# ---- it is the adapted model ----


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(("family", "count"), [("llama", 14), ("gpt2", 8)])
def test_a_merged_folder_answers_as_base_and_adapter(family, count, method, tied, sharded, make):
    case = make(family, tied=tied)
    if sharded:
        case.shard()
    before = {path.name: path.read_bytes() for path in case.base.iterdir()}
    assert case.adapt(method).run() == count
    case.agrees()
    assert {path.name: path.read_bytes() for path in case.base.iterdir()} == before, "the base was written into"
    assert {path.name for path in case.target.iterdir()} == set(before)
    assert config_of(case.target) == config_of(case.base)
    old, new = tensors_of(case.base), tensors_of(case.target)
    assert {key: tensor.dtype for key, tensor in new.items()} == {key: tensor.dtype for key, tensor in old.items()}
    changed = {key for key, tensor in new.items() if not torch.equal(tensor, old[key])}
    assert len(changed) == count
    assert all(key.endswith(".weight") and "norm" not in key and "ln_" not in key for key in changed)


@pytest.mark.parametrize(
    "fields",
    [
        {"init": "pissa"},
        {"rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.up_proj": 3.0}},
        {"layers": [1], "exclude_modules": ["down_proj"]},
        {"target_modules": r".*\.layers\.0\.mlp\..*"},
    ],
    ids=str,
)
def test_merging_follows_the_adapters_settings(fields, make):
    case = make().adapt(**fields)
    case.run()
    case.agrees()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.filterwarnings("ignore:::peft", "ignore::FutureWarning:transformers")
def test_an_adapter_of_pefts_with_the_base_weights_that_it_adds(use_dora, make):
    from peft import LoraConfig, get_peft_model

    case = make()
    settings = {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "task_type": "CAUSAL_LM"}
    theirs = get_peft_model(load(case.base), LoraConfig(**settings, use_dora=use_dora, init_lora_weights=False))
    theirs.save_pretrained(case.adapter_folder)
    assert any("base_layer" in key for key in load_file(case.adapter_folder / WEIGHTS_FILE))
    assert case.run() == 3
    case.agrees()
    ids = token_ids()
    assert_close(logits(load(case.target), ids), logits(theirs.eval(), ids), TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_checkpoint_that_leaves_out_the_inner_models_name(family, method, make):
    """As GPT-2's own does: `h.0.attn.c_attn.weight` for `transformer.h.0.attn.c_attn.weight`."""
    case = make(family, tied=True)
    case.rewrite(lambda tensors: {key.removeprefix(PREFIX[family]): value for key, value in tensors.items()})
    case.adapt(method).run()
    case.agrees()
    assert tensors_of(case.target).keys() == tensors_of(case.base).keys()


def test_a_folder_with_both_layouts_is_read_as_transformers_reads_it(make):
    """One file goes before many; stale shards beside it are no part of the model."""
    case = make()
    single = (case.base / merge.SINGLE_FILE).read_bytes()
    case.rewrite(lambda tensors: {key: 2 * tensor for key, tensor in tensors.items()}).shard()
    (case.base / merge.SINGLE_FILE).write_bytes(single)
    case.adapt().run()
    case.agrees()
    assert [path.name for path in case.target.glob("model*")] == [merge.SINGLE_FILE]


# ---- tied embeddings ----


@pytest.mark.parametrize("layout", ["one file", "sharded", "without prefix"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("end", [0, 1], ids=["embedding", "head"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_on_one_end_of_a_tied_weight_unties_it(family, end, method, layout, make):
    case = make(family, tied=True)
    if layout == "sharded":
        case.shard()
    elif layout == "without prefix":
        case.rewrite(lambda tensors: {key.removeprefix(PREFIX[family]): value for key, value in tensors.items()})
    stored = tensors_of(case.base)
    assert case.adapt(method, [BOTH_ENDS[family][end]]).run() == 1
    case.agrees()
    assert config_of(case.target) == {**config_of(case.base), "tie_word_embeddings": False}
    merged = tensors_of(case.target)
    (extra,) = merged.keys() - stored.keys()
    (shared,) = (key for key in stored if BOTH_ENDS[family][0] in key)
    assert extra == "lm_head.weight"
    assert torch.equal(merged[extra if end == 0 else shared], stored[shared])
    assert not torch.equal(merged[extra], merged[shared])
    if layout == "sharded":
        index = json.loads((case.target / merge.INDEX_FILE).read_text())["weight_map"]
        found = {key: file.name for file in case.target.glob("*.safetensors") for key in load_file(file)}
        assert index == found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_on_both_ends_of_a_tied_weight_cannot_be_merged(family, make):
    case = make(family, tied=True).adapt("lora", list(BOTH_ENDS[family]))
    with pytest.raises(ModelError, match="share one weight and both are adapted"):
        case.run()
    assert not list(case.target.iterdir())


def test_both_ends_of_an_untied_model_are_merged(make):
    case = make().adapt("lora", list(BOTH_ENDS["llama"]))
    assert case.run() == 2
    case.agrees()


# ---- dtypes ----


def rounded_once(case, dtype):
    """Returns the weights as they must be: base and adapter in float32, rounded at the end."""
    expected = {}
    for name, module in case.adapted().named_modules():
        if hasattr(module, "adapter"):
            expected[f"{name}.weight"] = module.adapter.merged(module.weight).detach().to(dtype)
    return expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_base_in_half_precision_stays_so(method, dtype, make):
    case = make(dtype=dtype).adapt(method)
    case.run()
    found = tensors_of(case.target)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    for key, tensor in rounded_once(case, dtype).items():
        assert torch.equal(found[key], tensor), key
    assert config_of(case.target)["dtype"] == str(dtype).removeprefix("torch.")
    assert merge.stored_dtype(case.target) == dtype
    ids = token_ids()
    assert_close(logits(load(case.target), ids), logits(case.adapted(), ids), HALF[torch.bfloat16])


@pytest.mark.parametrize(
    ("stored", "wanted"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_the_dtype_can_be_chosen(stored, wanted, make):
    case = make(dtype=stored).adapt()
    case.rewrite(lambda tensors: {**tensors, "a.counter": torch.arange(3)}).run(wanted)
    before, found = tensors_of(case.base), tensors_of(case.target)
    assert torch.equal(found.pop("a.counter"), torch.arange(3))
    assert {tensor.dtype for tensor in found.values()} == {wanted}
    assert config_of(case.target)["dtype"] == str(wanted).removeprefix("torch.")
    assert torch.equal(found["model.norm.weight"], before["model.norm.weight"].to(wanted))
    assert merge.stored_dtype(case.target) == wanted


def test_a_merge_into_float32_of_a_half_precision_base_is_exact(make):
    case = make(dtype=torch.bfloat16).adapt("dora")
    case.run(torch.float32)
    case.agrees()


# ---- what belongs beside the weights ----


def test_what_belongs_to_the_model_is_copied_and_nothing_else(make):
    case = make().adapt()
    kept = ["generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    left = ["pytorch_model.bin", "model.gguf", "tf_model.h5", "README.md", ".hidden", "optimizer.pt"]
    for name in [*kept, *left]:
        (case.base / name).write_text("{}")
    (case.base / "onnx").mkdir()
    case.run()
    assert {path.name for path in case.target.iterdir()} == {"config.json", merge.SINGLE_FILE, *kept}


# ---- what is refused ----


def refuses(case, expected):
    with pytest.raises(ModelError) as raised:
        case.run()
    assert expected in str(raised.value)


def test_an_adapter_of_another_base(make):
    case = make("gpt2").adapt()
    config = json.loads((case.adapter_folder / CONFIG_FILE).read_text())
    (case.adapter_folder / CONFIG_FILE).write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    refuses(case, 'does not fit this base model: method.target_modules: no module matches "q_proj"')


A_KEY = f"{BASE_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(A_KEY), f"{A_KEY} is missing"),
        (lambda t: t.update({A_KEY + "2": torch.zeros(2)}), f"{A_KEY}2 belongs to no adapted module"),
        (lambda t: t.update({A_KEY: t[A_KEY][:, 1:].contiguous()}), f"{A_KEY} has shape [4, 47], not [4, 48]"),
        (lambda t: t.update({A_KEY: t[A_KEY] * float("nan")}), f"{A_KEY} holds values that are not finite"),
    ],
    ids=["missing", "left over", "resized", "nan"],
)
def test_a_damaged_adapter(change, expected, make):
    case = make().adapt()
    tensors = load_file(case.adapter_folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, case.adapter_folder / WEIGHTS_FILE)
    refuses(case, expected)
    assert not list(case.target.iterdir()), "something was written"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_merged_weight_that_is_not_finite(method, make):
    case = make().adapt(method, ["v_proj"])
    tensors = load_file(case.adapter_folder / WEIGHTS_FILE)
    for key in tensors:
        tensors[key] = torch.full_like(tensors[key], 1e30)
    save_file(tensors, case.adapter_folder / WEIGHTS_FILE)
    refuses(case, "model.layers.0.self_attn.v_proj.weight: the merged weight holds values that are not finite")


def test_a_merged_weight_that_its_new_dtype_cannot_hold(make):
    """float16 ends at 65504; a weight beyond must not become infinite in silence."""
    case = make()
    case.rewrite(lambda t: {**t, "model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"] * 1e8})
    case.adapt()
    with pytest.raises(ModelError, match=r"mlp\.up_proj\.weight holds values that are too large for float16"):
        case.run(torch.float16)


def test_a_base_without_safetensors(make):
    case = make().adapt()
    (case.base / merge.SINGLE_FILE).rename(case.base / "pytorch_model.bin")
    refuses(case, f"has no {merge.SINGLE_FILE} to merge into")


def test_a_base_that_stores_an_adapted_weight_under_another_name(make):
    case = make().adapt()
    case.rewrite(lambda tensors: {key.replace("q_proj", "query"): value for key, value in tensors.items()})
    refuses(case, "model.layers.0.self_attn.q_proj.weight is in none of the base model's files")


@pytest.mark.parametrize("damage", ["truncated", "missing", "index"])
def test_a_damaged_base(damage, make):
    case = make().shard().adapt()
    shard = sorted(case.base.glob("*.safetensors"))[3]
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing":
        shard.unlink()
    else:
        (case.base / merge.INDEX_FILE).write_text("{")
    refuses(case, merge.INDEX_FILE if damage == "index" else shard.name)


# ---- the proof ----


@pytest.fixture
def proof(make):
    """A finished merge and a function that compares it, as it lies on the disk, with base and adapter."""
    case = make().adapt("dora")
    case.run()
    prompts, cpu = [{"input_ids": torch.tensor([ids])} for ids in ([5, 9, 2, 77], [3, 4])], torch.device("cpu")
    expected = merge.logits_of(case.adapted(), prompts, cpu)

    def agreement():
        return merge.compare(expected, merge.logits_of(load(case.target), prompts, cpu))

    return case, agreement


def test_a_right_merge_is_proven(proof):
    agreement = proof[1]()
    assert agreement.max_difference <= TOLERANCE
    assert agreement.mean_divergence <= TOLERANCE
    assert (agreement.same_choice, agreement.positions) == (1.0, 6)
    merge.require_agreement(agreement, torch.float32)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda weight: weight * 1.01,
        lambda weight: weight.flip(0),
        lambda weight: weight.roll(1, 1),
        lambda weight: weight.index_fill(0, torch.tensor([3]), 0),
        lambda weight: weight.index_fill(0, torch.tensor([3]), float("nan")),
        lambda weight: weight.index_fill(0, torch.tensor([3]), float("inf")),
    ],
    ids=["scaled", "rows turned", "columns moved", "a row of zeros", "a row of NaN", "a row of infinity"],
)
def test_a_wrong_merge_is_refused(wrong, proof):
    case, agreement = proof
    tensors = load_file(case.target / merge.SINGLE_FILE)
    key = "model.layers.1.mlp.down_proj.weight"
    tensors[key] = wrong(tensors[key]).contiguous()
    save_file(tensors, case.target / merge.SINGLE_FILE, {"format": "pt"})
    with pytest.raises(ModelError, match="the merged model differs from base and adapter by"):
        merge.require_agreement(agreement(), torch.float32)


def test_a_forgotten_merge_is_refused(proof):
    case, agreement = proof
    (case.target / merge.SINGLE_FILE).write_bytes((case.base / merge.SINGLE_FILE).read_bytes())
    with pytest.raises(ModelError, match="the merged model differs"):
        merge.require_agreement(agreement(), torch.float32)


def test_what_agreement_means():
    expected = [torch.tensor([[1.0, 2.0, -4.0]]), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])]
    found = [torch.tensor([[1.0, 2.0, -4.0]]), torch.tensor([[0.0, 1.0, 0.0], [1.0, 3.0, 0.0]])]
    agreement = merge.compare(expected, found)
    p, q = (logits[1][1].double().softmax(0) for logits in (expected, found))
    assert agreement.max_difference == 3 / 4
    assert agreement.mean_divergence == pytest.approx(float((p * (p / q).log()).sum()) / 3)
    assert (agreement.same_choice, agreement.positions) == (pytest.approx(2 / 3), 3)
    assert merge.compare(expected, expected) == merge.Agreement(0, 0, 1, 3)


@pytest.mark.parametrize("dtype", merge.TOLERANCE, ids=str)
def test_a_difference_is_forgiven_as_far_as_the_dtype_explains_it(dtype):
    limit = merge.TOLERANCE[dtype]
    merge.require_agreement(merge.Agreement(limit, 1.0, 0.5, 3), dtype)
    for difference in (limit * 1.01, float("nan"), float("inf")):
        with pytest.raises(ModelError):
            merge.require_agreement(merge.Agreement(difference, 0.0, 1.0, 3), dtype)


def test_a_dtype_without_a_tolerance_is_held_to_float32s():
    with pytest.raises(ModelError, match=r"1e-04 that float64 allows"):
        merge.require_agreement(merge.Agreement(1e-3, 0.0, 1.0, 3), torch.float64)


# ---- what no merge may pass on ----


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "rounded"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"], ids=["adapted", "not"])
def test_a_base_with_numbers_that_are_not_finite(name, dtype, value, make):
    def spoil(tensors):
        tensors[name].flatten()[-1] = float(value)
        return tensors

    case = make().adapt().rewrite(spoil)
    with pytest.raises(ModelError, match=rf"model.safetensors: {name} holds values that are not finite"):
        case.run(dtype)


def test_a_buffer_may_be_infinite_and_what_is_no_parameter_anything(make):
    """A mask's infinities mean something, and transformers passes over tensors that it does not know."""
    case = make().adapt().rewrite(lambda tensors: {**tensors, "model.mask": torch.tensor([-torch.inf])})
    case.run()
    assert torch.isinf(load_file(case.target / merge.SINGLE_FILE)["model.mask"]).all()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_a_base_that_lacks_what_no_adapter_changes(sharded, tied, make):
    """It would come out of the merge as it went in, and transformers would start that weight at random."""
    lost = "model.norm.weight"
    case = make(tied=tied).adapt()
    case.rewrite(lambda tensors: {key: tensor for key, tensor in tensors.items() if key != lost})
    if sharded:
        shard = (case.base / merge.SINGLE_FILE).rename(case.base / "model-00001-of-00001.safetensors")
        index = dict.fromkeys(load_file(shard), shard.name)
        (case.base / merge.INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ModelError, match=f"lack weights that the model needs: {lost}"):
        case.run()
