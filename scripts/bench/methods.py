"""What an adapter's own arithmetic costs: a training step by the floor, by peftcli and by PEFT.

The floor of adapter training is the frozen model's own forward pass, and the backward pass through its activations:
no adapter can do without either. The model is a Llama of 8 layers (hidden 512, feed-forward 1408, vocabulary 8192)
in float32 that starts at random, a batch is 2 × 256 tokens, and all seven linear layers of each layer are adapted with
rank 16 (VeRA: queries and values, rank 256). A step is forward, backward and a fused AdamW's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from scripts.bench import timing
from scripts.bench.table import Cell, Options, Table

if TYPE_CHECKING:
    import torch

FLOOR = "floor"
ALL_LINEAR = r".*_proj"
LORA = {"r": 16, "alpha": 32}
OURS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora": ("lora", LORA),
    "lora, dropout 0.05": ("lora", {**LORA, "dropout": 0.05}),
    "dora": ("dora", LORA),
    "dora, dropout 0.05": ("dora", {**LORA, "dropout": 0.05}),
    "vera": ("vera", {"r": 256}),
    "hydralora, 3 heads": ("hydralora", {**LORA, "num_heads": 3}),
}
"""The rows: a method of ours and its fields."""
WITHOUT_PEFT = ("hydralora, 3 heads",)
"""The rows that PEFT has no method for."""


def run(options: Options) -> list[Table]:
    """Returns each method's time of a step by the floor's in the same round."""
    import torch

    torch.set_num_threads(options.threads)
    rounds, shape = (1, (1, 8)) if options.smoke else (5 * options.rounds, (2, 256))
    ids = torch.randint(8192, shape, generator=torch.Generator().manual_seed(0))
    model = with_inputs_that_need_a_gradient(llama(small=options.smoke))
    rows: dict[str, dict[str, Cell]] = {}
    for name in OURS:  # a few at a time: a contestant is a model of its own
        targets = targets_of(name)
        contestants = {FLOOR: frozen, "peftcli": ours(name, targets)}
        if name not in WITHOUT_PEFT:
            contestants["PEFT"] = peft(name, targets)
        steps = {one: step(make(copy.deepcopy(model)), ids) for one, make in contestants.items()}
        timing.log(f"{name}: {rounds} rounds")
        seconds = timing.interleaved(steps, rounds, unmeasured=1 if options.smoke else 3)
        found = timing.ratios(seconds, FLOOR)
        rows[name] = {"peftcli ÷ floor": found["peftcli"], "PEFT ÷ floor": found.get("PEFT")}
        if "PEFT" in seconds:
            rows[name]["peftcli ÷ PEFT"] = timing.ratios(seconds, "PEFT")["peftcli"]
    note = f"Medians over {rounds} interleaved rounds of one step by another in the same round."
    return [Table("A training step by the frozen model's own", rows, (note,))]


def targets_of(row: str) -> str:
    """Returns the modules that the row's method adapts."""
    return r".*[qv]_proj" if row == "vera" else ALL_LINEAR


def llama(
    num_layers: int = 8, *, small: bool = False, sizes: Mapping[str, int] = MappingProxyType({})
) -> torch.nn.Module:
    """Returns the model, or one of other `sizes`; a `small` one, of one layer, where it only matters that it is run."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    own: dict[str, Any] = {
        "hidden_size": 256 if small else 512,
        "intermediate_size": 256 if small else 1408,
        "num_hidden_layers": 1 if small else num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 8192,
    }
    model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**own | dict(sizes), use_cache=False))
    return model.float().train()


def with_inputs_that_need_a_gradient(model: Any) -> torch.nn.Module:
    """Returns `model` with embeddings that ask for a gradient, so that the backward pass goes through all of it."""
    model.get_input_embeddings().register_forward_hook(_ask_for_a_gradient)
    return model  # type: ignore[no-any-return]


def _ask_for_a_gradient(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if output.is_leaf else output


def frozen(model: torch.nn.Module) -> torch.nn.Module:
    """Returns `model`, of which nothing trains."""
    return model.requires_grad_(False)


def ours(row: str, targets: str) -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Returns what adapts a model by peftcli as the row says."""
    from peftcli import inject, methods

    name, fields = OURS[row]

    def adapted(model: torch.nn.Module) -> torch.nn.Module:
        method = methods.load(name)
        inject.graft(model, method, method.Config.model_validate({"target_modules": targets, **fields}), seed=0)
        return model

    return adapted


def peft(row: str, targets: str) -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Returns what adapts a model by PEFT as the row says."""
    from peft import LoraConfig, VeraConfig, get_peft_model

    name, fields = OURS[row]
    settings: Any
    if name == "vera":
        settings = VeraConfig(r=fields["r"], target_modules=targets)
    else:
        settings = LoraConfig(
            r=fields["r"],
            lora_alpha=fields["alpha"],
            lora_dropout=fields.get("dropout", 0.0),
            target_modules=targets,
            use_dora=name == "dora",
        )
    return lambda model: get_peft_model(model, settings)


def step(model: Any, ids: torch.Tensor, *, optimizes: bool = True) -> Callable[[], None]:
    """Returns one training step of `model` on `ids`; its passes alone unless it `optimizes`."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained and optimizes else None

    def one() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
        for parameter in trained:
            parameter.grad = None

    return one
