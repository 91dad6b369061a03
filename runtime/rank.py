"""One rank's part of a program: its graphs with packed products and with collectives."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from spdcompile.passes.base import Part, Program
from spdcompile.runtime.collectives import Collectives, lower_collectives
from spdcompile.runtime.cpu_operators import use_cpu_operators
from spdcompile.runtime.executor import Backend, Built, Executor, input_names, on_device
from spdcompile.runtime.packing import pack_products, packed, packs_of
from spdcompile.runtime.weights import Weights


class RankExecutor(Executor):
    """Runs one rank of a program.

    Args:
        collectives: how it exchanges tensors with the others.
    """

    stacks_ranks = False

    def __init__(
        self,
        program: Program,
        tensors: Weights,
        *,
        backend: Backend,
        device: torch.device,
        collectives: Collectives,
    ) -> None:
        self.collectives = collectives
        self._packs = {part.name: packs_of(program, part) for part in program.parts}
        super().__init__(program, tensors, backend=backend, device=device)

    def _packed(self, part: Part, params: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The parameters of a part as its function takes them."""
        return packed(params, self._packs[part.name])

    def _build(self, part: Part, module: fx.GraphModule) -> Built:
        lowered = on_device(module, self.device)
        pack_products(lowered, self._packs[part.name])
        emitted = lower_collectives(lowered, self.collectives)
        if self.device.type == "cpu":
            use_cpu_operators(lowered)
        return Built(self._compile(lowered, lowered.code), input_names(lowered), emitted)
