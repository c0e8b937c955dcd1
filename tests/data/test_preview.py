import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peftcli.data.collation import collate, samples_of
from peftcli.data.dataset import Sample
from peftcli.data.preview import Segment, render_sample


def sample(text, tokenizer, supervised):
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    return Sample(ids, np.array(supervised(len(ids)), np.uint8))


def test_a_character_of_several_tokens_is_shown_whole(tokenizer):
    for cut in (1, 2, 3):
        one = sample("😀x", tokenizer, lambda n, cut=cut: [0] * cut + [1] * (n - cut))
        assert len(one.input_ids) == 5
        assert render_sample(one, tokenizer) == [Segment("😀x", True)]
    assert render_sample(sample("😀x", tokenizer, lambda _: [0, 0, 0, 0, 1]), tokenizer) == [
        Segment("😀", False),
        Segment("x", True),
    ]


def test_special_tokens_and_spaces_are_shown(tokenizer):
    one = sample("<|im_start|> quick<|im_end|>", tokenizer, lambda n: [0] + [1] * (n - 2) + [0])
    assert render_sample(one, tokenizer) == [
        Segment("<|im_start|>", False),
        Segment(" quick", True),
        Segment("<|im_end|>", False),
    ]


def test_a_character_cut_off_at_the_end_is_not_hidden(tokenizer):
    one = Sample(*(part[:2] for part in sample("😀", tokenizer, lambda n: [1] * n)[:2]))
    assert [segment.text for segment in render_sample(one, tokenizer)] == ["\ufffd"]


def test_sentencepiece_spaces_are_kept():
    backend = Tokenizer(models.WordLevel({"▁the": 0, "▁fox": 1}, unk_token="▁the"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    one = Sample(np.array([0, 1], np.int32), np.array([0, 1], np.uint8))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert render_sample(one, tokenizer) == [Segment("the", False), Segment(" fox", True)]


def test_a_collated_batch_shows_what_was_put_in(tokenizer):
    samples = [sample(text, tokenizer, lambda n: [0] + [1] * (n - 1)) for text in ("Hello there", "a fox")]
    for layout in ("padded", "flat"):
        shown = [render_sample(one, tokenizer) for one in samples_of(collate(samples, tokenizer.pad_token_id, layout))]
        assert shown == [render_sample(one, tokenizer) for one in samples]
