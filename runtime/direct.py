"""Collectives that ranks run themselves, by operators of this package instead of their group's.

What its two kinds have in common, shared_memory.py and sockets.py: the operators all_reduce,
all_gather, steps and interrupt, and something that a group opens once before it uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spdcompile.runtime.native import CannotBuildError, load_library


class Direct:
    """One kind.

    Args:
        namespace: of its operators.
        name: what carries the tensors, for readers.
        open_group: opens it for a group. Every rank calls it with the group, the seconds after
            which a rank that waits for another raises, and why it has no operators ("" if it
            has). Returns why it cannot be had, the same on all ranks; "" if it is open.
    """

    def __init__(
        self, namespace: str, name: str, open_group: Callable[[dist.ProcessGroup, float, str], str]
    ) -> None:
        self.namespace, self.name = namespace, name
        self._open = open_group
        # Names come again when a program makes its groups anew.
        self._asked: dict[str, tuple[dist.ProcessGroup, str]] = {}

    def why_not(self, group: dist.ProcessGroup, timeout: float) -> str:
        """Opens it for a group, if it is not open yet; every rank of the group calls this.

        Args:
            timeout: seconds after which a rank that waits for another raises.

        Returns: why the group cannot have it, the same on all ranks; "" if it has.
        """
        known = self._asked.get(group.group_name)
        if known is None or known[0] is not group:
            why = self._open(group, timeout, self._not_built())
            known = self._asked[group.group_name] = (group, why)
        return known[1]

    def steps(self, group: dist.ProcessGroup) -> int:
        """How many exchanges this rank has begun; 0 for a group that does not use it."""
        return self._operators().steps(group.group_name) if self._is_open(group) else 0

    def interrupt(self, group: dist.ProcessGroup) -> None:
        """Has this rank's waits for others raise, as a broken connection does."""
        if self._is_open(group):
            self._operators().interrupt(group.group_name)

    def _is_open(self, group: dist.ProcessGroup) -> bool:
        known, why = self._asked.get(group.group_name, (None, ""))
        return known is group and not why

    def _operators(self) -> Any:
        return operators(self.namespace)

    def _not_built(self) -> str:
        try:
            self._operators()
        except CannotBuildError as error:
            return str(error)
        return ""


@cache
def operators(namespace: str) -> Any:
    """The operators of a kind, and what their results look like.

    Raises:
        CannotBuildError: there is no library.
    """
    load_library()

    @torch.library.register_fake(f"{namespace}::all_reduce")
    def _sum(partial: Tensor, group: str) -> Tensor:
        return torch.empty_like(partial, memory_format=torch.contiguous_format)

    @torch.library.register_fake(f"{namespace}::all_gather")
    def _joined(shard: Tensor, group: str, ranks: int) -> Tensor:
        return shard.new_empty((shard.shape[0] * ranks, *shard.shape[1:]))

    return getattr(torch.ops, namespace)


def agreed(group: dist.ProcessGroup, own: str) -> str:
    """What any rank has to say, the same on all; "" if none has."""
    everyone = [""] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    return next((found for found in everyone if found), "")
