"""Plain values that remember the line they came from, built from a YAML parser's events.

Nothing of PyYAML's constructors runs: only mappings, lists and scalars can come out, whatever a file says. Limits are
checked as the events arrive, so that a file made to exhaust memory or the stack is refused before it is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from peftcli.errors import Problem, RecipeError
from peftcli.recipe.scalars import Scalar, resolve
from peftcli.recipe.values import KeyPath, dotted, printable, show

MAX_NODES = 50_000
MAX_ALIASES = 100
MAX_DEPTH = 50

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Node:
    """A value and the place it came from.

    Attributes:
        value: A scalar, a tuple of nodes (a list in YAML) or a dict of nodes (a mapping).
        where: `file:line` of its key, or of the value itself in a list; or the command-line override that gave it.
    """

    value: Scalar | tuple[Node, ...] | dict[str, Node]
    where: str

    def data(self) -> Any:
        """Returns the value with nothing but dicts, lists and scalars in it."""
        if isinstance(self.value, dict):
            return {key: child.data() for key, child in self.value.items()}
        return [child.data() for child in self.value] if isinstance(self.value, tuple) else self.value

    def locations(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
        """Yields the key path and the place of this node and of everything in it."""
        yield path, self.where
        if isinstance(self.value, dict):
            for key, child in self.value.items():
                yield from child.locations((*path, key))
        elif isinstance(self.value, tuple):
            for index, child in enumerate(self.value):
                yield from child.locations((*path, index))


# Compared by identity: a quoted "<<" is an ordinary key.
_MERGE_KEY = Node("<<", "")
# Stands for what has been reported already, and is left out so that it is not reported again as a wrong value.
_REFUSED = Node(None, "")


@dataclass(slots=True)
class _Frame:
    """A list or mapping under construction. `size` and `height` measure what is in it, with aliases expanded."""

    where: str
    anchor: str | None
    entries: dict[str, Node] | None = None  # None for a list
    items: list[Node] = field(default_factory=list)
    merged: list[dict[str, Node]] = field(default_factory=list)
    key: Node | None = None  # waits for its value
    size: int = 1
    height: int = 1

    def node(self) -> Node:
        if self.entries is None:
            return Node(tuple(self.items), self.where)
        for source in self.merged:
            self.entries = {**source, **self.entries}
        return Node(self.entries, self.where)


class Builder:
    """Builds one document's node from its events, with a stack of its own instead of recursion.

    Attributes:
        root: The document's value; None before there is one.
        problems: What was wrong but did not stop the building.
    """

    def __init__(self, place: Callable[[int], str]) -> None:
        self.root: Node | None = None
        self.problems: list[Problem] = []
        self._place = place
        self._stack: list[_Frame] = []
        self._anchors: dict[str, tuple[Node, int, int]] = {}
        self._nodes = 0
        self._aliases = 0

    def feed(self, event: Any) -> None:
        """Takes the parser's next event.

        Raises:
            RecipeError: The document is beyond a limit, names an unknown anchor, or is a second one.
        """
        where = self._place(event.start_mark.line)
        if isinstance(event, yaml.AliasEvent):
            self._alias(event.anchor, where)
        elif isinstance(event, yaml.ScalarEvent):
            self._scalar(event, where)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._refuse_tag(event.tag, where)
            self._count(1, 1, where)
            entries: dict[str, Node] | None = {} if isinstance(event, yaml.MappingStartEvent) else None
            self._stack.append(_Frame(where, event.anchor, entries))
        elif isinstance(event, yaml.CollectionEndEvent):
            frame = self._stack.pop()
            self._put(frame.node(), frame.anchor, frame.size, frame.height)
        elif isinstance(event, yaml.DocumentStartEvent) and self.root is not None:
            raise RecipeError("a second document starts here", where=where, hint="a recipe is one YAML document")

    def _scalar(self, event: Any, where: str) -> None:
        self._refuse_tag(event.tag, where)
        self._count(1, 1, where)
        plain, text = event.implicit[0], event.value
        frame = self._stack[-1] if self._stack else None
        if plain and text == "<<" and frame and frame.entries is not None and frame.key is None:
            self._put(_MERGE_KEY, None, 1, 1)
            return
        self._put(self._resolved(text, plain, where), event.anchor, 1, 1)

    def _resolved(self, text: str, plain: bool, where: str) -> Node:
        if _SURROGATE.search(text):
            self._problem("holds half of a character, which is not valid text", where)
            return _REFUSED
        try:
            return Node(resolve(text) if plain else text, where)
        except ValueError as error:
            self._problem(str(error), where, "put it in quotes if it is meant as text")
            return _REFUSED

    def _alias(self, anchor: str | None, where: str) -> None:
        name = printable(anchor or "")
        if anchor is None or anchor not in self._anchors:
            hint = f"mark the value to repeat with &{name}, before it is used; to write a star, put the text in quotes"
            raise RecipeError(f"*{name} repeats a value that is not marked", where=where, hint=hint)
        node, size, height = self._anchors[anchor]
        self._aliases += 1
        if self._aliases > MAX_ALIASES:
            raise RecipeError(f"more than {MAX_ALIASES} aliases (*name)", where=where)
        self._count(size, height, where)
        self._put(node, None, size, height)

    def _count(self, size: int, height: int, where: str) -> None:
        """Adds a value to the document's totals, aliases counted as what they stand for."""
        self._nodes += size
        if self._nodes > MAX_NODES:
            raise RecipeError(f"more than {MAX_NODES:,} values", where=where, hint="data belongs in a file of its own")
        if len(self._stack) + height > MAX_DEPTH:
            raise RecipeError(f"values nested more than {MAX_DEPTH} deep", where=where)

    def _put(self, node: Node, anchor: str | None, size: int, height: int) -> None:
        """Hands a finished value to the collection it is in."""
        if anchor is not None:
            self._anchors[anchor] = (node, size, height)
        if not self._stack:
            self.root = node if node is not _REFUSED else None
            return
        frame = self._stack[-1]
        frame.size += size
        frame.height = max(frame.height, height + 1)
        if frame.entries is None:
            frame.items += [] if node is _REFUSED else [node]
        elif frame.key is None:
            frame.key = node
        else:
            self._entry(frame, frame.entries, frame.key, node)
            frame.key = None

    def _entry(self, frame: _Frame, entries: dict[str, Node], key: Node, node: Node) -> None:
        if key is _REFUSED or node is _REFUSED:
            return
        if key is _MERGE_KEY:
            self._merge(frame, node)
        elif not isinstance(key.value, str):
            hint = (
                "put it in quotes" if not isinstance(key.value, (dict, tuple)) else "put a value with braces in quotes"
            )
            self._problem(f"a key must be text, got {show(key.data())}", key.where, hint)
        elif key.value in entries:
            first = entries[key.value].where
            self._problem("is given twice", key.where, f"first given at {first}; keep one of them")
        else:
            entries[key.value] = replace(node, where=key.where)

    def _merge(self, frame: _Frame, node: Node) -> None:
        sources = node.value if isinstance(node.value, tuple) else (node,)
        for source in sources:
            if isinstance(source.value, dict):
                frame.merged.append(source.value)
            else:
                self._problem("<< merges mappings, and this is not one", node.where)

    def _refuse_tag(self, tag: str | None, where: str) -> None:
        if tag is not None:
            hint = "a recipe is plain data; text that begins with ! goes in quotes"
            self._problem(f"the tag {printable(tag)} is not allowed", where, hint)

    def _problem(self, message: str, where: str, hint: str | None = None) -> None:
        waiting = (frame.key.value for frame in self._stack if frame.key and frame.key is not _MERGE_KEY)
        keys = tuple(key for key in waiting if isinstance(key, str))
        self.problems.append(Problem(f"{dotted(keys)}: {message}" if keys else message, where, hint))
