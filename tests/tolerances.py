"""How far two results may be apart, by dtype and by what lies between them. Every test's tolerance is named here."""

import torch

EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Two ways to compute the same value, relative to the largest: a closed form, a merge, another implementation."""

HALF = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""The same where one of them rounds to half precision: a few units of the last place."""

LOSS_CURVE = 1e-3
"""Losses of two training loops, step by step: rounding grows through the optimizer's normalisation."""

CANCELLED = {torch.float64: 1e-11, torch.float32: 1e-3}
"""A row norm that cancellation has cost digits, just before the direct form takes over, relative to itself."""

STANDARD_ERRORS = 5
"""How many of its standard errors a sampled mean may be from what it estimates."""

PACKED = 1e-6
"""An adapted NF4 layer and the same on a dense one that holds its dequantised weight; relative to the largest."""

LOSS = 1e-6
"""A float32 loss, its logits and gradients, from the same model's rows taken in two ways; relative to the largest."""

SAME_STEPS = 1e-5
"""Adapter tensors after a few AdamW steps of 1e-2 from gradients that differ by rounding, which its division grows."""

LEFT_OVER = 1e-3
"""The norm of what a truncated SVD in float32 leaves of a matrix, relative to that norm."""

SAME_ON_RANKS = 1e-6
"""Adapter tensors after a few steps of SGD on one process and on several: the gradient's terms are added in another
order, and a step is not divided by their size."""

EIGHT_BITS = 2e-2
"""AdamW's path over a few steps with its moments in 8 bits, relative to that in 32. The 64 steps of the table between a
tenth of a block's largest moment and the largest round a normal block's moments by about 1 %, in each step anew."""

INT8_CONSTANT = 3e-5
"""bitsandbytes' int8 product and the paper's equation: it writes 6.200124e-05 for 1/127², which is 1.8e-5 more."""

INT8_INPUTS = 2e-2
"""An int8 product and that of the same weight with unrounded inputs: half a step of 1/127 in each of a row's inputs."""

PACKED_ELSEWHERE = 1e-3
"""The same weight packed on a GPU and on a CPU: the share of bytes that differ, and the norm of what the two stand for
apart, relative to it. A weight between two of the 16 values may become either."""
