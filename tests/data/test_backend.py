"""What the tokenizer's library is asked directly, against what transformers makes of it."""

import random

import numpy as np
import pytest
from chat_templates import CHATML, LLAMA3
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peftcli.data.backend import TokenBytes, token_ids
from peftcli.data.chat import render_answers, special_tokens
from peftcli.data.tokenization import encode_chats

TEXTS = [
    "The quick brown fox",
    "",
    " two  spaces, a line\n\nand more\t",
    "naïve café – 3½ €",
    "東京とベルリン",
    "👩‍🚀 and 🇩🇪, e\u0301",
    "<|im_start|>user\nHello <|im_end|>\n",
]


def flat(ids):
    return np.array([one for some in ids for one in some], np.int32), np.cumsum([0, *map(len, ids)])


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("settings", [{}, {"add_bos": True}, {"trim_offsets": True}], ids=str)
def test_the_ids_are_those_of_a_call(settings, add_special_tokens, make_tokenizer):
    tokenizer = make_tokenizer(**settings)
    wanted = [tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"] for text in TEXTS]
    assert token_ids(TEXTS, tokenizer, add_special_tokens=add_special_tokens) == wanted
    assert token_ids([], tokenizer) == []


def test_no_setting_of_an_earlier_call_is_left(make_tokenizer):
    tokenizer = make_tokenizer()
    wanted = token_ids(TEXTS, tokenizer)
    tokenizer(TEXTS, padding=True, truncation=True, max_length=2)
    assert token_ids(TEXTS, tokenizer) == wanted
    tokenizer.split_special_tokens = True
    found = token_ids(TEXTS, tokenizer)
    assert found == tokenizer(TEXTS)["input_ids"]
    assert found[:-1] == wanted[:-1]
    assert found[-1] != wanted[-1]


def test_a_class_that_does_more_is_called(make_tokenizer):
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **settings):
            return super()._encode_plus([one.upper() if one == "fox" else one for one in text], **settings)

    plain = make_tokenizer()
    shouting = Shouting(tokenizer_object=plain.backend_tokenizer)
    assert token_ids(["dog", "fox"], shouting) == [plain("dog")["input_ids"], plain("FOX")["input_ids"]]


def test_tokens_end_where_the_library_says(make_tokenizer):
    tokenizer = make_tokenizer()
    encodings = tokenizer.backend_tokenizer.encode_batch(TEXTS, add_special_tokens=False)
    ids, offsets = flat([one.ids for one in encodings])
    found = TokenBytes(tokenizer).ends(TEXTS, ids, offsets)
    for text, encoding, start, stop in zip(TEXTS, encodings, offsets[:-1], offsets[1:], strict=True):
        ends = [end for _, end in encoding.offsets]
        # a character that is split over tokens ends with the last of them
        whole = [at for at in range(len(ends)) if ends[at + 1 : at + 2] != [ends[at]]]
        assert [found[start:stop][at] for at in whole] == [len(text[: ends[at]].encode()) for at in whole]


def ends_of(tokenizer, texts):
    ids, offsets = flat(token_ids(texts, tokenizer, add_special_tokens=False))
    return TokenBytes(tokenizer).ends(texts, ids, offsets)


def test_where_ids_do_not_tell_nothing_is_said(make_tokenizer):
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert ends_of(PreTrainedTokenizerFast(tokenizer_object=words), ["a a"]) is None

    greedy = make_tokenizer()
    greedy.add_tokens([AddedToken("<x>", lstrip=True)])
    assert ends_of(greedy, ["a<x>"]).tolist() == [1, 4]
    assert ends_of(greedy, ["a <x>"]) is None  # the token has taken the space

    composing = make_tokenizer()
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    assert ends_of(composing, ["caf\u00e9"])[-1] == 5
    assert ends_of(composing, ["cafe\u0301"]) is None
    composing.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert ends_of(composing, ["CAFE"])[-1] == 4
    assert ends_of(composing, ["CAF\u00c9"]) is None


class NoBytes(TokenBytes):
    def ends(self, *_):
        return None


@pytest.mark.parametrize("train_on_all", [False, True])
@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_masks_are_the_same_by_bytes_and_by_characters(template, train_on_all, make_tokenizer):
    tokenizer, rng = make_tokenizer(template), random.Random(0)
    marks, chats = special_tokens(tokenizer), []
    for _ in range(60):
        said = [" ".join(rng.choices(TEXTS[:-1], k=3)) + "." for _ in range(4)]
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        chats += render_answers(messages, tokenizer, marks)
    by_bytes, by_characters = (
        encode_chats(chats, tokenizer, kind(tokenizer), train_on_all=train_on_all).samples
        for kind in (TokenBytes, NoBytes)
    )
    texts = [chat.text for chat in chats]
    assert TokenBytes(tokenizer).ends(texts, by_bytes.input_ids, by_bytes.offsets) is not None
    assert by_bytes.fingerprint == by_characters.fingerprint
