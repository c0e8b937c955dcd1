"""Merges an adapter into its base model's files: tensor by tensor, each adapted layer proven on the way.

A weight at a time is read from the base's safetensors, changed by the method's own `merged`, compared with what the
adapted layer computes, and written under the same name in the same shard, so the result is the folder that
transformers would have saved. No model is built for it, and no more than one layer is in memory.
"""

from peftcli.headers import INDEX_FILE, SINGLE_FILE
from peftcli.merge.agreement import TOLERANCE, Agreement, compare, logits_of, require_agreement
from peftcli.merge.proof import LAYER_TOLERANCE, LayerProof
from peftcli.merge.stored import stored_dtype
from peftcli.merge.writing import merge_files

__all__ = [
    "INDEX_FILE",
    "LAYER_TOLERANCE",
    "SINGLE_FILE",
    "TOLERANCE",
    "Agreement",
    "LayerProof",
    "compare",
    "logits_of",
    "merge_files",
    "require_agreement",
    "stored_dtype",
]
