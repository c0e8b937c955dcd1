"""Text from a model, prompted as it was in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peftcli.data import format_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftcli.recipe import GenerateSection


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    form: str,
    settings: GenerateSection,
    seed: int,
) -> str:
    """Returns what the model writes after `prompt`, which is put into the data format `form` first.

    It stops at the model's end-of-sequence token or after `settings.max_new_tokens`.
    """
    model.eval()
    ids = torch.tensor([format_prompt(prompt, form, tokenizer)], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if settings.do_sample:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        torch.manual_seed(seed)
    ends = end_tokens(model, tokenizer)
    output: Any = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0],
        **sampling,
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that end a text: those of the model's generation config and the tokenizer's own."""
    config = getattr(model, "generation_config", None)
    configured = getattr(config, "eos_token_id", None)
    ends = set(configured if isinstance(configured, list) else [configured])
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if isinstance(end, int)})
