"""LN tuning trains the norms and nothing else, and its file is PEFT's."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peftcli.checkpoint.adapter import attach, read_adapter, save_adapter
from peftcli.errors import RecipeError
from peftcli.methods._place import is_norm
from tests.families import tiny_model
from tests.methods.building import adapt, assert_close, logits, origin_of, randomise, token_ids, trainable
from tests.tolerances import EXACT

FLOAT32 = EXACT[torch.float32]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"input_layernorm", "post_attention_layernorm", "norm"}),
        ("gpt2", {"ln_1", "ln_2", "ln_f"}),
    ],
)
def test_the_norms_train_and_nothing_else(make_model, family, expected):
    model = make_model(family)
    adapt(model, "ln_tuning")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in trainable(model)} == expected
    norms = [module for module in model.modules() if is_norm(module)]
    assert sum(p.numel() for p in trainable(model).values()) == sum(p.numel() for m in norms for p in m.parameters())


def test_a_trained_norm_computes_the_formula():
    model = nn.Sequential(OrderedDict(norm=nn.LayerNorm(24))).double()
    adapt(model, "ln_tuning")
    assert set(trainable(model)) == {"norm.weight", "norm.bias"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    expected = (x - mean) / (variance + model.norm.eps).sqrt() * model.norm.weight + model.norm.bias
    assert_close(model(x), expected, EXACT[torch.float64])


def test_the_gradient_is_the_formulas(make_model):
    model, ids = make_model().double(), token_ids()
    adapt(model, "ln_tuning")
    seen = {}
    norm = model.model.norm
    norm.register_forward_hook(lambda module, given, result: seen.update(x=given[0], y=result))
    loss = F.cross_entropy(logits(model, ids).flatten(0, 1), ids.flatten())
    seen["y"].retain_grad()
    loss.backward()
    x = seen["x"].detach().float()  # transformers' RMSNorm normalises in float32
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    expected = (seen["y"].grad * scaled.double()).sum(dim=(0, 1))
    assert_close(norm.weight.grad, expected, FLOAT32)


@pytest.mark.filterwarnings("ignore:::peft", "ignore::UserWarning", "ignore::FutureWarning:transformers")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_reads_it_and_a_head_beside_it(make_model, family, tmp_path):
    from peft import PeftModel

    model, ids = make_model(family), token_ids()
    config, _ = adapt(model, "ln_tuning")
    randomise(model, 0.1)
    save_adapter(tmp_path, model, origin_of("ln_tuning", config, base_model=""))
    theirs = PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    assert_close(logits_of(theirs, ids), logits(model, ids), FLOAT32)
    again = make_model(family)
    attach(again, read_adapter(tmp_path))
    assert torch.equal(logits(again, ids), logits(model, ids))


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_a_task_heads_names_are_left_alone(tmp_path):
    model = tiny_model("bert", "BertForSequenceClassification")
    config, _ = adapt(model, "ln_tuning")
    save_adapter(tmp_path, model, origin_of("ln_tuning", config, task="sequence-classification"))
    keys = read_adapter(tmp_path).tensors
    assert "base_model.model.classifier.weight" in keys
    assert "base_model.model.bert.embeddings.LayerNorm.bias" in keys


def test_a_model_without_norms_is_refused():
    with pytest.raises(RecipeError, match="no LayerNorms, so ln_tuning has nothing to train"):
        adapt(nn.Sequential(nn.Linear(3, 4)), "ln_tuning")
