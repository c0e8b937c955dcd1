"""LN tuning: the LayerNorms of the base model train, and nothing else.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", arXiv 2312.11420,
section 3; Qi et al. 2022, "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models",
arXiv 2211.08682, eq. 3:

    y = (x − mean x) ⊘ √(var x + ε) ⊙ γ + β        x, y [..., D]   γ, β [D], trained; RMSNorms have γ alone

Init: the base itself; nothing is added.
Trainable per site: 0.
Merge: none needed; the trained norms are the base's own.

Deviates from the papers: every norm of the model trains, the last one before the head and those of queries and keys
included. It fits models without biases, which BitFit cannot train.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from peftcli.methods._place import is_norm
from peftcli.methods._protocol import Method, MethodConfig

NORMS = r"(?:\w*[nN]orm\w*|ln_\w+)"
"""What the paths of norms end with, in all the families that transformers has."""
PEFT_PART = "ln_tuning_layers"
"""What PEFT puts between a norm's path and its parameter."""


class LNTuningConfig(MethodConfig):
    """The fields of `method:` when `type: ln_tuning`."""

    type: Literal["ln_tuning"] = "ln_tuning"


class LNTuning(Method):
    """Chooses the norms; there are no adapters."""

    Config = LNTuningConfig
    default_learning_rate = 1e-2  # a gain near 1 moves far less per step than a weight near 0
    default_head_learning_rate = None
    peft_type = "LN_TUNING"
    place = "nowhere"

    @classmethod
    def trains(cls, config: LNTuningConfig, parameter: str, owner: nn.Module) -> bool:
        return is_norm(owner)

    @classmethod
    def check_model(cls, config: LNTuningConfig, model: nn.Module) -> list[str]:
        base = getattr(model, "base_model", model)
        named = [path for path, module in base.named_modules() if is_norm(module)]
        strange = [path for path in named if not re.fullmatch(NORMS, path.rpartition(".")[2])]
        if not named:
            return ["type: this model has no LayerNorms, so ln_tuning has nothing to train; lora can adapt it"]
        return [f"type: {path} is a norm by another name, which its file could not tell" for path in strange[:1]]

    @classmethod
    def peft_config(cls, config: LNTuningConfig) -> dict[str, Any]:
        return {"target_modules": rf"(.*\.)?{NORMS}"}

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> LNTuningConfig:
        if fields["target_modules"] != cls.peft_config(LNTuningConfig())["target_modules"]:
            raise ValueError(f"target_modules is {fields['target_modules']}; this version trains all norms or none")
        return LNTuningConfig()

    @classmethod
    def tensors_to_peft(cls, tensors: Mapping[str, Tensor], config: LNTuningConfig) -> dict[str, Tensor]:
        # A norm's path is its parameter's, less the leaf; what else there is belongs to a task's head.
        return {re.sub(rf"(\.{NORMS})\.(\w+)$", rf"\1.{PEFT_PART}.\2", key): one for key, one in tensors.items()}

    @classmethod
    def tensors_from_peft(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
        return {key.replace(f".{PEFT_PART}.", "."): one for key, one in tensors.items()}
