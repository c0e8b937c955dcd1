"""What a model's configuration may not ask for: code from elsewhere, and files that are no safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peftcli import headers
from peftcli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
"""Fields that name code: of transformers itself, or, with a slash, of a repository that would be fetched and run."""
WEIGHTS = "transformers_weights"
"""A field that names the weights' file, and by that how it is read."""


def check_config(config: PretrainedConfig, name: str) -> None:
    """Checks a configuration as it was read.

    `auto_map` needs no check: it names code that is only imported with `trust_remote_code`, which is never set.

    Args:
        config: The configuration.
        name: The model's name, for messages.

    Raises:
        ModelError: It asks for code of another repository, or for weights that are not safetensors beside it.
    """
    for part in _parts(config):
        for field in IMPLEMENTATIONS:
            wanted = getattr(part, field, None)
            if "/" in str(wanted):
                raise ModelError(
                    f"model.name: the configuration of {name} asks for code from elsewhere: "
                    f"{field.removeprefix('_')}: {wanted}",
                    hint="code from a repository is never run; take the field out of config.json",
                )
        weights = getattr(part, WEIGHTS, None)
        if weights is not None:
            try:
                headers.require_plain(str(weights).removesuffix(".index.json"))
            except headers.HeaderError as error:
                raise ModelError(f"model.name: the configuration of {name}: {WEIGHTS}: {error}") from None


def _parts(config: Any) -> Iterator[Any]:
    """Yields a configuration and those in it, such as that of the text part."""
    yield config
    for key in getattr(config, "sub_configs", {}):
        inner = getattr(config, key, None)
        if inner is not None:
            yield from _parts(inner)
