import pytest
import torch
from pydantic import ValidationError

from peftcli import inject
from peftcli.methods.bitfit import BitFit, BitFitConfig
from tests.conftest import tiny_llama_config
from tests.methods.building import adapt, assert_close, trainable
from tests.tolerances import EXACT


def make_roberta(**sizes):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    with torch.device("meta"):
        return RobertaForSequenceClassification(RobertaConfig(vocab_size=50265, type_vocab_size=1, **sizes))


def test_the_count_of_roberta_base():
    """102,144 beside the head: all biases of linear layers and LayerNorms, that of the embeddings' included."""
    model = make_roberta()
    adapt(model, "bitfit")
    assert BitFit.check_model(BitFitConfig(), model) == []
    head = inject.head_parameters(model)
    assert set(head) == {f"classifier.{layer}.{leaf}" for layer in ("dense", "out_proj") for leaf in ("weight", "bias")}
    trained = trainable(model)
    assert set(head) <= set(trained)
    assert sum(parameter.numel() for name, parameter in trained.items() if name not in head) == 102_144


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_bias_trains_and_nothing_else(family, make_model, ids):
    model = make_model(family).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, sites = adapt(model, "bitfit")
    assert sites == []
    trained = trainable(model)
    assert set(trained) == {name for name in before if name.endswith("bias")}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after = model.state_dict()
    # GPT-2's keys have biases too, and a softmax does not see them: what they add is the same for every key.
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved <= set(trained)
    assert len(moved) > 0.8 * len(trained)


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc", "transformer.h.0.ln_1", "transformer.h.0.attn.c_attn"])
def test_a_biass_gradient_is_the_sum_over_the_tokens(name, make_model, ids):
    model = make_model("gpt2", torch.float64)
    adapt(model, "bitfit")
    module, outputs = model.get_submodule(name), []

    def keep(module, arguments, y):
        y.retain_grad()
        outputs.append(y)

    module.register_forward_hook(keep)
    model(input_ids=ids, labels=ids).loss.backward()
    assert_close(module.bias.grad, outputs[0].grad.sum((0, 1)), EXACT[torch.float64])


@pytest.mark.parametrize(
    ("biases", "count"),
    [
        (["query"], 12 * 768),
        (["query", "intermediate.dense"], 12 * (768 + 3072)),  # the paper's half
        (["LayerNorm"], 25 * 768),
        (["encoder.layer.3.output.dense"], 768),
    ],
)
def test_a_choice_of_biases(biases, count):
    model = make_roberta()
    config, _ = adapt(model, "bitfit", biases=biases)
    assert BitFit.check_model(config, model) == []
    assert sum(p.numel() for name, p in trainable(model).items() if not name.startswith("classifier.")) == count


def test_a_model_without_biases_is_refused():
    from transformers import LlamaForCausalLM, LlamaForTokenClassification

    config = tiny_llama_config(attention_bias=False, mlp_bias=False)
    for kind in (LlamaForCausalLM, LlamaForTokenClassification):  # the second's new head has a bias, its base has not
        (problem,) = BitFit.check_model(BitFitConfig(), kind(config))
        assert problem == "type: this model has no biases, so bitfit has nothing to train; ia3 or lora can adapt it"


def test_modules_without_a_bias_are_refused(make_model):
    config = BitFitConfig(biases=["q_proj", "embed_tokens", "qproj"])
    assert BitFit.check_model(config, make_model()) == [
        f'biases: no module called "{name}" has a bias; those that have are q_proj, k_proj, v_proj, o_proj, gate_proj, '
        "up_proj, down_proj"
        for name in ("embed_tokens", "qproj")
    ]


@pytest.mark.parametrize("fields", [{"biases": "none"}, {"biases": []}, {"r": 4}, {"target_modules": ["q_proj"]}])
def test_impossible_fields(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        BitFitConfig.model_validate({"type": "bitfit", **fields})


@pytest.mark.parametrize("config", [BitFitConfig(biases="all"), BitFitConfig(biases=["query"])])
def test_the_file_says_every_field(config):
    assert BitFit.config_from_peft(BitFit.peft_config(config)) == config
