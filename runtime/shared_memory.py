"""Collectives of ranks on one host through memory that they share (shared_memory.cpp).

The segment is an anonymous file of the first rank, which the others open through /proc: it has no
name to be left behind, and is gone with the last process that maps it, however that ends.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from spdcompile.runtime.direct import Direct, agreed, operators
from spdcompile.runtime.processes import Identity

_NAMESPACE = "spd_shared_memory"
_PIECE = 256 * 1024
"""Bytes that go through the segment at a time: pieces of all ranks stay in a processor's cache."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """Where the first rank's segment is."""

    pid: int
    fd: int
    name: str

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.fd}"


def _open(group: dist.ProcessGroup, timeout: float, not_built: str) -> str:
    own = Identity.own()
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (own.place, bool(own.born), not_built), group=group)
    if len({place for place, _, _ in found}) > 1:
        return "they are not on one host"
    if not all(linux for _, linux, _ in found):
        return "shared memory is made for Linux alone"
    why = next((f"no library for shared memory: {error}" for *_, error in found if error), "")
    return why or _map(group, timeout)


def _map(group: dist.ProcessGroup, timeout: float) -> str:
    """Maps the segment; returns what went wrong on any rank."""
    ops, rank, size = operators(_NAMESPACE), dist.get_rank(group), dist.get_world_size(group)
    wrong, fd = "", -1
    offer: list[_Offer | None] = [None]
    if rank == 0:
        with suppress(OSError):
            name = f"spdcompile-{secrets.token_hex(8)}"
            fd = os.memfd_create(name)
            os.posix_fallocate(fd, 0, ops.segment_bytes(size, _PIECE))
            offer = [_Offer(os.getpid(), fd, name)]
    dist.broadcast_object_list(offer, group=group, group_src=0)
    try:
        if offer[0] is None:
            raise OSError("there is not enough memory to share")
        if rank:
            fd = os.open(offer[0].path, os.O_RDWR | os.O_CLOEXEC)
            if offer[0].name not in os.readlink(f"/proc/self/fd/{fd}"):
                raise OSError("another process has rank 0's number here")
        ops.close_segment(group.group_name)  # of a group of that name that is gone
        ops.open_segment(group.group_name, fd, rank, size, _PIECE, timeout)
    except (OSError, RuntimeError) as error:
        wrong = str(error).splitlines()[0]
    why = agreed(group, wrong)  # all have opened it, or given up
    if fd >= 0:
        os.close(fd)
    if why:
        ops.close_segment(group.group_name)
    return why


SHARED_MEMORY = Direct(_NAMESPACE, "shared memory", _open)
