"""Attributes that are something else for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Replacement = tuple[Any, str, Any]  # owner (module, class), attribute, its value meanwhile


@contextmanager
def replaced(replacements: Iterable[Replacement]) -> Iterator[None]:
    """Gives attributes other values, and theirs back at the end."""
    before: list[Replacement] = []
    try:
        for owner, name, value in replacements:
            before.append((owner, name, vars(owner)[name]))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
