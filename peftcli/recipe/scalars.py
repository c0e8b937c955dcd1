"""What a plain (unquoted) YAML scalar means, by the YAML 1.2 core schema.

PyYAML's own rules are those of YAML 1.1, where `1e-4` is text, `no` is a boolean, `12:30` is a number and `2026-01-01`
is a date. Each of these has cost somebody a training run.
"""

from __future__ import annotations

import math
import re

Scalar = str | int | float | bool | None

_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_DECIMAL = re.compile(r"[-+]?[0-9]+\Z")
_PREFIXED = re.compile(r"0o([0-7]+)\Z|0x([0-9a-fA-F]+)\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")

_MAX_DIGITS = 400  # a float holds no more; also keeps int() below its own limit, beyond which it raises
_INT64 = 2**63


def resolve(text: str) -> Scalar:
    """Returns the value of a plain scalar: null, a boolean, a number, or else the text itself.

    Raises:
        ValueError: The text is a number that no setting can hold: not finite, or beyond 64 bits.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _NOT_FINITE.match(text):
        raise ValueError(f"{text} is not a finite number")
    if not (_FLOAT.match(text) or _PREFIXED.match(text)):
        return text
    number = _number(text) if len(text) <= _MAX_DIGITS else math.inf
    too_large = abs(number) >= _INT64 if isinstance(number, int) else math.isinf(number)
    if too_large:
        raise ValueError(f"{text[:20]}{'...' if len(text) > 20 else ''} is too large for a number")
    return number


def _number(text: str) -> int | float:
    if prefixed := _PREFIXED.match(text):
        octal, hexadecimal = prefixed.groups()
        return int(octal, 8) if octal else int(hexadecimal, 16)
    return int(text) if _DECIMAL.match(text) else float(text)
