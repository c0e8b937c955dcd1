"""Keeps secrets out of what is printed: those of the environment, and those that addresses carry."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
SHORTEST = 6
"""Characters below which a variable's value is no secret, and would be found in all kinds of words."""
_NAMES = re.compile(r"(TOKEN|API_?KEY|ACCESS_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_PATTERNS = (
    re.compile(r"(?<=://)[^\s/@]+(?=@)"),  # user and password before a host
    re.compile(r"(?<=[?&])(?:[\w-]*(?:token|key|secret|password|signature|sig))=[^\s&#\"']+", re.IGNORECASE),
    re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),
)


def redacted(text: str) -> str:
    """Returns `text` with `***` in place of each secret.

    Secret are the values of environment variables that are named so (`HF_TOKEN`, `WANDB_API_KEY`, …), what stands for
    a user in an address, the parameters of one that sign it, and what looks like a token of the Hugging Face Hub.
    """
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and _NAMES.search(name):
            text = text.replace(value, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(_hide, text)
    return text


def _hide(match: re.Match[str]) -> str:
    name, equals, _ = match.group().partition("=")
    return f"{name}={HIDDEN}" if equals else HIDDEN
