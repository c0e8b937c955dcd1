"""What can go wrong, said the way a user needs it: what happened, where, and what to do about it.

Every error that a user can cause is a `PeftcliError`. Its class decides the process's exit code, so that scripts
and schedulers can tell a typo from a full disk. Anything else that escapes is a bug and exits 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

EXIT_BUG = 1
EXIT_INTERRUPTED_TWICE = 130


def printable(text: str) -> str:
    """Returns `text` with all that is not plain text, spaces, tabs and line breaks escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode("ascii") for char in text
    )


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        message: What happened, without a trailing full stop. Names the recipe key or file that it concerns.
        where: `file:line`, a file, or a row of one; None where there is no such place.
        hint: What to do about it; None where nothing better can be said than the message.
    """

    message: str
    where: str | None = None
    hint: str | None = None

    def __post_init__(self) -> None:
        """Escapes what a file could garble a terminal with, or no terminal can show: control codes, half characters."""
        for name in ("message", "where", "hint"):
            text = getattr(self, name)
            if text is not None:
                object.__setattr__(self, name, printable(text))

    def __str__(self) -> str:
        """Returns `where: message` and, on a line of its own, `hint: ...`."""
        line = f"{self.where}: {self.message}" if self.where else self.message
        return f"{line}\n  hint: {self.hint}" if self.hint else line


class PeftcliError(Exception):
    """An error that the user can act on, holding one problem or all that were found at once."""

    exit_code: ClassVar[int] = EXIT_BUG

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.problems: tuple[Problem, ...] = (Problem(message, where, hint),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> PeftcliError:
        """Returns one error that reports all `problems` together; there must be at least one."""
        found = tuple(problems)
        assert found, "an error needs a problem"
        error = cls(found[0].message)
        error.problems = found
        error.args = ("\n".join(str(problem) for problem in found),)
        return error


class RecipeError(PeftcliError):
    """Bad usage or a bad recipe."""

    exit_code = 2


class DataError(PeftcliError):
    """Data that cannot be read, has the wrong columns, or leaves nothing to learn."""

    exit_code = 3


class ModelError(PeftcliError):
    """A model, adapter or checkpoint that cannot be used, or a verification that failed."""

    exit_code = 4


class NumericalError(PeftcliError):
    """A loss or gradient that is not finite, or a parameter that gets no gradient."""

    exit_code = 5


class HostError(PeftcliError):
    """The environment: disk, permissions, memory, devices, a missing optional package."""

    exit_code = 6


class PeerLostError(HostError):
    """Another process of the run ended or fell silent; why is for that process, or its launcher, to say."""


class Interrupted(PeftcliError):  # noqa: N818 - not a failure: the run can be resumed
    """The run was asked to stop; a resumable checkpoint is saved."""

    exit_code = 75


def did_you_mean(name: str, known: Sequence[str]) -> str | None:
    """Returns `did you mean "..."?` for the closest of `known`, or None where nothing is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else None
