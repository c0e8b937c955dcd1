"""What to say to somebody who wrote a key that peftcli does not have: most often another tool's name for one it has.

Nothing here is accepted in place of the real key. A recipe that means something is never read as something else.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from peftcli.errors import did_you_mean
from peftcli.recipe.fields import all_fields, fields_at
from peftcli.recipe.names import OTHER_NAMES, OTHER_VALUES, REMARKS, UNAVAILABLE
from peftcli.recipe.values import KeyPath, dotted

_MAX_LENGTH = 60  # longer is not a name that anyone meant, and slow to compare


def _inverted(groups: dict[str, str]) -> dict[str, str]:
    return {name: key for key, names in groups.items() for name in names.split()}


_RENAMED = _inverted(OTHER_NAMES)
_MISSING_FEATURES = _inverted(UNAVAILABLE)


def for_unknown_key(path: KeyPath, known: Sequence[str] | None = None) -> str | None:
    """Returns what to do about the key at `path`, which its section does not have; `known` are those that it has.

    In this order: the same key written differently, another tool's name, a key of another section, a typo here, a
    typo elsewhere, and at last the section's own keys.
    """
    section = tuple(part for part in path[:-1] if isinstance(part, str))
    known = fields_at(section) if known is None else known
    key = str(path[-1]).strip().lower().replace("-", "_")
    if len(key) > _MAX_LENGTH:
        return None
    if key in known:
        return f'did you mean "{key}"?'
    return (
        _other_tools_name(key, section, known)
        or _elsewhere(key, section)
        or did_you_mean(key, known)
        or _nearly_elsewhere(key)
        or (f"{dotted(section) or 'a recipe'} takes {', '.join(known)}" if known else None)
    )


def _other_tools_name(key: str, section: tuple[str, ...], known: Sequence[str]) -> str | None:
    if key in _MISSING_FEATURES:
        return _MISSING_FEATURES[key]
    if key not in _RENAMED:
        return None
    remark = f"; {REMARKS[key]}" if key in REMARKS else ""
    home, _, field = _RENAMED[key].rpartition(".")
    if section == ("method",) == (home,) and field not in known:
        return f"peftcli calls this {_RENAMED[key]}, which this method does not have"
    return f"peftcli calls this {_RENAMED[key]}{remark}"


def _elsewhere(key: str, section: tuple[str, ...]) -> str | None:
    """Returns where a right key belongs that is written in the wrong section."""
    homes = [path[:-1] for path in all_fields() if path[-1] == key and path[:-1] != section]
    if not homes:
        return None
    places = " or ".join(dotted(home) or "the top level" for home in homes[:3])
    return f"{key} belongs in {places}" if homes[0] else f"{key} belongs at {places}"


def _nearly_elsewhere(key: str) -> str | None:
    """Returns the key of any section that `key` is close to; closer than within a section, where less can be meant."""
    homes = {path[-1]: path for path in reversed(all_fields())}
    close = difflib.get_close_matches(key, list(homes), n=1, cutoff=0.8)
    return f'did you mean "{dotted(homes[close[0]])}"?' if close else None


def for_wrong_value(path: KeyPath, value: object, choices: Sequence[str]) -> str | None:
    """Returns what to write instead of `value` at `path`, which takes one of `choices`."""
    field = next((part for part in reversed(path) if isinstance(part, str)), "")
    written = str("null" if value is None else value).strip().lower()
    if len(written) > _MAX_LENGTH:
        return None
    other = OTHER_VALUES.get(field, {}).get(written)
    if other is not None:
        return f"write {other}" if other in choices else other
    return f'did you mean "{written}"?' if written in choices else did_you_mean(written, choices)
