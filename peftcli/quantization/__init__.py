"""Holds the base's linear layers in 4 or 8 bits, as bitsandbytes packs them, and says what a packed layer stands for.

QLoRA: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, sections 2 and 3:

    y = x deq(W_q)ᵀ + b        deq(W_q) [O, I] = code[q] · absmax, q in 4 bits, one absmax for 64 weights in a row

With double quantisation absmax is itself held in 8 bits: 4.127 bits a weight instead of 4.5.

LLM.int8(): Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv 2208.07339,
sections 3.1 and 3.2:

    y = (s_x s_Wᵀ / 127²) ∘ (x_q W_qᵀ) + x_o deq(W_q)_oᵀ + b        deq(W_q) [O, I] = W_q · s_W / 127

with one scale for a row of W and of x, and with the columns o where an input reaches the threshold left unrounded. On a
CPU, bitsandbytes rounds the inputs in evaluation only: in training it computes x deq(W_q)ᵀ + b.

Gradients flow through deq(W_q) to the inputs and never into W_q: what is packed does not change.
"""

from peftcli.quantization.layers import bitsandbytes, compute_dtype, packable, quantize
from peftcli.quantization.stored import (
    adopt,
    companions_of,
    is_companion,
    stored_fields,
    stored_section,
    unpack_stored,
)
from peftcli.quantization.weights import (
    Packing,
    computing_dtypes,
    is_int8,
    is_quantised,
    num_weights,
    packed_share,
    require_exact_biases,
    unpacked,
    unrounded_inputs,
)

__all__ = [
    "Packing",
    "adopt",
    "bitsandbytes",
    "companions_of",
    "compute_dtype",
    "computing_dtypes",
    "is_companion",
    "is_int8",
    "is_quantised",
    "num_weights",
    "packable",
    "packed_share",
    "quantize",
    "require_exact_biases",
    "stored_fields",
    "stored_section",
    "unpack_stored",
    "unpacked",
    "unrounded_inputs",
]
