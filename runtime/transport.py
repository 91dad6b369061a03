"""What carries tensors between ranks: memory they share, sockets, or their process group."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from spdcompile.errors import UsageError
from spdcompile.log import Component, get_logger
from spdcompile.runtime.collectives import (
    Collectives,
    OfDirect,
    OfGatheredParts,
    OfProcessGroup,
)
from spdcompile.runtime.faults import PATIENCE_S
from spdcompile.runtime.shared_memory import SHARED_MEMORY
from spdcompile.runtime.sockets import SOCKETS

_LOG = get_logger(Component.RUNTIME)
_ELEMENTS = 2048  # of float32, about a token's hidden state
_ROUNDS = 15


class Transport(enum.Enum):
    """What carries tensors between ranks."""

    AUTO = "auto"
    """On CPU shared memory for ranks of one host, sockets for others; else the process group."""
    PROCESS_GROUP = "process-group"
    """The backend of the group: gloo, NCCL."""
    SHARED_MEMORY = "shared-memory"
    """Memory that the ranks share; refused where they cannot."""
    SOCKETS = "sockets"
    """A connection between any two ranks; refused where there is none."""


_KINDS = {Transport.SHARED_MEMORY: SHARED_MEMORY, Transport.SOCKETS: SOCKETS}
_NEEDED = {
    Transport.SHARED_MEMORY: "ranks on one host, tensors on CPU, and a C++ compiler",
    Transport.SOCKETS: "ranks that can connect to each other, tensors on CPU, a C++ compiler",
}


def collectives_of(
    group: dist.ProcessGroup, device: torch.device, transport: Transport
) -> Collectives:
    """How ranks exchange tensors; every rank of the group calls this, and all decide alike.

    Raises:
        UsageError: what is asked for cannot be had.
    """
    name, size, backend = group.group_name, dist.get_world_size(group), dist.get_backend(group)
    missing = []
    for kind, direct in _KINDS.items():
        if transport not in (Transport.AUTO, kind):
            continue
        on_cpu = device.type == "cpu"
        why = direct.why_not(group, PATIENCE_S) if on_cpu else f"tensors are on {device.type}"
        if not why:
            return OfDirect(direct.namespace, direct.name, name, size)
        if transport is kind:
            raise UsageError(
                f"The ranks cannot use {direct.name}.",
                where="transport",
                found=why,
                needed=_NEEDED[kind],
                fix="leave it to transport='auto'",
            )
        missing += [f"no {direct.name}: {why}"] if on_cpu else []
    if missing and dist.get_rank(group) == 0:
        _notice(f"Ranks exchange through {backend}; {'; '.join(missing)}")
    if backend == "gloo" and size == 2 and _gathering_is_faster(group):
        return OfGatheredParts(name, size, backend)
    return OfProcessGroup(name, size, backend)


def steps(group: dist.ProcessGroup) -> int:
    """How many exchanges this rank has begun that torch does not count."""
    return sum(direct.steps(group) for direct in _KINDS.values())


def interrupt(groups: Iterable[dist.ProcessGroup]) -> None:
    """Has this rank's waits for others raise, where it can be done."""
    for group, direct in product(groups, _KINDS.values()):
        with suppress(RuntimeError):  # a group that was destroyed at the end of the program
            direct.interrupt(group)


@cache
def _notice(text: str) -> None:
    """Says something once."""
    _LOG.warning(text)


def _gathering_is_faster(group: dist.ProcessGroup) -> bool:
    """Whether two ranks had better gather both parts and add them; the first one's watch decides.

    gloo's all-reduce takes four delays of the link, its all-gather two, and both send each rank's
    tensor once; where the link has no delay they take about as long.
    """
    ops, part, name = torch.ops._c10d_functional, torch.ones(_ELEMENTS), group.group_name
    ways: tuple[Callable[[], Tensor], ...] = (
        lambda: ops.all_reduce(part, "sum", name),
        lambda: ops.all_gather_into_tensor(part, 2, name),
    )
    least = [float("inf"), float("inf")]
    for _ in range(_ROUNDS):
        for way, exchange in enumerate(ways):
            began = time.perf_counter()
            ops.wait_tensor(exchange())
            least[way] = min(least[way], time.perf_counter() - began)
    faster = torch.tensor(least[1] < least[0])
    dist.broadcast(faster, group=group, group_src=0)
    return bool(faster)
