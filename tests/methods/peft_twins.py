"""PEFT's own model beside ours, with the same tensors: for methods that share tensors among modules."""

import copy
from types import SimpleNamespace

import torch

from peftcli import inject
from peftcli.checkpoint.adapter import adapter_tensors
from tests.methods.building import logits


def twin_of(model, settings):
    """Returns a copy of the plain `model` that PEFT adapts as the PEFT config `settings` says."""
    from peft import get_peft_model

    return get_peft_model(copy.deepcopy(model), settings)


def give(twin, model):
    """Puts the tensors of our adapted `model` into PEFT's; every one must find its place."""
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(twin, dict(adapter_tensors(model)))
    assert not result.unexpected_keys
    prefix = twin.base_model.prefix
    assert not [key for key in result.missing_keys if prefix in key and not _is_alias(key)]


def _is_alias(key):
    """Returns whether a key is that of a shared tensor as one module knows it."""
    return key.startswith("base_model.model.") and "vector_bank" in key


def compared(model, twin, ids):
    """Returns pairs of ours and PEFT's: logits, losses and every gradient, by name."""
    pairs = {"logits": (logits(model, ids), logits(twin, ids))}
    losses = [one(input_ids=ids, labels=ids, use_cache=False).loss for one in (model, twin)]
    for loss in losses:
        loss.backward()
    ours, theirs = _our_gradients(model), _their_gradients(twin)
    assert ours.keys() == theirs.keys()
    assert all(gradient.any() for gradient in theirs.values())
    return SimpleNamespace(**pairs, loss=losses, gradients={key: (ours[key], theirs[key]) for key in ours})


def _our_gradients(model):
    trained = {p.data_ptr(): p for part in inject.parts(model).values() for p in part.parameters()}
    found = {key: trained.get(tensor.data_ptr()) for key, tensor in adapter_tensors(model).items()}
    return {key: parameter.grad for key, parameter in found.items() if parameter is not None}


def _their_gradients(twin):
    found = {}
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            key = name.removesuffix(".default")
            found["base_model.vblora_vector_bank" if _is_alias(key) else key] = parameter.grad
    return found


@torch.no_grad()
def stir(twin):
    """Moves PEFT's tensors that train away from their start."""
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))
