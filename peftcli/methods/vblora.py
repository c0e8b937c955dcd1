"""VB-LoRA: LoRA whose factors are put together from one bank of vectors that all modules share.

Li et al. 2024, "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", arXiv 2405.15179, eq. 3 to 5:

    y = x Wᵀ + bias + drop(x) Aᵀ Bᵀ        ΔW = B A
    each piece of A's rows and B's columns = Σ over the k largest logits of softmax(these logits)ⱼ bankⱼ
    x [..., I]   A [r, I]   B [O, r]   bank [h, b]   logits_A [r, I/b, h]   logits_B [O/b, r, h]   W [O, I], frozen
    h = num_vectors, b = vector_length, k = topk

Init: bank uniform in ±0.02, logits N(0, 0.1²). So ΔW is small but not zero: a bank of zeros would have no gradient.
Trainable per site: r (I + O) num_vectors / vector_length.
Merge: W' = W + B A.

Deviates from the paper: nothing known. No scale alpha / r, as there. Logits that are not among the k largest get no
gradient; which are among them changes as those that are fall. An adapter saved with `save_topk_only` has forgotten the
other logits: training can go on from it, but no other vectors will ever be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftcli.methods._place import Base, Kind, Site, generator
from peftcli.methods._protocol import Method, Shared, Targets
from peftcli.methods.lora import rank_problems
from peftcli.ops.dropout import dropout
from peftcli.ops.low_rank import forward_low_rank, merged_low_rank
from peftcli.ops.vector_bank import logits_of_chosen, mixed_vectors, only_chosen

BANK_BOUND = 0.02
LOGITS_STD = 0.1
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


class VBLoRAConfig(Targets):
    """The fields of `method:` when `type: vblora`."""

    type: Literal["vblora"] = "vblora"
    r: int = Field(4, ge=1, description="Rank of the update: the length of the thin side of A and B.")
    num_vectors: int = Field(
        256, ge=1, lt=2**31, description="Vectors in the bank: the paper takes 90 for RoBERTa and 2048 for LLaMA-2 7B."
    )
    vector_length: int = Field(
        256, ge=1, description="Length of each vector; must divide every adapted module's inputs and outputs."
    )
    topk: int = Field(2, ge=1, description="How many vectors of the bank make up one piece of A or B.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs zeroed in training.")
    bank_lr_ratio: float = Field(
        0.1, gt=0, description="The bank learns at this multiple of the learning rate, which is that of the logits."
    )
    save_topk_only: bool = Field(
        False, description="Save the chosen vectors' weights alone: far smaller, but not to be trained on from."
    )

    @model_validator(mode="after")
    def _bank_has_enough(self) -> VBLoRAConfig:
        if self.topk > self.num_vectors:
            raise ValueError(f"topk: {self.topk} is more than the {self.num_vectors} vectors of the bank (num_vectors)")
        return self


class VectorBank(Shared):
    """The shared vectors, `bank` [h, b]."""

    def __init__(self, bank: Tensor, lr_ratio: float) -> None:
        super().__init__()
        self.bank = nn.Parameter(bank)
        self.lr_ratio = lr_ratio

    def learning_rate_factors(self) -> Mapping[str, float]:
        return {"bank": self.lr_ratio}

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"vblora_vector_bank": self.bank}


class VBLoRA(Method):
    """The logits at one site."""

    Config = VBLoRAConfig
    default_learning_rate = 1e-2  # of the logits; the authors' rate for the bank, 1e-3, follows from bank_lr_ratio
    peft_type = "VBLORA"
    kinds = frozenset[Kind]({"linear", "conv1d"})
    starts_as_base = False

    def __init__(self, config: VBLoRAConfig, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__(config, site, seed, shared)
        self.topk = config.topk
        self.dropout = config.dropout
        r, b, h = config.r, config.vector_length, config.num_vectors
        shapes = (r, site.in_features // b, h), (site.out_features // b, r, h)
        A, B = initial_logits(shapes, site, seed)
        self.logits_A = nn.Parameter(A.to(site.device))
        self.logits_B = nn.Parameter(B.to(site.device))

    @classmethod
    def shared(cls, config: VBLoRAConfig, sites: list[Site], seed: int) -> VectorBank:
        shape, device = (config.num_vectors, config.vector_length), sites[0].device
        if device.type == "meta":
            return VectorBank(torch.empty(shape, device=device), config.bank_lr_ratio)
        bank = BANK_BOUND * (2 * torch.rand(shape, generator=generator(seed, "vblora_vector_bank")) - 1)
        return VectorBank(bank.to(device), config.bank_lr_ratio)

    @classmethod
    def check(cls, config: VBLoRAConfig, sites: list[Site]) -> list[str]:
        b, factor = config.vector_length, math.gcd(*(side for s in sites for side in (s.in_features, s.out_features)))
        undivided = [site for site in sites if site.in_features % b or site.out_features % b]
        problems = [
            f"vector_length: {b} does not divide both sides of {site.name} ({site.size}); "
            f"it must divide {factor}, the largest number that divides those of all adapted modules"
            for site in undivided[:1]
        ]
        return problems + rank_problems(sites, lambda _: config.r)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        x_dropped = dropout(x, self.dropout) if self.training else x
        return forward_low_rank(base, x, x_dropped, *self.low_rank(), 1.0)

    def merged(self, weight: Tensor) -> Tensor:
        return merged_low_rank(weight, *self.low_rank(), 1.0)

    @classmethod
    def not_low_rank(cls, config: VBLoRAConfig) -> str | None:
        return None

    def low_rank(self) -> tuple[Tensor, Tensor]:
        shared = self._shared[0]
        assert isinstance(shared, VectorBank)
        A = mixed_vectors(self.logits_A, shared.bank, self.topk)  # [r, I/b, b]
        B = mixed_vectors(self.logits_B, shared.bank, self.topk)  # [O/b, r, b]
        return A.flatten(1), B.transpose(1, 2).flatten(0, 1)

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"vblora_logits_A": self.logits_A, "vblora_logits_B": self.logits_B}

    @classmethod
    def peft_config(cls, config: VBLoRAConfig) -> dict[str, Any]:
        return {
            "r": config.r,
            "num_vectors": config.num_vectors,
            "vector_length": config.vector_length,
            "topk": config.topk,
            "vblora_dropout": config.dropout,
            "save_only_topk_weights": config.save_topk_only,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_vector_bank_bound": BANK_BOUND,
            "init_logits_std": LOGITS_STD,
        }

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> VBLoRAConfig:
        return VBLoRAConfig(
            **{name: fields[name] for name in ("r", "num_vectors", "vector_length", "topk")},
            dropout=float(fields.get("vblora_dropout") or 0),
            save_topk_only=bool(fields.get("save_only_topk_weights", False)),
        )

    @classmethod
    def tensors_to_peft(cls, tensors: Mapping[str, Tensor], config: VBLoRAConfig) -> dict[str, Tensor]:
        if not config.save_topk_only:
            return dict(tensors)
        found = {}
        for key, tensor in tensors.items():
            if ".vblora_logits_" in key:
                found[key + INDICES], found[key + WEIGHTS] = only_chosen(tensor, config.topk)
            else:
                found[key] = tensor
        return found

    @classmethod
    def tensors_from_peft(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
        found = {key: tensor for key, tensor in tensors.items() if not key.endswith((INDICES, WEIGHTS))}
        for key, indices in tensors.items():
            if key.endswith(INDICES):
                name = key.removesuffix(INDICES)
                found[name] = _logits_on_file(name, indices, tensors.get(name + WEIGHTS), fields)
        return found


def _logits_on_file(name: str, indices: Tensor, weights: Tensor | None, fields: Mapping[str, Any]) -> Tensor:
    h, k = fields["num_vectors"], fields["topk"]
    if weights is None or (*weights.shape[:-1], weights.shape[-1] + 1) != (*indices.shape[:-1], k):
        raise ValueError(f"{name}: indices and weights do not belong together")
    if bool((indices.long() >= h).any()) or bool((indices < 0).any()):
        raise ValueError(f"{name}: an index names none of the bank's {h} vectors")
    return logits_of_chosen(indices, weights, h)


def initial_logits(shapes: tuple[tuple[int, ...], ...], site: Site, seed: int) -> list[Tensor]:
    """Returns tensors of these shapes from N(0, 0.1²), in float32 on the CPU."""
    if site.device.type == "meta":
        return [torch.empty(shape, device="meta") for shape in shapes]
    source = site.generator(seed)
    return [LOGITS_STD * torch.randn(shape, generator=source) for shape in shapes]
