"""Waits of ranks for each other that take no processor time, and errors that all of them see."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from spdcompile.errors import SpdCompileError
from spdcompile.runtime._torch import default_store


class Meeting:
    """The ranks of a run, through the launcher's store: a waiting rank sleeps in a read.

    A collective would do as well, but a variant that failed in the midst of one may have left the
    process group unusable.

    Args:
        timeout: seconds that a rank waits for the others.
    """

    def __init__(self, timeout: float) -> None:
        self._store = dist.PrefixStore("spdcompile-bench", default_store())
        self._limit = timedelta(seconds=timeout)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._count = 0

    def meet(self) -> None:
        """Returns when all ranks have come here."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, as JSON data; every rank calls this."""
        self._count += 1
        self._store.set(f"{self._count}/{self.rank}", json.dumps(value))
        names = [f"{self._count}/{rank}" for rank in range(self.size)]
        self._store.wait(names, self._limit)
        return [json.loads(self._store.get(name)) for name in names]

    def attempt(self, act: Callable[[], Any], *, alone: bool = False) -> tuple[Any, str]:
        """What `act` returns on this rank, and "" or why it failed on some rank.

        Args:
            alone: rank 0 acts, and the others wait.
        """
        result, reason = None, ""
        if self.rank == 0 or not alone:
            try:
                result = act()
            except Exception as error:  # whatever a peer raises is a row of the table
                reason = _in_words(error)
        reasons = self.gather(reason)
        return result, next(filter(None, reasons), "")


def _in_words(error: Exception) -> str:
    """The first line of an error, and what kind it is unless it was raised for a reader."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return text if isinstance(error, SpdCompileError) else f"{type(error).__name__}: {text}"
