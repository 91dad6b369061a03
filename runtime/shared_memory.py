"""Collectives of ranks on one host through memory that they share (shared_memory.cpp).

The segment is an anonymous file of the first rank, which the others open through /proc: it has no
name to be left behind, and is gone with the last process that maps it, however that ends.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spdcompile.log import Component, get_logger
from spdcompile.runtime.native import CannotBuildError, load_library
from spdcompile.runtime.processes import Identity

_LOG = get_logger(Component.RUNTIME)
_PIECE = 256 * 1024
"""Bytes that go through the segment at a time: pieces of all ranks stay in a processor's cache."""

_asked: dict[str, tuple[dist.ProcessGroup, str]] = {}
"""Group -> it, and why it has no segment. Names come again when a program makes its groups anew."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """Where the first rank's segment is."""

    pid: int
    fd: int
    name: str

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.fd}"


def why_not_shared(group: dist.ProcessGroup, timeout: float) -> str:
    """Opens a segment for a group, if it has none yet; every rank of it calls this.

    Args:
        timeout: seconds after which a rank that waits for another raises.

    Returns: why it cannot have one, the same on all ranks; empty if it has.
    """
    known = _asked.get(group.group_name)
    if known is None or known[0] is not group:
        why = _why_not(group) or _open(group, timeout)
        if why and dist.get_rank(group) == 0:
            _LOG.warning("Ranks exchange through %s: %s", dist.get_backend(group), why)
        known = _asked[group.group_name] = (group, why)
    return known[1]


def steps(group: dist.ProcessGroup) -> int:
    """How many pieces this rank has published; 0 without a segment."""
    return _operators().steps(group.group_name) if _has_segment(group) else 0


def interrupt(groups: Iterable[dist.ProcessGroup]) -> None:
    """Has this rank's waits for others raise, as a broken connection does."""
    with suppress(RuntimeError):  # a group that was destroyed at the end of the program
        for group in groups:
            if _has_segment(group):
                _operators().interrupt(group.group_name)


def _has_segment(group: dist.ProcessGroup) -> bool:
    known, why = _asked.get(group.group_name, (None, ""))
    return known is group and not why


@cache
def _operators() -> Any:
    """The operators of the library, and what their results look like.

    Raises:
        CannotBuildError: there is no library.
    """
    load_library()

    @torch.library.register_fake("spd_shared_memory::all_reduce")
    def _sum(partial: Tensor, group: str) -> Tensor:
        return torch.empty_like(partial, memory_format=torch.contiguous_format)

    @torch.library.register_fake("spd_shared_memory::all_gather")
    def _joined(shard: Tensor, group: str, ranks: int) -> Tensor:
        return shard.new_empty((shard.shape[0] * ranks, *shard.shape[1:]))

    return torch.ops.spd_shared_memory


def _why_not(group: dist.ProcessGroup) -> str:
    """Why the ranks of a group cannot share memory; the same on all of them."""
    own = Identity.own()
    try:
        _operators()
        built = ""
    except CannotBuildError as error:
        built = str(error)
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (own.place, bool(own.born), built), group=group)
    if len({place for place, _, _ in found}) > 1:
        return "they are not on one host"
    if not all(linux for _, linux, _ in found):
        return "shared memory is made for Linux alone"
    return next((f"no library for shared memory: {error}" for *_, error in found if error), "")


def _open(group: dist.ProcessGroup, timeout: float) -> str:
    """Maps the segment; returns what went wrong on any rank."""
    ops, rank, size = _operators(), dist.get_rank(group), dist.get_world_size(group)
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
    everyone: list[str] = [""] * size
    dist.all_gather_object(everyone, wrong, group=group)  # all have opened it, or given up
    if fd >= 0:
        os.close(fd)
    why = next((found for found in everyone if found), "")
    if why:
        ops.close_segment(group.group_name)
    return why
