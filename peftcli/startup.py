"""Keeps Python's garbage collector out of the imports.

They make a million objects, and nearly all of them stay. Searched for garbage again and again as they come, and once
more as the process ends, they take a third of what a short command takes in all.
"""

from __future__ import annotations

import gc


def begin() -> None:
    """Puts the collector off until `done`: for the command line alone, whose process is its own."""
    gc.disable()
    gc.freeze()


def done() -> None:
    """Has the collector go on, with what is new: what stands by now it never looks at again.

    Where `begin` has not been called, or `done` has, nothing changes.
    """
    if gc.get_freeze_count() and not gc.isenabled():
        gc.freeze()
        gc.enable()
