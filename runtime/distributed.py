"""One rank a process: sync points become collectives of a process group."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from spdcompile.passes.base import Part, Program
from spdcompile.runtime.cache import KVCache
from spdcompile.runtime.executor import Backend
from spdcompile.runtime.job import Ranks
from spdcompile.runtime.rank import RankExecutor
from spdcompile.runtime.transport import Transport, collectives_of
from spdcompile.runtime.weights import Weights, bind_each


class DistributedExecutor(RankExecutor):
    """Runs this rank of a program; every rank of the group must call it alike.

    Args:
        ranks: whose group has `program.tp` ranks.
        transport: what carries their tensors; what AUTO stands for is decided here.
    """

    def __init__(
        self,
        program: Program,
        tensors: Weights,
        *,
        backend: Backend,
        device: torch.device,
        ranks: Ranks,
        transport: Transport = Transport.AUTO,
        blocks_per_graph: int = 1,
    ) -> None:
        self.ranks = ranks
        super().__init__(
            program,
            tensors,
            backend=backend,
            device=device,
            collectives=collectives_of(ranks.group, device, transport),
            group=ranks.group,
            blocks_per_graph=blocks_per_graph,
        )

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
            f"{part.name} {self._built[self.program.graph_of(part).module].emitted}"
            for part in self.program.parts
        ]
        self.digest = hashlib.sha256("\n".join(emitted).encode()).hexdigest()[:8]

    def _bind(self, part: Part, tensors: Weights) -> dict[str, Tensor]:
        rank = dist.get_rank(self.group)
        return self._packed(part, bind_each(self.program, part, tensors, self.device, rank))
