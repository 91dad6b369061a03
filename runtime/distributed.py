"""One rank a process: sync points become collectives of a process group."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, fx

from spdcompile.errors import UsageError
from spdcompile.passes.base import Part, Program
from spdcompile.passes.verify import count_sync_nodes
from spdcompile.runtime.cache import KVCache
from spdcompile.runtime.collectives import (
    Collectives,
    OfProcessGroup,
    OfSharedMemory,
    lower_collectives,
)
from spdcompile.runtime.executor import Backend, Executor, Function, on_device
from spdcompile.runtime.faults import PATIENCE_S
from spdcompile.runtime.job import Ranks
from spdcompile.runtime.shared_memory import why_not_shared
from spdcompile.runtime.weights import bind


class Transport(enum.Enum):
    """What carries tensors between ranks."""

    AUTO = "auto"
    """Shared memory for ranks of one host on CPU, else the process group."""
    PROCESS_GROUP = "process-group"
    """The backend of the group: gloo, NCCL."""
    SHARED_MEMORY = "shared-memory"
    """Memory that the ranks share; refused where they cannot."""


class DistributedExecutor(Executor):
    """Runs this rank of a program; every rank of the group must call it alike.

    Args:
        ranks: whose group has `program.tp` ranks.
        transport: what carries their tensors; what AUTO stands for is decided here.
    """

    stacks_ranks = False

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, Tensor],
        *,
        backend: Backend,
        device: torch.device,
        ranks: Ranks,
        transport: Transport = Transport.AUTO,
    ) -> None:
        self.ranks, self.group = ranks, ranks.group
        self.collectives = _collectives(ranks, device, transport)
        super().__init__(program, tensors, backend=backend, device=device)

    def run(
        self, inputs: Mapping[str, Tensor], cache: KVCache | None = None, last: int = 0
    ) -> Tensor:
        sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        with self.ranks.watch.call(f"program {self.digest} on {sizes}"):
            return super().run(inputs, cache, last)

    def call(
        self, part: Part, env: Mapping[str, Tensor], params: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        self.ranks.watch.at(f"in {part.name}")
        return super().call(part, env, params)

    def _prepare(self) -> None:
        super()._prepare()
        emitted = [
            f"{part.name} {self._emitted[self.program.graph_of(part).module]}"
            for part in self.program.parts
        ]
        self.digest = hashlib.sha256("\n".join(emitted).encode()).hexdigest()[:8]

    def _bind(self, part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return bind(self.program, part, tensors, self.device, dist.get_rank(self.group))

    def _build(self, part: Part, module: fx.GraphModule) -> tuple[Function, int]:
        lowered = on_device(module, self.device)
        lower_collectives(lowered, self.collectives)
        emitted = count_sync_nodes(lowered, self.collectives.sum_operator)
        return self._compile(lowered, lowered.code), emitted


def _collectives(ranks: Ranks, device: torch.device, transport: Transport) -> Collectives:
    """How ranks exchange tensors; all of them decide alike.

    Raises:
        UsageError: shared memory is asked for and cannot be had.
    """
    group = ranks.group
    named = (group.group_name, dist.get_world_size(group))
    if transport is Transport.PROCESS_GROUP:
        return OfProcessGroup(*named)
    on_cpu = device.type == "cpu"
    why = why_not_shared(group, PATIENCE_S) if on_cpu else f"tensors are on {device.type}"
    if not why:
        return OfSharedMemory(*named)
    if transport is Transport.SHARED_MEMORY:
        raise UsageError(
            "The ranks cannot share memory.",
            where="transport",
            found=why,
            needed="ranks on one host, tensors on CPU, and a C++ compiler",
            fix="leave it to transport='auto'",
        )
    return OfProcessGroup(*named)
