"""What a model is before it has weights: its configuration, its tokenizer, its modules and their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftcli import vetting
from peftcli.errors import ModelError
from peftcli.models.source import ModelSource, explained

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftcli.recipe import ModelSection


TASK_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
}
"""The transformers class of each `model.task`."""
LANGUAGE_TASKS = ("causal-lm", "seq2seq-lm")
"""Tasks whose models come whole: their head is part of what was pretrained."""
PROBLEM_TYPES: dict[str, Any] = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
"""What transformers calls the kinds of labels."""


def load_config(section: ModelSection, source: ModelSource) -> PretrainedConfig:
    """Returns the model's configuration; reads no weights."""
    from transformers import AutoConfig

    with explained(section, source, "configuration"):
        config: PretrainedConfig = AutoConfig.from_pretrained(source.name, **source.options)
    vetting.check_config(config, section.name)
    if section.attn_implementation is not None:
        config._attn_implementation = section.attn_implementation
    return config


def load_tokenizer(section: ModelSection, source: ModelSource) -> PreTrainedTokenizerBase:
    """Returns the model's tokenizer, unchanged."""
    from transformers import AutoTokenizer

    with explained(section, source, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.name, **source.options)
    return tokenizer


def load_image_processor(section: ModelSection, source: ModelSource) -> BaseImageProcessor:
    """Returns the model's image processor, which works on Pillow's images alone wherever it runs."""
    from transformers import AutoImageProcessor

    with explained(section, source, "image processor"):
        processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(source.name, backend="pil", **source.options)
    return processor


def set_labels(config: PretrainedConfig, names: Sequence[str], kind: str) -> None:
    """Makes `config` that of a model that answers with `names`, of a kind of `PROBLEM_TYPES`.

    Such a model generates nothing, so a decoder among them needs no cache.
    """
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = PROBLEM_TYPES[kind]
    config.use_cache = False


def model_class(task: str) -> Any:
    """Returns the transformers class that makes a model for `task`."""
    import transformers

    return getattr(transformers, TASK_CLASSES[task])


def skeleton(config: PretrainedConfig, task: str = "causal-lm") -> PreTrainedModel:
    """Returns the model on the meta device: every module and shape, no weights, in a fraction of a second."""
    import torch

    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(task).from_config(config)
    except (ValueError, ImportError) as error:
        raise ModelError(
            f"model.name: {config.model_type} models cannot be used as {task}: {str(error).splitlines()[0]}"
        ) from error
    return model


def vocabulary_size(config: PretrainedConfig) -> int:
    """Returns how many token ids the model's input embedding has; 0 where it reads no tokens."""
    return int(getattr(config.get_text_config(), "vocab_size", 0))


POSITIONS_AFTER_PADDING = ("roberta", "camembert", "mpnet", "longformer", "esm", "data2vec-text", "xmod", "ibert")
"""Parts of the types of models that number positions from their padding token's id on, and so have fewer."""


def max_positions(config: PretrainedConfig) -> int | None:
    """Returns the longest sequence that the model was made for, or None where it states none."""
    text = config.get_text_config()
    value = getattr(text, "max_position_embeddings", None)
    if not value:
        return None
    after_padding = any(part in config.model_type for part in POSITIONS_AFTER_PADDING)
    return int(value) - (int(text.pad_token_id or 0) + 1 if after_padding else 0)
