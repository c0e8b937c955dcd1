import copy

import pytest
import torch
from pydantic import ValidationError

from peftcli import inject
from peftcli.checkpoint.adapter import adapter_tensors, attach, read_adapter, save_adapter
from peftcli.errors import ModelError, RecipeError
from peftcli.methods.waveft import WaveFT, random_places
from peftcli.ops.wavelet import inverse_reference
from tests.methods.building import (
    Holder,
    adapt,
    adapted_holder,
    assert_close,
    config_for,
    inputs,
    logits,
    origin_of,
    randomise,
    trainable,
)
from tests.methods.side_by_side import assert_same_outputs_and_input_gradients
from tests.tolerances import EXACT, STANDARD_ERRORS

FP64 = EXACT[torch.float64]
FP32 = EXACT[torch.float32]
KINDS = ("linear", "conv1d")
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}

pytestmark = pytest.mark.filterwarnings(
    "ignore:::peft", "ignore::FutureWarning:transformers", "ignore:.*target_modules. with tied.*:UserWarning"
)

of_each_kind = pytest.mark.parametrize("kind", KINDS)
of_each_family = pytest.mark.parametrize("family", TARGETS)
with_and_without_transform = pytest.mark.parametrize("use_idwt", [True, False])


def positions(out_features, in_features, count, seed=777):
    """Returns rows and columns as PEFT draws them."""
    drawn = torch.randperm(out_features * in_features, generator=torch.Generator().manual_seed(seed))[:count]
    return drawn // in_features, drawn % in_features


def delta_of(holder, spectrum, scaling, use_idwt):
    """Returns the dense `ΔW` [O, I] from the paper's S, by the closed form."""
    S = torch.zeros(holder.W.shape, dtype=spectrum.dtype)
    S[positions(*holder.W.shape, len(spectrum))] = spectrum.detach()
    return scaling * (inverse_reference(S) if use_idwt else S)


# ---- the closed form ----


@of_each_kind
@with_and_without_transform
@pytest.mark.parametrize("count", [20, 960])
def test_the_output_is_that_of_the_dense_weight(kind, use_idwt, count):
    holder = adapted_holder("waveft", kind, n_frequency=count, scaling=3.0, use_idwt=use_idwt)
    adapter = holder.target.adapter
    W = holder.W + delta_of(holder, adapter.spectrum, 3.0, use_idwt)
    x = inputs(kind, torch.float64)
    assert_close(holder(x), holder.plain(x, W), FP64)
    assert_close(adapter.merged(holder.W), W, FP64)


@of_each_kind
@with_and_without_transform
def test_the_gradients_are_those_of_the_dense_weight(kind, use_idwt):
    """∂S is the transform of ∂W at the places: the transpose of what ΔW is made with."""
    holder = adapted_holder("waveft", kind, n_frequency=300, scaling=3.0, use_idwt=use_idwt)
    spectrum = holder.target.adapter.spectrum
    x = inputs(kind, torch.float64).requires_grad_()
    y = holder(x)
    g = torch.randn_like(y)
    y.backward(g)
    G = g.flatten(0, 1).T @ x.detach().flatten(0, 1)
    each = []
    for k in range(300):
        one = torch.zeros(300, dtype=torch.float64)
        one[k] = 1
        each.append((delta_of(holder, one, 3.0, use_idwt) * G).sum())
    assert_close(spectrum.grad, torch.stack(each), FP64)
    assert_close(x.grad, g @ (holder.W + delta_of(holder, spectrum, 3.0, use_idwt)), FP64)


@with_and_without_transform
def test_gradcheck(use_idwt):
    holder = adapted_holder("waveft", use_idwt=use_idwt, scaling=1.0)
    x = inputs("linear", torch.float64, length=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, _: holder(x), (x, holder.target.adapter.spectrum), fast_mode=True)


@of_each_kind
def test_the_update_has_the_energy_of_its_coefficients(kind):
    holder = adapted_holder("waveft", kind, scaling=3.0)
    adapter = holder.target.adapter
    delta = adapter.merged(torch.zeros_like(holder.W))
    assert_close(delta.norm(), 3 * adapter.spectrum.norm(), FP64)


def test_the_update_is_of_high_rank():
    holder = adapted_holder("waveft", n_frequency=480)
    assert torch.linalg.matrix_rank(holder.target.adapter.merged(torch.zeros_like(holder.W))) == 24


def test_the_forward_never_forms_the_dense_update(make_model, ids):
    model = make_model()
    adapt(model, "waveft", "all-linear", n_frequency=30)
    randomise(model)
    sizes = set()

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if torch.is_tensor(tensor) and not function.is_view:
                    sizes.add(tuple(tensor.shape))
            return result

    with Watching():
        logits(model, ids)
    assert sizes
    assert not sizes & {(48, 80), (80, 48), (48, 48), (24, 48), (48, 24)}


def test_zeros_is_the_start_and_gaussian_another():
    assert not adapted_holder("waveft", noisy=False).target.adapter.spectrum.any()
    drawn = adapted_holder("waveft", noisy=False, init="gaussian", n_frequency=960).target.adapter.spectrum / 0.01
    assert abs(drawn.mean()) <= STANDARD_ERRORS / 960**0.5
    assert abs(drawn.square().mean() - 1) <= STANDARD_ERRORS * (2 / 960) ** 0.5


# ---- the places ----


def test_the_places_are_pefts():
    at = random_places(40, 24, 20, 777, exchanged=False)
    rows, columns = positions(40, 24, 20)
    assert torch.equal(at.rows, rows[at.order])
    assert torch.equal(at.columns, columns[at.order])
    assert at.rows.tolist() == sorted(at.rows.tolist())


def test_a_torch_that_draws_other_places_is_noticed(monkeypatch):
    """All that a file says of the places is a seed, so what torch draws from it is part of the format."""
    holder = Holder()
    draw = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, generator: draw(n, generator=generator).flip(0))
    with pytest.raises(ModelError, match="this version of torch draws"):
        adapt(holder, "waveft", n_frequency=19)  # of which no other test has left the places in the cache


def test_another_seed_means_other_places():
    one, other = (adapted_holder("waveft", noisy=False, random_loc_seed=seed) for seed in (1, 2))
    assert not torch.equal(one.target.adapter.rows, other.target.adapter.rows)
    same = Holder("linear", torch.float64)
    adapt(same, "waveft", seed=5, random_loc_seed=1)
    assert torch.equal(same.target.adapter.rows, one.target.adapter.rows), "the training's seed has no say in it"


def test_modules_of_one_shape_share_their_places_but_no_tensor(make_model):
    model = make_model()
    adapt(model, "waveft", ["q_proj", "o_proj"])
    first, *others = inject.adapters(model).values()
    for other in others:
        assert torch.equal(first.columns, other.columns)
        assert first.columns.data_ptr() != other.columns.data_ptr()


def test_on_the_meta_device_nothing_is_drawn(make_model, monkeypatch):
    monkeypatch.setattr(torch, "randperm", None)
    model = make_model().to("meta")
    adapt(model, "waveft", ["q_proj"], n_frequency=77, init="gaussian")
    assert {tensor.device.type for tensor in adapter_tensors(model).values()} == {"meta"}
    assert sum(parameter.numel() for parameter in trainable(model).values()) == 2 * 77


# ---- bad input ----


@pytest.mark.parametrize(("i", "o"), [(5, 8), (8, 5), (5, 7)])
def test_odd_sides_are_refused_with_the_reason(i, o):
    holder = Holder()
    holder.target = torch.nn.Linear(i, o)
    with pytest.raises(RecipeError) as raised:
        adapt(holder, "waveft", n_frequency=4)
    message = raised.value.problems[0].message
    assert message.startswith(f"method.target_modules: target ({i} × {o}) has a side of odd length")
    adapt(holder, "waveft", n_frequency=4, use_idwt=False)
    holder.target.adapter.double()
    randomise(holder.double())
    x = torch.randn(3, i, dtype=torch.float64)
    delta = delta_of(holder, holder.target.adapter.spectrum, 25.0, use_idwt=False)
    assert_close(holder(x), holder.plain(x, holder.W + delta), FP64)


@of_each_kind
def test_more_coefficients_than_weights_are_refused(kind):
    with pytest.raises(RecipeError, match="n_frequency: 961 is more than the 960 weights of target"):
        adapt(Holder(kind), "waveft", n_frequency=961)
    adapt(Holder(kind), "waveft", n_frequency=960)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_frequency", 0), ("scaling", 0.0), ("scaling", float("nan")), ("init", "ones")],
)
def test_values_that_make_no_sense(field, value):
    with pytest.raises(ValidationError, match=field):
        config_for("waveft", **{field: value})


def test_embeddings_are_refused(make_model):
    with pytest.raises(RecipeError, match="matches only Embedding, which cannot be adapted"):
        adapt(make_model(), "waveft", ["embed_tokens"])


# ---- PEFT ----


def peft_twin(model, family, **fields):
    """Returns a copy of `model` that PEFT adapts, at its start."""
    from peft import WaveFTConfig, get_peft_model

    settings = {"target_modules": TARGETS[family], "n_frequency": 30, "scaling": 3.0, "task_type": "CAUSAL_LM"}
    settings["fan_in_fan_out"] = family == "gpt2"
    return get_peft_model(copy.deepcopy(model), WaveFTConfig(**{**settings, **fields})).eval()


def spectra(twin):
    return {name.removesuffix(".default"): p for name, p in twin.named_parameters() if ".waveft_spectrum." in name}


@of_each_family
@with_and_without_transform
def test_outputs_gradients_and_merged_weights_are_pefts(family, use_idwt, make_model, ids):
    model = make_model(family, torch.float64)
    twin = peft_twin(model, family, use_idwt=use_idwt).double()
    _, sites = adapt(model, "waveft", TARGETS[family], n_frequency=30, scaling=3.0, use_idwt=use_idwt)
    model.double()
    randomise(model)
    tensors, theirs = adapter_tensors(model), spectra(twin)
    assert {key: t.shape for key, t in tensors.items()} == {key: t.shape for key, t in theirs.items()}
    with torch.no_grad():
        for key, tensor in tensors.items():
            theirs[key].copy_(tensor)
    assert_close(logits(model, ids), logits(twin, ids), FP64)
    for site in sites:
        ours, its_twin = model.get_submodule(site.name), twin.get_submodule(f"base_model.model.{site.name}")
        assert_same_outputs_and_input_gradients(ours, its_twin, site.in_features)
        gradient = theirs[f"base_model.model.{site.name}.waveft_spectrum"].grad
        assert gradient.any()
        assert_close(ours.adapter.spectrum.grad, gradient, FP64)
    plain = twin.merge_and_unload()
    for site in sites:
        weight = plain.get_submodule(site.name).weight
        stored = weight if site.kind == "linear" else weight.t()
        assert_close(inject.adapters(model)[site.name].merged(site.dense()), stored.detach(), FP64)


@of_each_family
@pytest.mark.parametrize("fields", [{}, {"use_idwt": False}, {"random_loc_seed": 5, "scaling": 2.0}], ids=str)
def test_peft_loads_what_we_write(family, fields, make_model, ids, tmp_path):
    from peft import PeftModel

    model = make_model(family)
    base = logits(model, ids)
    config, _ = adapt(model, "waveft", TARGETS[family], **fields)
    randomise(model, 0.01)
    save_adapter(tmp_path, model, origin_of("waveft", config, base_model=""))
    theirs = PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    assert spectra(theirs).keys() == adapter_tensors(model).keys()
    assert_close(logits(theirs, ids), logits(model, ids), FP32)
    assert not torch.allclose(logits(model, ids), base)


def written_by_peft(make_model, family, folder, **fields):
    theirs = peft_twin(make_model(family), family, **fields)
    with torch.no_grad():
        for spectrum in spectra(theirs).values():
            spectrum.add_(0.1 * torch.randn_like(spectrum))
    theirs.save_pretrained(folder)
    return theirs


THEIRS = {
    "default": {},
    "direct": {"use_idwt": False},
    "direct, where the family does nothing": {"use_idwt": False, "wavelet_family": "sym4"},
    "other places": {"random_loc_seed": 5},
    "random start": {"init_weights": False},
}


@of_each_family
@pytest.mark.parametrize("fields", THEIRS.values(), ids=THEIRS)
def test_we_load_what_peft_writes(family, fields, make_model, ids, tmp_path):
    theirs = written_by_peft(make_model, family, tmp_path, **fields)
    model = make_model(family)
    attach(model, read_adapter(tmp_path))
    assert_close(logits(model, ids), logits(theirs, ids), FP32)
    assert not torch.allclose(logits(model, ids), logits(make_model(family), ids))


REFUSED = {
    "another wavelet": ({"wavelet_family": "db2"}, "wavelet_family: db2, of which"),
    "patterns": ({"n_frequency_pattern": {"q_proj": 10}}, "n_frequency_pattern = "),
    "proportional": ({"proportional_parameters": True}, "proportional_parameters = True"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_peft_has_and_we_have_not_is_refused(fields, message, make_model, tmp_path):
    written_by_peft(make_model, "llama", tmp_path, **fields)
    with pytest.raises(ModelError, match=message):
        read_adapter(tmp_path)


def test_a_file_of_a_module_with_an_odd_side_is_refused(make_model, tmp_path):
    def odd(family="llama"):
        return make_model(family, intermediate_size=81)

    written_by_peft(odd, "llama", tmp_path)
    with pytest.raises(ModelError, match=r"down_proj .* has a side of odd length"):
        attach(odd(), read_adapter(tmp_path))


def test_the_file_names_what_it_would_need():
    written = WaveFT.peft_config(config_for("waveft"))
    assert WaveFT.config_from_peft(written) == config_for("waveft", "all-linear")
