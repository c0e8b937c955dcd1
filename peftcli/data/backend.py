"""The tokenizer's own library, asked directly: ids without characters, and the bytes that each token stands for.

transformers asks the library for the characters of every token, which takes it half as long again, and makes Python
objects of them. A byte-level tokenizer's ids alone say where a token ends in its text: tokens are its bytes, cut up.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Returns the ids of each text, just as a call of `tokenizer` does."""
    if not texts:  # for which transformers has an error
        return []
    settings: dict[str, Any] = {
        "add_special_tokens": add_special_tokens,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "verbose": False,
    }
    if _adds_nothing(tokenizer):
        first: Any = tokenizer(list(texts[:1]), **settings)  # leaves its settings with the library
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        found = [one.ids for one in encodings]
        if found[:1] == first["input_ids"]:
            return found
    batch: Any = tokenizer(list(texts), **settings)
    return list(batch["input_ids"])


def _adds_nothing(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a tokenizer's class leaves texts to the library alone, as few do not (CodeLlama's)."""
    from transformers import PreTrainedTokenizerFast

    own, plain = type(tokenizer), PreTrainedTokenizerFast
    return tokenizer.is_fast and all(
        getattr(own, name, None) is getattr(plain, name) for name in ("__call__", "_encode_plus")
    )


class TokenBytes:
    """How many bytes of a text each token stands for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Looks at the kind of `tokenizer`; the tokens themselves are looked up as they are met."""
        from tokenizers import decoders, normalizers, pre_tokenizers

        self._tokenizer = tokenizer
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._known = backend is not None and isinstance(backend.decoder, decoders.ByteLevel)
        self._alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        self._added: dict[int, Any] = dict(tokenizer.added_tokens_decoder) if self._known else {}
        normalizer = backend.normalizer if self._known else None
        self._form = "NFC" if isinstance(normalizer, normalizers.NFC) else None
        self._normalizes = normalizer is not None
        self._sizes = np.empty(0, np.int64)

    def ends(
        self, texts: Sequence[str], ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64] | None:
        """Returns after how many bytes of its own text each of T tokens ends [T]; None where ids alone do not say it.

        Args:
            texts: The texts [N].
            ids: Their ids, one text after the other [T].
            offsets: Where each text's ids start, and at last T [N + 1].
        """
        if not self._known or not all(map(self._stays, texts)):
            return None
        sizes = self._sizes_of(ids)
        if sizes is None:
            return None
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        if np.diff(sums[offsets]).tolist() != [num_bytes(text) for text in texts]:
            return None  # something was left out or put in: an added token that takes the white space around it
        return np.asarray(sums[1:] - np.repeat(sums[offsets[:-1]], np.diff(offsets)))

    def _stays(self, text: str) -> bool:
        """Returns whether a text is not changed before it is cut up, or each of its bytes for one other."""
        if not self._normalizes or text.isascii():
            return True
        return self._form is not None and unicodedata.is_normalized("NFC", text)

    def _sizes_of(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64] | None:
        """Returns each token's bytes; None where one is not made of bytes."""
        highest = int(ids.max(initial=-1))
        if highest >= len(self._sizes):
            self._sizes = np.concatenate([self._sizes, np.full(highest + 1 - len(self._sizes), -1, np.int64)])
        for token in np.unique(ids[self._sizes[ids] < 0]).tolist():
            size = self._size(token)
            if size is None:
                return None
            self._sizes[token] = size
        return np.asarray(self._sizes[ids])

    def _size(self, token: int) -> int | None:
        if token in self._added:
            return num_bytes(self._added[token].content)
        text: Any = self._tokenizer.convert_ids_to_tokens(token)
        return len(text) if isinstance(text, str) and self._alphabet.issuperset(text) else None


def num_bytes(text: str) -> int:
    """Returns the length of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
