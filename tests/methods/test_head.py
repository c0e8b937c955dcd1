import pytest
import torch
from torch.nn import functional as F

from peftcli.methods.head import Head, HeadConfig
from tests.conftest import tiny_gpt2_config, tiny_llama_config
from tests.methods.building import adapt, assert_close, trainable
from tests.tolerances import EXACT

FP64 = EXACT[torch.float64]


def make_bert(**changes):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=128, num_labels=3, **{**sizes, **dropouts, **changes}))


def test_a_tasks_head_trains_and_the_pooler_does_not():
    model = make_bert()
    _, sites = adapt(model, "head")
    assert sites == []
    assert Head.check_model(HeadConfig(), model) == []
    assert set(trainable(model)) == {"classifier.weight", "classifier.bias"}


def test_it_trains_as_a_linear_layer_on_features_computed_once(ids):
    model = make_bert().double().train()
    adapt(model, "head")
    labels = torch.tensor([2, 0])
    with torch.no_grad():
        features = model.bert(ids).pooler_output
    W, b = (parameter.detach().clone().requires_grad_() for parameter in model.classifier.parameters())
    one, other = torch.optim.AdamW(trainable(model).values(), lr=0.1), torch.optim.AdamW([W, b], lr=0.1)
    for _ in range(3):
        for optimizer, loss in (
            (one, model(input_ids=ids, labels=labels).loss),
            (other, F.cross_entropy(features @ W.T + b, labels)),
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_close(model.classifier.weight, W, FP64)
    assert_close(model.classifier.bias, b, FP64)
    assert all(parameter.grad is None for parameter in model.bert.parameters())


def test_dropout_of_the_base_follows_the_models_mode(ids):
    model = make_bert(hidden_dropout_prob=0.5)
    adapt(model, "head")
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


def test_a_language_models_output_head_trains(make_model, ids):
    model = make_model()
    adapt(model, "head")
    assert Head.check_model(HeadConfig(), model) == []
    assert set(trainable(model)) == {"lm_head.weight"}
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize(
    ("family", "head"),
    [("GPTNeoX", "lm_head"), ("GPTNeoXJapanese", "embed_out"), ("BioGpt", "output_projection")],
)
def test_old_models_call_their_heads_otherwise(family, head):
    import transformers

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": False}
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(vocab_size=128, **sizes)
    )
    adapt(model, "head")
    assert Head.check_model(HeadConfig(), model) == []
    assert set(trainable(model)) == {f"{head}.weight"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_head_that_is_the_embedding_too_is_refused(device):
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        llama = AutoModelForCausalLM.from_config(tiny_llama_config(tie_word_embeddings=True))
        gpt2 = AutoModelForCausalLM.from_config(tiny_gpt2_config())
    for model in (llama, gpt2):
        (problem,) = Head.check_model(HeadConfig(), model)
        assert problem.startswith("type: this model's output head shares its weight with the input embedding")


def test_a_head_of_an_unknown_name_is_refused(make_model):
    model = make_model()
    model.get_output_embeddings = lambda: model.model.layers[0].mlp.up_proj
    (problem,) = Head.check_model(HeadConfig(), model)
    assert problem.startswith("type: this model's output head model.layers.0.mlp.up_proj is none that")


def test_a_parameter_of_the_model_itself_is_no_head():
    assert not Head.trains(HeadConfig(), "lm_head", torch.nn.Module())


def test_the_file_says_every_field():
    assert Head.config_from_peft(Head.peft_config(HeadConfig())) == HeadConfig()
