"""From files and command-line overrides to one tree of values, each of which still knows where it came from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peftcli.errors import Problem, RecipeError
from peftcli.recipe.document import parse, parse_file, read_bytes
from peftcli.recipe.fields import EXTENDS, accepts_text, is_section
from peftcli.recipe.missing import unreadable
from peftcli.recipe.nodes import MAX_DEPTH, Node
from peftcli.recipe.paths import expand_home
from peftcli.recipe.rules import EXCLUSIVE
from peftcli.recipe.scalars import resolve
from peftcli.recipe.shorthands import SHORTHANDS
from peftcli.recipe.values import KeyPath, dotted, printable, show

MAX_REFERENCES = 50  # from one file to another by `extends`, in all

Chain = tuple[tuple[Path, str], ...]
"""Files that extend each other, the first one first: each as its resolved path and its name in messages."""


class Reader:
    """Reads a recipe file and all that it extends.

    Attributes:
        problems: What was wrong with the files that did not stop the reading.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._read: dict[Path, Node] = {}  # a base that two files share is read once
        self._references = 0

    def read(self, path: Path, name: str, chain: Chain = (), where: str | None = None) -> Node:
        """Returns the file's mapping, merged over those of the files that it extends.

        Args:
            path: The file.
            name: What to call it in messages.
            chain: The files that led here, each extending the next.
            where: The place of the `extends` that named it.

        Raises:
            RecipeError: A file cannot be read, or the files extend each other in a circle.
        """
        try:
            key, raw = path.resolve(), read_bytes(path)
        except (OSError, ValueError, RuntimeError) as error:  # a null byte in it, a circle of symbolic links
            raise unreadable(path, name, error, where) from error
        if any(key == seen for seen, _ in chain):
            circle = " -> ".join([*(label for _, label in chain), name])
            raise RecipeError(f"extends: the files extend each other in a circle: {circle}", where=where)
        if key not in self._read:
            own, problems = parse_file(raw, name)
            self.problems += problems
            self._read[key] = self._with_bases(own, path, name, (*chain, (key, name)))
        return self._read[key]

    def _with_bases(self, own: Node, path: Path, name: str, chain: Chain) -> Node:
        assert isinstance(own.value, dict)
        extends = own.value.get(EXTENDS, Node(None, own.where))
        rest = Node({key: child for key, child in own.value.items() if key != EXTENDS}, own.where)
        result = Node({}, own.where)
        for base, where in self._bases(extends):
            self._references += 1
            if self._references > MAX_REFERENCES:
                raise RecipeError(f"extends: more than {MAX_REFERENCES} files", where=where)
            file = expand_home(base)
            label = os.path.normpath(Path(name).parent / file)
            result = extended(result, self.read(path.parent / file, label, chain, where))
        return extended(result, _with_empty_sections(rest))

    def _bases(self, extends: Node) -> list[tuple[str, str]]:
        """Returns the files that an `extends` names, each with the place that names it."""
        nodes = extends.value if isinstance(extends.value, tuple) else (extends,) if extends.value is not None else ()
        wrong = [node for node in nodes if not (isinstance(node.value, str) and node.value)]
        self.problems += [
            Problem(f"extends: expected a path or a list of paths, got {show(node.data())}", node.where)
            for node in wrong
        ]
        return [(node.value, node.where) for node in nodes if isinstance(node.value, str) and node.value]


def overridden(root: Node, overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
    """Returns the tree with `key.path=value` overrides applied in order, and what was wrong with them."""
    problems: list[Problem] = []
    layer = Node({}, root.where)
    for text in overrides:
        try:
            layer = merged(layer, _override(text, root))
        except RecipeError as error:
            problems += error.problems
    return merged(_making_way(root, layer), layer), problems


def spelled_out(root: Node) -> tuple[Node, list[Problem]]:
    """Returns the tree with what a shorthand in `method.type` stands for, and where `quantization` says otherwise."""
    named, given = _at(root, ("method", "type")), _at(root, ("quantization",))
    short = SHORTHANDS.get(named.value) if named and isinstance(named.value, str) else None
    if named is None or short is None:
        return root, []
    meant = {key: Node(value, named.where) for key, value in short.quantization.items()}
    problems = []
    for key, node in meant.items():
        written = given if given is None or given.value is None else _at(given, (key,))
        if written is not None and written.value != node.value:
            path = "quantization" if written is given else f"quantization.{key}"
            message = f"{path}: {show(written.data())} does not go with method.type: {named.value} at {named.where}"
            hint = f"remove the one, or write method.type: {short.method} for the other"
            problems.append(Problem(message, written.where, hint))
    layer: dict[str, Node] = {"method": Node({"type": Node(short.method, named.where)}, _where(root, "method"))}
    if given is None or isinstance(given.value, dict):
        layer["quantization"] = Node(meant, _where(root, "quantization") if given else named.where)
    return merged(root, Node(layer, root.where)), problems


def _where(root: Node, section: str) -> str:
    node = _at(root, (section,))
    return node.where if node else root.where


def merged(below: Node, above: Node) -> Node:
    """Returns `above` over `below`: mappings key by key, everything else as `above` has it."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    entries = dict(below.value)
    for key, child in above.value.items():
        entries[key] = merged(entries[key], child) if key in entries else child
    return Node(entries, above.where)


def extended(base: Node, own: Node) -> Node:
    """Returns a recipe's `own` mapping over that of its `base`; another method leaves nothing of the base's method."""
    before, after = (_at(node, ("method", "type")) for node in (base, own))
    if before and after and before.value != after.value:
        base = _without(base, ("method",))
    return merged(_making_way(base, own), own)


def _making_way(below: Node, above: Node) -> Node:
    """Returns `below` without the settings that one in `above` excludes: the later choice is the one that is meant."""
    for pair in EXCLUSIVE:
        for chosen, other in (pair, pair[::-1]):
            node = _at(above, chosen)
            if node is not None and node.value is not None:
                below = _without(below, other)
    return below


def _at(node: Node, path: KeyPath) -> Node | None:
    found: Node | None = node
    for part in path:
        found = found.value.get(str(part)) if found and isinstance(found.value, dict) else None
    return found


def _without(node: Node, path: KeyPath) -> Node:
    if not isinstance(node.value, dict) or path[0] not in node.value:
        return node
    key = str(path[0])
    entries = {name: child for name, child in node.value.items() if name != key}
    if len(path) > 1:
        entries = {**node.value, key: _without(node.value[key], path[1:])}
    return replace(node, value=entries)


def _with_empty_sections(node: Node, path: KeyPath = ()) -> Node:
    """Returns the tree with `{}` for a section whose every line is commented out, which YAML reads as null."""
    if node.value is None and path and is_section(path):
        return replace(node, value={})
    if not isinstance(node.value, dict) or not (is_section(path) or not path):
        return node
    return replace(node, value={key: _with_empty_sections(child, (*path, key)) for key, child in node.value.items()})


def _override(text: str, root: Node) -> Node:
    """Returns the tree that has only what an override sets; the sections around it stay where `root` has them.

    Raises:
        RecipeError: It is not `key.path=value`, or the value is not a value.
    """
    where = f"command line: {printable(text)}"
    key, equals, value = text.partition("=")
    path = tuple(key.strip().removeprefix("--").split("."))
    if not equals or not all(path) or len(path) > MAX_DEPTH:
        hint = "write key.path=value, as in training.learning_rate=1e-4"
        raise RecipeError("this is not a setting", where=where, hint=hint)
    if path[0] == EXTENDS:
        raise RecipeError("extends: only a recipe file can extend another", where=where)
    node = _parsed(value.strip(), path, where)
    for end in range(len(path) - 1, -1, -1):
        section = _at(root, path[:end])
        node = Node({path[end]: node}, section.where if section and isinstance(section.value, dict) else where)
    return node


def _parsed(text: str, path: KeyPath, where: str) -> Node:
    """Returns the value of an override: a list, mapping or quoted text in YAML's flow style, or else a plain scalar."""
    if text[:1] in ("[", "{", '"', "'"):
        root, problems = parse(text, lambda line: where)
        if problems or root is None:
            raise RecipeError.of(problems or [Problem(f"{dotted(path)}: no value", where)])
        return root
    try:
        value = resolve(text)
    except ValueError as error:
        raise RecipeError(f"{dotted(path)}: {error}", where=where) from error
    # What is meant as text needs no second pair of quotes inside the shell's.
    return Node(text if value is not None and accepts_text(path) else value, where)
