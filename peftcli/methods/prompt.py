"""Prompt tuning: a few trained embeddings in front of every sample's own.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691, section 2:

    X' = [P ; X]        X = E[ids]
    P [p, D], trained   X [L, D]   E [V, D], frozen   p = num_virtual_tokens

Virtual token i is the id V + i, which stands in the input like any other and whose embedding is row i of P. So masks,
positions, caches and generation are the model's own. With T5 the prompt stands before the encoder's input alone.
`num_prompts` trains that many prompts side by side, each on every sample, as an ensemble (section 6).

Init: the embeddings of sampled frequent tokens; `init` names the others. The model does not start as its base.
Trainable per site: num_prompts num_virtual_tokens O.
Merge: none, a prompt is not a weight.

Deviates from the paper: frequent tokens are those of the training data, where the paper takes the vocabulary's first
5,000. The paper trains with Adafactor at a rate of 0.3 for 30,000 steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from peftcli.errors import RecipeError
from peftcli.methods import _virtual_tokens as virtual_tokens
from peftcli.methods._place import Base, Site
from peftcli.methods._protocol import Facts, Method, Shared

KEY = "prompt_embeddings"


class PromptTuningConfig(virtual_tokens.VirtualTokens):
    """The fields of `method:` when `type: prompt`."""

    type: Literal["prompt"] = "prompt"
    init: Literal["sampled-vocab", "class-label", "text", "random", "legacy-uniform"] = Field(
        "sampled-vocab",
        description="Where the prompt starts: at frequent tokens, at the labels' names and then frequent tokens, at "
        "init_text, or at random in ±0.5 (legacy-uniform: in 0 … 0.5).",
    )
    init_labels: list[str] | None = Field(
        None, min_length=1, description="With init class-label: the labels' names. Left out: the task's own."
    )
    num_prompts: int = Field(
        1, ge=1, description="Prompts to train side by side as an ensemble; each costs what a run of its own would."
    )

    @model_validator(mode="after")
    def _labels_belong_to_init(self) -> PromptTuningConfig:
        if self.init_labels is not None and self.init != "class-label":
            raise ValueError("init_labels: it names the labels of init: class-label, and nothing else")
        return self


class PromptTuning(Method):
    """The prompts `P` [N·p, D], one after the other, at the input embedding."""

    Config = PromptTuningConfig
    # SmolLM2-135M learns alike at 1e-2 to 1e-1, far less at 1e-3. Larger models, whose embeddings are smaller, want
    # less: in PEFT's comparison of methods 1e-3 solves 34 % of the problems where the usual rate solves 5.7 %.
    default_learning_rate = 1e-2
    peft_type = "PROMPT_TUNING"
    own_peft_fields = frozenset({"num_prompts"})
    place = "input-embedding"
    starts_as_base = False
    tasks = frozenset({"causal-lm", "seq2seq-lm", "sequence-classification", "token-classification"})

    def __init__(self, config: PromptTuningConfig, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__(config, site, seed, shared)
        self.first_id = site.in_features
        self.P = nn.Parameter(initial_prompts(config, site, seed).to(site.device))

    def forward(self, base: Base, ids: Tensor) -> Tensor:
        virtual = ids >= self.first_id
        x = base.forward(ids.masked_fill(virtual, 0))
        prompt = F.embedding((ids - self.first_id).clamp_min(0), self.P)
        return torch.where(virtual.unsqueeze(-1), prompt.to(x.dtype), x)

    @classmethod
    def prepare(cls, config: PromptTuningConfig, facts: Facts) -> PromptTuningConfig:
        if config.init == "class-label" and config.init_tokens is None:
            labels = (config.init_labels or facts.labels)[: config.num_virtual_tokens]
            tokens = [facts.tokenize(label) for label in labels]
            if not labels:
                raise RecipeError(
                    "method.init: class-label needs labels, and this task has none", hint="name them: init_labels"
                )
            if not all(tokens):
                name = labels[tokens.index([])]
                raise RecipeError(f'method.init: class-label: the model\'s tokenizer has no tokens for "{name}"')
            config = config.model_copy(update={"init_tokens": tokens})
        return virtual_tokens.prepare(config, facts)

    @classmethod
    def before_step(cls, config: PromptTuningConfig, adapters: Mapping[str, Any]) -> None:
        for adapter in adapters.values():
            if adapter.P.grad is not None:  # the loss is the mean over the prompts: to each its own run's gradient
                adapter.P.grad.mul_(config.num_prompts)

    @classmethod
    def check(cls, config: PromptTuningConfig, sites: list[Site]) -> list[str]:
        problems = [problem for site in sites for problem in virtual_tokens.check(config, site.in_features)]
        if config.num_prompts > 1 and (
            config.init == "text" or len(config.init_tokens or ()) == config.num_virtual_tokens
        ):
            problems.append("num_prompts: prompts that start alike stay alike; start them from sampled-vocab or random")
        return problems

    @classmethod
    def num_virtual_tokens(cls, config: PromptTuningConfig) -> int:
        return config.num_virtual_tokens

    @classmethod
    def virtual_ids(cls, config: PromptTuningConfig, vocabulary: int) -> list[tuple[int, ...]]:
        p = config.num_virtual_tokens
        firsts = range(vocabulary, vocabulary + config.num_prompts * p, p)
        return [tuple(range(first, first + p)) for first in firsts]

    @classmethod
    def unmergeable(cls, config: PromptTuningConfig) -> str | None:
        return "a prompt is a part of the input, not of a weight"

    @classmethod
    def not_low_rank(cls, config: PromptTuningConfig) -> str | None:
        return cls.unmergeable(config)

    @classmethod
    def peft_key(cls, path: str, name: str) -> str:
        return name

    def peft_tensors(self) -> dict[str, Tensor]:
        return {KEY: self.P}

    @classmethod
    def peft_config(cls, config: PromptTuningConfig, sites: Sequence[Site] = ()) -> dict[str, Any]:
        own = {"num_prompts": config.num_prompts} if config.num_prompts > 1 else {}  # PEFT has no such field
        return {
            "num_virtual_tokens": config.num_virtual_tokens,
            "token_dim": sites[0].out_features if sites else None,  # PEFT asks the model for what is None
            "num_transformer_submodules": 1,
            "num_attention_heads": None,
            "num_layers": None,
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_name_or_path": None,
            "tokenizer_kwargs": None,
            **own,
        }

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> PromptTuningConfig:
        submodules = fields.get("num_transformer_submodules") or 1
        if submodules > 1 and fields.get("task_type") != "SEQ_2_SEQ_LM":
            raise ValueError(f"num_transformer_submodules is {submodules} for a model of one")
        counts = {"num_virtual_tokens": fields["num_virtual_tokens"], "num_prompts": fields.get("num_prompts", 1)}
        return PromptTuningConfig.model_validate({**counts, "init": "random"})

    @classmethod
    def tensors_from_peft(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
        # For T5, PEFT keeps a second prompt that it never uses.
        rows = fields["num_virtual_tokens"] * fields.get("num_prompts", 1)
        return {name: tensor[:rows] if name == KEY else tensor for name, tensor in tensors.items()}


def initial_prompts(config: PromptTuningConfig, site: Site, seed: int) -> Tensor:
    """Returns the start of `P` [N·p, D] in float32."""
    rows, width = config.num_prompts * config.num_virtual_tokens, site.out_features
    if site.device.type == "meta":
        return torch.empty(rows, width, device="meta")
    generator = site.generator(seed)
    if config.init in ("random", "legacy-uniform"):
        drawn = torch.rand(rows, width, generator=generator)
        return drawn - 0.5 if config.init == "random" else drawn * 0.5
    chosen = [virtual_tokens.choose(config, site.in_features, generator) for _ in range(config.num_prompts)]
    return mean_embeddings(site, [ids for prompt in chosen for ids in prompt])


@torch.no_grad()
def mean_embeddings(site: Site, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Returns the mean embedding [len(tokens), D] of each of `tokens`, in float32, as the model embeds them."""
    assert site.run is not None
    ids = torch.tensor([index for one in tokens for index in one], device=site.device)
    embedded = site.run(ids).float().split([len(one) for one in tokens])
    return torch.stack([rows.mean(dim=0) for rows in embedded])
