"""Names that `method.type` can have beside those of methods: each stands for a method and a quantised base.

They are spelled out when all layers of a recipe are merged; nothing after that knows that they exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shorthand:
    """What a name stands for.

    Attributes:
        method: The `method.type`.
        quantization: The fields of `quantization`.
        about: What it is; the first line by itself too.
    """

    method: str
    quantization: Mapping[str, str]
    about: str


SHORTHANDS: Mapping[str, Shorthand] = {
    "qlora": Shorthand(
        method="lora",
        quantization={"type": "nf4"},
        about="""QLoRA: LoRA on a base that is held in 4 bits.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314. A shorthand for

    method: {type: lora}
    quantization: {type: nf4}

The fields are those of lora. Every other method can have a quantised base too, by the section `quantization`.""",
    )
}
