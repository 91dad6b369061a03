"""One rank a process: sync points become collectives of a process group."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, fx

from spdcompile.passes.base import Part, Program
from spdcompile.runtime.cache import KVCache
from spdcompile.runtime.collectives import lower_collectives
from spdcompile.runtime.cpu_operators import use_cpu_operators
from spdcompile.runtime.executor import Backend, Built, Executor, input_names, on_device
from spdcompile.runtime.job import Ranks
from spdcompile.runtime.packing import pack_products, packed, packs_of
from spdcompile.runtime.transport import Transport, collectives_of
from spdcompile.runtime.weights import bind


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
        self.collectives = collectives_of(ranks.group, device, transport)
        self._packs = {part.name: packs_of(program, part) for part in program.parts}
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
            f"{part.name} {self._built[self.program.graph_of(part).module].emitted}"
            for part in self.program.parts
        ]
        self.digest = hashlib.sha256("\n".join(emitted).encode()).hexdigest()[:8]

    def _bind(self, part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = bind(self.program, part, tensors, self.device, dist.get_rank(self.group))
        return packed(own, self._packs[part.name])

    def _build(self, part: Part, module: fx.GraphModule) -> Built:
        lowered = on_device(module, self.device)
        pack_products(lowered, self._packs[part.name])
        emitted = lower_collectives(lowered, self.collectives)
        if self.device.type == "cpu":
            use_cpu_operators(lowered)
        return Built(self._compile(lowered, lowered.code), input_names(lowered), emitted)
