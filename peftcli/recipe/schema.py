"""What a recipe may say: its sections, their fields, defaults and limits.

The descriptions are what `peftcli schema`, the editor's help and the documentation show. The fields of `method` are
declared by each method in `peftcli/methods`; rules between fields are in `rules.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from peftcli.recipe.values import checked_path


class Section(BaseModel):
    """A group of recipe fields. An unknown field is an error; values are never converted from another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model, which stays as it is."""

    name: str = Field(min_length=1, description="The base model: a hub id, or a local folder (`~` is the home folder).")
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a hub model; a commit makes the run repeatable. Left out: main.",
    )
    gguf_file: str | None = Field(
        default=None, min_length=1, description="Name of a GGUF file beside the model, to load the weights from it."
    )
    task: Literal[
        "causal-lm", "seq2seq-lm", "sequence-classification", "token-classification", "image-classification"
    ] = Field(
        default="causal-lm",
        description="What the model does: continue a text, answer one with another, or label texts, words or images.",
    )
    num_labels: int | None = Field(
        default=None, gt=0, description="Number of labels, checked against the data. Left out: as many as there are."
    )
    problem_type: Literal["auto", "single-label", "multi-label", "regression"] = Field(
        default="auto",
        description="What sequence-classification predicts. auto: fractions are regression, lists are multi-label.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Number format of the base weights. auto: the one the model was saved in."
    )
    attn_implementation: str | None = Field(
        default=None,
        description="Attention code of transformers, such as sdpa or eager. Left out: transformers chooses.",
    )

    _have_names = field_validator("name", "gguf_file")(checked_path)

    @field_validator("attn_implementation")
    @classmethod
    def _is_of_transformers(cls, value: str | None) -> str | None:
        if value is not None and "/" in value:
            raise ValueError("must name attention code of transformers: code from a repository is never run")
        return value

    @field_validator("gguf_file")
    @classmethod
    def _is_a_bare_name(cls, value: str | None) -> str | None:
        if value is not None and (any(separator in value for separator in "/\\") or value == ".."):
            raise ValueError("must be the name of a file in the model's folder, without a path")
        return value


class QuantizationSection(Section):
    """How the base's linear layers are held in 4 or 8 bits. They do not train, and the output head stays as it is."""

    type: Literal["nf4", "fp4", "int8"] = Field(
        default="nf4",
        description="The values of a weight: nf4 has 16 that suit normally distributed ones, fp4 those of a float; "
        "int8 has 255 and rounds the layers' inputs to as many.",
    )
    double_quant: bool = Field(
        default=True, description="Hold the scales in 8 bits too: 4.13 bits a weight instead of 4.5, hardly less exact."
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of the products. auto: bfloat16 where the device has it in hardware, else float32.",
    )
    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        default="uint8",
        description="Number format in whose guise the same packed bytes are held: sharding wants that of the rest.",
    )
    outlier_threshold: float = Field(
        default=6.0,
        ge=0,
        description="Inputs of int8 layers that are as large as this are not rounded, with all of their column. "
        "0: every input is.",
    )
    skip_modules: str | list[str] | None = Field(
        default=None,
        description="Modules whose linear layers stay as they are: names such as [layers.0, o_proj] that match a "
        "module path's end, or one regular expression for the whole path.",
    )


class Source(Section):
    """One dataset."""

    path: str = Field(
        min_length=1, description="A data file, a folder, or a hub id; paths count from the current directory."
    )
    name: str | None = Field(default=None, description="Configuration of a hub dataset, where it has several.")
    split: str = Field(default="train", min_length=1, description="Split of the dataset; a single file is all train.")

    _has_a_name = field_validator("path")(checked_path)


def _as_sources(value: object) -> object:
    """Returns the short forms of a list of datasets, a path or one mapping, as the list they stand for."""
    items = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(item, (str, Mapping, Source)) for item in items):
        raise ValueError("expected a path, a mapping with `path`, or a list of these")
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


_Path = Annotated[str, Field(min_length=1)]
Sources = Annotated[
    tuple[Source, ...],
    Field(min_length=1),
    BeforeValidator(
        _as_sources, json_schema_input_type=_Path | Source | Annotated[list[_Path | Source], Field(min_length=1)]
    ),
]


class DataSection(Section):
    """What to learn from, and how it becomes tokens."""

    train: Sources = Field(description="Training data: a path, a hub id, {path, name, split}, or a list of these.")
    eval: Sources | None = Field(
        default=None, description="Evaluation data, in the same forms. Left out: no evaluation."
    )
    eval_fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the training data to set aside for evaluation, instead of `eval`.",
    )
    format: Literal[
        "auto",
        "text",
        "prompt-completion",
        "messages",
        "instruction",
        "classification",
        "token-classification",
        "image",
    ] = Field(default="auto", description="What the columns mean. auto: told from their names and model.task.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Columns to rename, as wanted name: name in the file, such as prompt: question.",
    )
    max_length: int = Field(default=1024, gt=1, description="Longest example, in tokens; memory grows with it.")
    overlong: Literal["truncate", "drop", "error"] = Field(
        default="truncate", description="What happens to longer examples: cut at max_length, left out, or refused."
    )
    train_on: Literal["assistant", "all"] = Field(
        default="assistant", description="Tokens that count in the loss: the answers only, or the prompts too."
    )
    cache: Literal["auto"] | bool = Field(
        default="auto",
        description="Keep the encoded data for later runs, in ~/.cache/peftcli/data, which may be deleted at any time. "
        "auto: from 4 MB of data on.",
    )
    padding_free: Literal["auto"] | bool = Field(
        default="auto",
        description="Join a batch's examples instead of padding them. auto: where the attention code allows it.",
    )
    packing: bool = Field(
        default=False,
        description="Fill packs of max_length tokens with whole examples, which do not see each other. Batch sizes and "
        "steps then count packs.",
    )


OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lion_8bit", "adafactor", "sgd"]


DEFAULT_BATCH_SIZE = 8


class TrainingSection(Section):
    """How to train."""

    num_train_epochs: float = Field(default=3.0, gt=0, description="Passes over the training data. Not with max_steps.")
    max_steps: int | None = Field(
        default=None, gt=0, description="Optimizer steps to train for, instead of num_train_epochs."
    )
    per_device_train_batch_size: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        default=DEFAULT_BATCH_SIZE,
        description="Examples per device in one forward pass. auto: of the 8 x gradient_accumulation_steps examples of "
        "a step as many as fit into memory; the rest follows in further passes, so what is learned is the same.",
    )
    per_device_eval_batch_size: int = Field(default=8, gt=0, description="Examples per device in one evaluation pass.")
    gradient_accumulation_steps: int = Field(
        default=1, gt=0, description="Passes per optimizer step: multiplies the batch without its memory."
    )
    group_by_length: bool = Field(
        default=False,
        description="Batches of examples of about the same length: less padding, but a step sees only such.",
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak learning rate. Left out: the method's own default."
    )
    head_learning_rate: float | None = Field(
        default=None, gt=0, description="Learning rate of a newly made task head. Left out: the method's own default."
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="How the learning rate falls after warm-up: to 0 along a cosine or a line, or not at all.",
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, lt=1, description="Share of all steps in which the learning rate rises from 0."
    )
    warmup_steps: int | None = Field(default=None, ge=0, description="Steps of warm-up, instead of warmup_ratio.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled decay, times the learning rate. 0: adapters are small and start near 0.",
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean of gradients in AdamW and Lion.")
    adam_beta2: float = Field(
        default=0.999,
        ge=0,
        lt=1,
        description="Decay of AdamW's mean of squared gradients. With lion_8bit: of the mean it keeps; left out: 0.99.",
    )
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Added to AdamW's denominator.")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Gradients with a larger norm are scaled down to it. null: never."
    )
    optim: OptimizerName = Field(
        default="adamw",
        description="The optimizer. 8bit: moments of tensors of 4,096 numbers and more take a byte each. paged: a full "
        "GPU moves moments to the host. lion_8bit wants 3 to 10 times less learning rate than AdamW, and as much more "
        "weight decay. adafactor keeps moments by row and column, and no mean of gradients; it takes the learning rate "
        "as it is, where its paper makes it relative to the weights.",
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        default="auto",
        description="Number format of the computation. auto: bf16 where the device has it in hardware, else no.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: much less memory, about a third more time.",
    )
    activation_offloading: bool = Field(
        default=False,
        description="Keep large activations in the host's memory until the backward pass; for GPUs.",
    )
    torch_compile: bool = Field(
        default=False,
        description="Compile the model's layers in the first steps, which takes a minute and needs a C++ compiler.",
    )
    use_liger_kernel: bool = Field(
        default=False,
        description="Compute norms, rotations and activations of the base with the kernels of the package "
        "liger-kernel; for GPUs.",
    )
    logging_steps: int = Field(default=10, gt=0, description="Steps between two lines of metrics.")
    eval_steps: int | None = Field(
        default=None,
        gt=0,
        description="Steps between evaluations. Left out: at the end of each epoch, if there is eval data.",
    )
    save_steps: int | None = Field(
        default=None, gt=0, description="Steps between checkpoints. Left out: at the end of each epoch."
    )
    save_total_limit: int | None = Field(default=3, ge=1, description="Checkpoints to keep, the newest. null: all.")
    load_best_at_end: bool = Field(
        default=False, description="Keep the adapter with the lowest evaluation loss instead of the last one."
    )
    early_stopping_patience: int | None = Field(
        default=None, gt=0, description="Stop after this many evaluations without a lower loss. Left out: never."
    )
    seed: int = Field(
        default=42, ge=0, lt=2**32, description="Seed of everything random: adapter, data order, dropout."
    )

    @property
    def micro_batch_size(self) -> int:
        """Examples per device in one forward pass; the most that it can be while that is still `auto`."""
        size = self.per_device_train_batch_size
        return DEFAULT_BATCH_SIZE if size == "auto" else size

    def cut_into(self, size: int) -> TrainingSection:
        """Returns the same with a step's examples passed `size` at a time, which must divide them."""
        rounds, rest = divmod(self.micro_batch_size * self.gradient_accumulation_steps, size)
        assert not rest
        return self.model_copy(update={"per_device_train_batch_size": size, "gradient_accumulation_steps": rounds})

    @model_validator(mode="before")
    @classmethod
    def _lions_own_beta2(cls, values: Any) -> Any:
        """Returns the values, with Lion's own default (arXiv 2302.06675) where they leave `adam_beta2` out."""
        if isinstance(values, Mapping) and values.get("optim") == "lion_8bit":
            return {"adam_beta2": 0.99, **values}
        return values


class DistributedSection(Section):
    """How a run is spread over devices. Every choice trains the same adapter."""

    strategy: Literal["auto", "ddp", "fsdp2", "deepspeed"] = Field(
        default="auto",
        description="ddp: each process holds the whole base. fsdp2: each holds a share of it, layer by layer. "
        "deepspeed: so too, with ZeRO-3 as deepspeed_config says. auto: ddp where there are several processes.",
    )
    num_processes: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        default="auto", description="Processes on each machine, one a device. auto: one for each GPU, one on a CPU."
    )
    timeout: int = Field(
        default=600, gt=0, description="Seconds that a process may keep the others waiting before the run is ended."
    )
    deepspeed_config: str | None = Field(
        default=None,
        min_length=1,
        description="DeepSpeed's own JSON file, for strategy deepspeed. What the recipe says too is "
        "auto there, left out, or the same; the rest is passed on unchanged.",
    )

    _has_a_name = field_validator("deepspeed_config")(checked_path)


class GenerateSection(Section):
    """How text is generated in an evaluation."""

    max_new_tokens: int = Field(default=64, gt=0, description="Longest text to generate, in tokens.")
    do_sample: bool = Field(
        default=False, description="Draw tokens at random. false: always the likeliest, so repeatable."
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Below 1 the likely tokens become likelier. Needs do_sample."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Draw from the likeliest tokens that hold this probability. Needs do_sample.",
    )


class EvaluationSection(Section):
    """How to evaluate."""

    generate: GenerateSection = Field(default_factory=GenerateSection, description="How text is generated.")


def _as_names(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Reporters = Annotated[
    tuple[Literal["tensorboard"], ...],
    BeforeValidator(_as_names, json_schema_input_type=Literal["tensorboard"] | list[Literal["tensorboard"]]),
]


class LoggingSection(Section):
    """Where metrics go besides the run's own metrics.jsonl."""

    report_to: Reporters = Field(default=(), description="Other places for the metrics: tensorboard.")


class Recipe(Section):
    """A fine-tuning recipe: a base model, data, a method, and how to train."""

    model: ModelSection = Field(description="The base model.")
    quantization: QuantizationSection | None = Field(
        default=None, description="Hold the base in 4 or 8 bits, as QLoRA does. Left out: in `model.dtype`."
    )
    data: DataSection = Field(description="What to learn from.")
    method: Mapping[str, Any] = Field(description="How to adapt the model: `type`, and that method's own fields.")
    training: TrainingSection = Field(default_factory=TrainingSection, description="How to train.")
    distributed: DistributedSection = Field(
        default_factory=DistributedSection, description="How the run is spread over devices."
    )
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="How to evaluate.")
    logging: LoggingSection = Field(default_factory=LoggingSection, description="Where metrics go.")
    output_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder for all that the run leaves. Left out: runs/<the recipe's file name>.",
    )

    _has_a_name = field_validator("output_dir")(checked_path)
