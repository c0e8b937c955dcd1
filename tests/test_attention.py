"""Samples that are joined cost and learn what they would alone: each token's loss, every gradient, every backend."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peftcli import attention, inject, methods
from peftcli.data.batching import Batcher, PackBatcher
from peftcli.data.dataset import EncodedDataset, Sample
from peftcli.run.batches import try_joining
from peftcli.training import loss
from tests.tolerances import EXACT, LOSS

CPU = torch.device("cpu")
LENGTHS = (9, 1, 6, 17, 3, 12, 2)
PACKS = [[3, 1, 4], [0, 2, 6], [5]]  # of 21, 17 and 12 tokens
CLOSE = EXACT[torch.float32]


def small(kind, **changes):
    import transformers

    torch.manual_seed(7)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if kind == "GPT2":
        sizes = {"vocab_size": 128, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, "initializer_range": 0.3, **changes})
    return getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")._from_config(config)


def samples(change=None):
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, 120, length).astype(np.int32) for length in LENGTHS]
    if change is not None:
        ids[change] = (ids[change] + 1) % 120
    return EncodedDataset.of([Sample(one, np.ones(len(one), np.uint8)) for one in ids])


def token_losses(model, batch):
    """Returns each supervised token's loss, in the batch's reading order."""
    logits, targets = loss.supervised_logits(model, batch)
    return F.cross_entropy(logits, targets, reduction="none")


def alone(model, data):
    """Returns each sample's token losses, by index, of a batch of its own without position ids or mask."""
    batcher = Batcher(data, 1, 48, joins=False)
    return {index: token_losses(model, batcher.batch([index])) for index in range(len(data))}


def packed(model, data, *, by_row):
    """Returns each sample's token losses, by index, of one batch of packs."""
    batch = PackBatcher(Batcher(data, 1, 48, joins=True), by_row).batch(PACKS)
    order = [index for pack in PACKS for index in pack]
    parts = token_losses(model, batch).split([LENGTHS[index] - 1 for index in order])
    return dict(zip(order, parts, strict=True))


MODELS = {
    "llama": ("Llama", {}),
    "gpt2": ("GPT2", {}),
    "qwen2": ("Qwen2", {"num_attention_heads": 6, "num_key_value_heads": 1}),
    "gemma3": ("Gemma3", {"sliding_window": 32, "head_dim": 12}),
}


def make(name, **changes):
    kind, fields = MODELS[name]
    if kind == "Gemma3":
        import transformers

        torch.manual_seed(7)
        sizes = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        config = transformers.Gemma3TextConfig(
            **{**sizes, **heads, "layer_types": ["sliding_attention", "full_attention"], **fields, **changes}
        )
        return transformers.Gemma3ForCausalLM._from_config(config).eval()
    return small(kind, **fields, **changes).eval()


def with_adapter(model):
    method = methods.load("lora")
    inject.graft(model, method, method.Config(r=4, init="gaussian"), 0)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:  # B is 0 at the start, and A would get no gradient
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def gradients(model, losses):
    model.zero_grad()
    (sum(part.sum() for part in losses.values())).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backend", ["by sample", "sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_token_costs_and_teaches_what_it_does_alone(name, backend):
    model = with_adapter(make(name, attn_implementation="eager" if backend == "eager" else "sdpa"))
    data = samples()
    expected = alone(model, data)
    slopes = gradients(model, expected)
    if backend == "by sample":
        assert attention.use(model, CPU)
    for by_row in (True, False):
        found = packed(model, data, by_row=by_row)
        for index, losses in expected.items():
            torch.testing.assert_close(found[index], losses, rtol=0, atol=1e-5)
        for key, slope in gradients(model, found).items():
            assert (slope - slopes[key]).abs().max() <= CLOSE * slopes[key].abs().max(), key
            assert slopes[key].abs().max() > 0


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("backend", ["by sample", "sdpa", "eager"])
def test_a_sample_does_not_see_its_neighbours(backend, by_row):
    model = make("llama", attn_implementation="eager" if backend == "eager" else "sdpa")
    if backend == "by sample":
        assert attention.use(model, CPU)
    before = packed(model, samples(), by_row=by_row)
    after = packed(model, samples(change=3), by_row=by_row)
    assert (after[3] - before[3]).abs().max() > 0.1
    for index in set(before) - {3}:
        torch.testing.assert_close(after[index], before[index], rtol=LOSS, atol=LOSS)


def test_no_mask_is_made_and_no_layer_sees_two_samples(monkeypatch):
    lengths, seen = [9, 2, 6, 3, 2, 1], []
    model = make("llama")
    attention.use(model, CPU)
    original = F.scaled_dot_product_attention

    def watched(query, *args, **options):
        seen.append((query.shape[2], options.get("attn_mask") is None))
        return original(query, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    model(input_ids=positions + 3, position_ids=positions, use_cache=False)
    assert seen == [(length, True) for length in lengths] * 2


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_everything_else_is_sdpa_to_the_bit(name):
    """Padding, a cache, plain rows and windows shorter than a sample: transformers' own masks."""
    plain, ours = (make(name, **({"sliding_window": 8} if name == "gemma3" else {})) for _ in range(2))
    attention.use(ours, CPU)
    ids = torch.arange(2, 42).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    for call in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        assert torch.equal(ours(**call).logits, plain(**call).logits)
    # A sample that is longer than the window of one of the layers, which gets its mask; the other needs none.
    joined = {"input_ids": ids[:1], "position_ids": torch.cat([torch.arange(14), torch.arange(6)])[None]}
    torch.testing.assert_close(ours(**joined, use_cache=False).logits, plain(**joined, use_cache=False).logits)
    answer = [one.generate(ids[:1], max_new_tokens=5, do_sample=False) for one in (ours, plain)]
    assert torch.equal(*answer)


def test_windows_that_hold_every_sample_are_no_obstacle():
    joins = try_joining(make("gemma3"), CPU, 32)
    assert (joins.allowed, joins.free) == (True, True)
    model = make("gemma3")
    joins = try_joining(model, CPU, 33)
    assert (joins.allowed, joins.free) == (True, False)
    assert "32 tokens of a layer's window" in joins.why_not
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_cut_up_is_left_to_its_mask(monkeypatch):
    """A layer that adds something to its scores is found out by the trial, and the model is as it was."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    original = LlamaAttention.forward
    monkeypatch.setattr(
        LlamaAttention, "forward", lambda self, *args, **more: original(self, *args, **more, s_aux=torch.zeros(4))
    )
    model = make("llama")
    joins = try_joining(model, CPU, 8)
    assert (joins.allowed, joins.free, model.config._attn_implementation) == (True, False, "sdpa")


def test_other_backends_and_devices_keep_theirs():
    assert attention.use(make("llama", attn_implementation="eager"), CPU) is None
    assert attention.use(make("llama"), torch.device("cuda")) is None
    undo = attention.use(model := make("llama"), CPU)
    assert attention.knows_samples(model)
    undo()
    assert model.config._attn_implementation == "sdpa"
