"""Opens what a recipe names, as far as each command needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from peftcli import data, models, recipe, startup
from peftcli.data.batching import Batcher, Batches
from peftcli.data.meaning import Meaning
from peftcli.errors import ModelError
from peftcli.quantization import stored_fields
from peftcli.recipe import Recipe
from peftcli.reporting import Reporter
from peftcli.run.packing import load_packed, pack
from peftcli.run.prepacked import held
from peftcli.training import memory

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftcli.data import Dataset, PreparedData, RawData
    from peftcli.models import ModelSource


@dataclass(frozen=True)
class Base:
    """A base model, opened but without its weights.

    Attributes:
        section: The recipe's model section.
        source: Where its files are.
        config: Its configuration, which knows the labels.
        processor: Its tokenizer, or its image processor.
        meaning: What its data is encoded for.
        remarks: What was decided on the way and the user should know.
        quantization: How its linear layers are held in 4 bits; None where they are not.
        dense: Paths, or their ends, of modules that are not, beside the heads.
    """

    section: recipe.ModelSection
    source: ModelSource
    config: PretrainedConfig
    processor: PreTrainedTokenizerBase | BaseImageProcessor
    meaning: Meaning = field(default_factory=Meaning)
    remarks: tuple[str, ...] = ()
    quantization: recipe.QuantizationSection | None = None
    dense: tuple[str, ...] = ()

    @property
    def comes_packed(self) -> bool:
        """Whether its layers are packed in its files already."""
        return bool(stored_fields(self.config))

    @property
    def reads_images(self) -> bool:
        """Whether the model's inputs are images instead of text."""
        return self.section.task == "image-classification"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of a model that reads text."""
        assert not self.reads_images
        return cast("PreTrainedTokenizerBase", self.processor)

    @property
    def pad_token_id(self) -> int | None:
        """The id that batches are padded with: a decoder that labels texts finds their end by it."""
        ids: tuple[int | None, ...] = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return ids[0] if ids[0] is not None or self.section.task != "sequence-classification" else ids[1]

    @property
    def revision(self) -> str | None:
        """The hub commit that was read, or the revision asked for."""
        return getattr(self.config, "_commit_hash", None) or self.section.revision


def open_base(
    section: recipe.ModelSection,
    tokenizer_from: Path | None = None,
    meaning: Meaning | None = None,
    packed: recipe.QuantizationSection | None = None,
) -> Base:
    """Returns the base model's configuration and tokenizer or image processor.

    Args:
        section: The recipe's model section.
        tokenizer_from: A folder whose tokenizer or image processor is to be used, if it has one.
        meaning: The labels and tasks of the data; None where there are none.
        packed: The recipe's quantization section.
    """
    source = models.locate(section)
    config = models.load_config(section, source)
    known = in_order_of(config, meaning or Meaning(section.task))
    if known.labels is not None:
        models.set_labels(config, known.labels.names, known.labels.kind)
    images = section.task == "image-classification"
    load = models.load_image_processor if images else models.load_tokenizer
    kept = "preprocessor_config.json" if images else "tokenizer_config.json"
    own = section
    if tokenizer_from is not None and (tokenizer_from / kept).is_file():
        own = recipe.ModelSection.model_construct(name=str(tokenizer_from))
    where = source if own is section else models.ModelSource(own.name, True, {})
    quantization = held(packed, config, section.name)
    base = _with_padding(Base(section, source, config, load(own, where), known, (), quantization))
    startup.done()  # transformers is in by now, which is the last large thing to import
    return base


def in_order_of(config: PretrainedConfig, meaning: Meaning) -> Meaning:
    """Returns the labels in the model's own order, where it has a head for exactly these names, else as they are."""
    labels = meaning.labels
    own: dict[Any, str] = config.id2label or {}
    if labels is None or set(own.values()) != set(labels.names):
        return meaning
    return replace(meaning, labels=replace(labels, names=tuple(own[i] for i in sorted(own))))


def _with_padding(base: Base) -> Base:
    """Returns `base` with the padding token that a decoder needs to find the end of a text that it labels."""
    if base.section.task != "sequence-classification":
        return base
    text, pad = base.config.get_text_config(), base.pad_token_id
    if pad is None:
        raise ModelError(
            "model.task: sequence-classification needs a padding or end-of-sequence token, and the tokenizer has none"
        )
    if getattr(text, "pad_token_id", None) == pad:
        return base
    text.pad_token_id = pad
    token = base.tokenizer.convert_ids_to_tokens(pad)
    return replace(
        base,
        remarks=(
            *base.remarks,
            f"texts are padded with {token}: the model names no padding token",
        ),
    )


def load_weights(
    base: Base,
    device: torch.device,
    seed: int = 0,
    reporter: Reporter | None = None,
    *,
    wide: bool = False,
    hold_on: torch.device | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Returns the base model with its weights, and the names of the parameters that start anew.

    Args:
        base: The model, opened.
        device: Where it will compute, which decides its dtypes.
        seed: Decides the start of what starts anew.
        reporter: Where is noted what was packed.
        wide: Hold the weights in float32 where the recipe leaves it open, because they are to train themselves.
        hold_on: Where the weights lie for now, if not on `device`, which may have no room for all of them.
    """
    section, home = base.section, hold_on or device
    if wide and section.dtype == "auto":
        section = section.model_copy(update={"dtype": "float32"})
    dtype = str(models.resolve_dtype(section, base.config, device)).removeprefix("torch.")
    section = section.model_copy(update={"dtype": dtype})
    with memory.loading_explained(section.name, dtype, device, packed=base.quantization is not None):
        if base.quantization is None:
            return models.load_model(section, base.source, base.config, home, seed)
        if base.comes_packed:
            return load_packed(base, section, device, seed, reporter, home)
        model, fresh = models.load_model(section, base.source, base.config, torch.device("cpu"), seed)
        return pack(model, base, fresh, device, reporter, home), fresh


def read_data(wanted: Recipe) -> RawData:
    """Returns the recipe's rows, not yet encoded: its files' mistakes show before the model is touched."""
    return data.read(wanted.data, wanted.training.seed, wanted.model)


def encode_data(wanted: Recipe, raw: RawData, base: Base) -> PreparedData:
    """Returns the recipe's rows, encoded for its model."""
    return data.prepare(
        wanted.data,
        None if base.reads_images else base.tokenizer,
        vocab_size=models.vocabulary_size(base.config),
        max_positions=models.max_positions(base.config),
        seed=wanted.training.seed,
        raw=replace(raw, meaning=base.meaning),
    )


def make_batcher(
    dataset: Dataset, base: Base, *, joins: bool, always: bool = False, prompts: Sequence[tuple[int, ...]] = ()
) -> Batches:
    """Returns what makes batches of `dataset`; see `Batcher` for `joins`, `always` and `prompts`."""
    if not isinstance(dataset, data.EncodedDataset):
        from peftcli.data.images import ImageBatcher

        channels = int(getattr(base.config, "num_channels", 3))
        return ImageBatcher(dataset, cast("BaseImageProcessor", base.processor), channels)
    hidden = int(base.config.get_text_config().hidden_size)
    positions = models.max_positions(base.config)
    return Batcher(dataset, base.pad_token_id, hidden, joins, always, prompts, positions)
