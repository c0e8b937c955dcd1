"""Text from a model, prompted as it was in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from peftcli.data import format_prompt
from peftcli.evaluation.ensemble import majority_answer

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
    prompts: Sequence[tuple[int, ...]] = (),
) -> str:
    """Returns what the model writes after `prompt`, which is put into the data format `form` first.

    It stops at the model's end-of-sequence token or after `settings.max_new_tokens`.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        prompt: What the user says.
        form: The data format that the model was trained in.
        settings: How to choose tokens, and how many.
        seed: Decides sampled tokens.
        prompts: The virtual tokens' ids of each trained prompt. With several, each answers, and the most frequent
            answer is returned; of equals, the one that its prompts found likeliest.
    """
    model.eval()
    own = format_prompt(prompt, form, tokenizer)
    ids = torch.tensor([[*virtual, *own] for virtual in prompts or [()]], device=model.device)
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
        return_dict_in_generate=True,
        output_scores=len(ids) > 1,
        **sampling,
    )
    # A model with a decoder of its own gives the answer alone; the others repeat the prompt before it.
    written = output.sequences if model.config.is_encoder_decoder else output.sequences[:, ids.shape[1] :]
    answers = [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in written]
    return answers[0] if len(answers) == 1 else majority_answer(answers, _scores(model, output, ends))


def _scores(model: Any, output: Any, ends: Sequence[int]) -> list[float]:
    """Returns the mean log-probability of the tokens of each answer that `output` holds, the one that ends it included.

    What comes after that, because another answer is longer, is padding that the model never chose.
    """
    steps = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    ended = torch.isin(output.sequences[:, -steps.shape[1] :], torch.tensor(ends, device=steps.device))
    written = torch.isfinite(steps) & (ended.cumsum(dim=1) - ended.long() == 0)
    means: list[float] = (steps.masked_fill(~written, 0).sum(dim=1) / written.sum(dim=1).clamp_min(1)).tolist()
    return means


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that end a text: those of the model's generation config and the tokenizer's own."""
    config = getattr(model, "generation_config", None)
    configured = getattr(config, "eos_token_id", None)
    ends = set(configured if isinstance(configured, list) else [configured])
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if isinstance(end, int)})
