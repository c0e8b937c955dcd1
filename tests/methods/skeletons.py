"""Models of published sizes on the meta device, where only shapes are: for the numbers in papers' tables."""

import torch

from tests.methods.building import adapt, trainable


def llama_7b():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=32000))  # the library's defaults are the first 7B's


def roberta(size):
    from transformers import RobertaConfig, RobertaModel

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        return RobertaModel(RobertaConfig(**(large if size == "large" else {})), add_pooling_layer=False)


def count(model, method, targets, **fields):
    """Returns how many parameters train once the method called `method` is grafted onto `model`."""
    adapt(model, method, targets, **fields)
    parameters = trainable(model).values()
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    return sum(parameter.numel() for parameter in parameters)
