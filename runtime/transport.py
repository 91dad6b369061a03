"""What carries tensors between ranks: memory that they share, or their process group."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from spdcompile.errors import UsageError
from spdcompile.runtime.collectives import (
    Collectives,
    OfGatheredParts,
    OfProcessGroup,
    OfSharedMemory,
)
from spdcompile.runtime.faults import PATIENCE_S
from spdcompile.runtime.shared_memory import why_not_shared

_ELEMENTS = 2048  # of float32, about a token's hidden state
_ROUNDS = 15


class Transport(enum.Enum):
    """What carries tensors between ranks."""

    AUTO = "auto"
    """Shared memory for ranks of one host on CPU, else the process group."""
    PROCESS_GROUP = "process-group"
    """The backend of the group: gloo, NCCL."""
    SHARED_MEMORY = "shared-memory"
    """Memory that the ranks share; refused where they cannot."""


def collectives_of(
    group: dist.ProcessGroup, device: torch.device, transport: Transport
) -> Collectives:
    """How ranks exchange tensors; every rank of the group calls this, and all decide alike.

    Raises:
        UsageError: shared memory is asked for and cannot be had.
    """
    name, size = group.group_name, dist.get_world_size(group)
    if transport is not Transport.PROCESS_GROUP:
        on_cpu = device.type == "cpu"
        why = why_not_shared(group, PATIENCE_S) if on_cpu else f"tensors are on {device.type}"
        if not why:
            return OfSharedMemory(name, size)
        if transport is Transport.SHARED_MEMORY:
            raise UsageError(
                "The ranks cannot share memory.",
                where="transport",
                found=why,
                needed="ranks on one host, tensors on CPU, and a C++ compiler",
                fix="leave it to transport='auto'",
            )
    backend = dist.get_backend(group)
    if backend == "gloo" and size == 2 and _gathering_is_faster(group):
        return OfGatheredParts(name, size, backend)
    return OfProcessGroup(name, size, backend)


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
