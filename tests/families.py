"""Tiny random models of every kind that a task needs, with tokenizers, as folders that transformers has saved."""

import string

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.conftest import WORDS, tiny_llama_config

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LETTERS = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
VOCABULARY = {word: index for index, word in enumerate([*SPECIAL, *WORDS.split(), *LETTERS[1:]])}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def piece_tokenizer(template):
    """A WordPiece tokenizer: known words are one token, others one for each letter. `template` is `single|pair`."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="<unk>", max_input_chars_per_word=40))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single, pair = template.split("|")
    special = [(token, VOCABULARY[token]) for token in SPECIAL]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


BERT_TEMPLATE = "<s>:0 $A:0 </s>:0|<s>:0 $A:0 </s>:0 $B:1 </s>:1"
T5_TEMPLATE = "$A </s>|$A </s> $B </s>"
ENCODER_ONLY = {"bert": "BertModel", "roberta": "RobertaModel", "vit": "ViTModel"}
"""What a checkpoint without a task head is saved from."""


def tiny_config(family, **changes):
    import transformers

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(VOCABULARY)}
    if family == "bert":
        return transformers.BertConfig(**{**SIZES, **ids, "max_position_embeddings": 64, **changes})
    if family == "roberta":
        return transformers.RobertaConfig(
            **{**SIZES, **ids, "max_position_embeddings": 66, "type_vocab_size": 1, **changes}
        )
    if family == "llama":
        return tiny_llama_config(**{**ids, "pad_token_id": None, **changes})
    if family == "vit":
        return transformers.ViTConfig(**{**SIZES, "image_size": 16, "patch_size": 8, **changes})
    return transformers.T5Config(
        **{
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            **ids,
            **changes,
        }
    )


def tiny_model(family, kind, **changes):
    """A random model in eval mode; `kind` is the name of a transformers class."""
    import transformers

    torch.manual_seed(7)
    return getattr(transformers, kind)._from_config(tiny_config(family, **changes)).eval()


def save_family(family, folder, **changes):
    """Writes a base model without a task head, and its tokenizer or image processor, into `folder`."""
    from transformers import ViTImageProcessorPil

    kinds = {**ENCODER_ONLY, "llama": "LlamaForCausalLM", "t5": "T5ForConditionalGeneration"}
    tiny_model(family, kinds[family], **changes).save_pretrained(folder)
    if family == "vit":
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    elif family == "llama":
        tokenizer = piece_tokenizer("<s> $A|<s> $A $B")
        tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)
    else:
        piece_tokenizer(T5_TEMPLATE if family == "t5" else BERT_TEMPLATE).save_pretrained(folder)
    return folder
