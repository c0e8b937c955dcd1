"""What the tests of prompts and prefixes share: a model of each task, facts about data, PEFT's model beside ours."""

import copy
from types import SimpleNamespace

import torch

from tests.families import tiny_model

TASKS = {
    "llama": ("llama", "LlamaForCausalLM", "CAUSAL_LM", {"num_key_value_heads": 2}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", "CAUSAL_LM", {}),
    "t5": ("t5", "T5ForConditionalGeneration", "SEQ_2_SEQ_LM", {}),
    "llama-labels": ("llama", "LlamaForSequenceClassification", "SEQ_CLS", {"num_labels": 3, "pad_token_id": 0}),
    "bert-labels": ("bert", "BertForSequenceClassification", "SEQ_CLS", {"num_labels": 3}),
    "roberta-labels": ("roberta", "RobertaForSequenceClassification", "SEQ_CLS", {"num_labels": 3}),
    "bert-tags": ("bert", "BertForTokenClassification", "TOKEN_CLS", {"num_labels": 3}),
}
"""For each kind of model: its family, class, PEFT's name of its task, and what its config says beside."""


def task_model(kind, make_model, dtype=torch.float64, **changes):
    """Returns a random model of that kind in eval mode."""
    family, name, _, own = TASKS[kind]
    if kind in ("llama", "gpt2"):
        return make_model(kind, dtype, **own, **changes)
    return tiny_model(family, name, **{**own, **changes}).to(dtype)


def task_inputs(kind, model, *, padded=True):
    """Returns a batch of three samples with labels; the first is padded on the right unless `padded` is false."""
    vocabulary, task = model.config.vocab_size, TASKS[kind][2]
    ids, mask = torch.randint(3, vocabulary, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    if padded:
        mask[0, 6:] = 0
    ids[mask == 0] = model.config.pad_token_id or 0
    sizes = {"CAUSAL_LM": (3, 9), "SEQ_2_SEQ_LM": (3, 5), "TOKEN_CLS": (3, 9)}
    if task == "SEQ_CLS":
        labels = torch.tensor([0, 2, 1])
    else:
        labels = torch.randint(
            0 if task == "TOKEN_CLS" else 3, model.config.num_labels if task == "TOKEN_CLS" else vocabulary, sizes[task]
        )
        labels[mask[:, : labels.shape[1]] == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_virtual_ids(model, inputs, virtual, *, label_each=True):
    """Returns `inputs` with the ids `virtual` before each sample's own."""
    rows = len(inputs["input_ids"])

    def before(name, values):
        return torch.cat([torch.tensor([values]).expand(rows, -1), inputs[name]], dim=1)

    changed = {
        "input_ids": before("input_ids", list(virtual)),
        "attention_mask": before("attention_mask", [1] * len(virtual)),
    }
    if label_each:
        changed["labels"] = before("labels", [-100] * len(virtual))
    return {**inputs, **changed}


def peft_twin(model, kind, settings, tensor):
    """Returns a copy of the plain `model` that PEFT adapts by `settings`, with `tensor` for its embeddings."""
    from peft import get_peft_model

    twin = get_peft_model(copy.deepcopy(model), settings(task_type=TASKS[kind][2], num_transformer_submodules=1))
    weight = twin.prompt_encoder["default"].embedding.weight
    assert weight.shape == tensor.shape
    weight.data = tensor.detach().clone()
    return twin.eval(), weight


class Words:
    """Facts about data in which each letter is a token: `a` is 10, `b` is 11 and so on."""

    frequent_ids = tuple(range(48, 20, -1))
    labels = ("ab", "c", "dad")
    samples = ()

    def tokenize(self, text):
        return [ord(letter) - 87 for letter in text if letter.isalpha()]


FACTS = Words()


def generated(model, ids, **options):
    """Returns the tokens and logits of what a model writes after `ids`, greedily."""
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    out = model.generate(
        input_ids=ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings, **options
    )
    return SimpleNamespace(ids=out.sequences[:, -8:], logits=torch.stack(out.logits))
