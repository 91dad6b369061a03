"""One rank's part of a program: its graphs with packed products and with collectives."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, fx

from spdcompile.passes.base import Part, Program
from spdcompile.runtime.collectives import Collectives, lower_collectives
from spdcompile.runtime.cpu_operators import use_cpu_operators, widening_pays
from spdcompile.runtime.executor import Backend, Built, Executor, input_names, on_device
from spdcompile.runtime.packing import Pack, pack_products, packed, packs_of
from spdcompile.runtime.weights import Weights


class RankExecutor(Executor):
    """Runs one rank of a program.

    Args:
        collectives: how it exchanges tensors with the others.
        group: the ranks that it exchanges them with; None for a rank by itself.
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
        group: dist.ProcessGroup | None = None,
        blocks_per_graph: int = 1,
    ) -> None:
        self.collectives, self.group = collectives, group
        self._widens = (
            device.type == "cpu" and _has_bfloat16_weights(program) and widening_pays(group)
        )
        super().__init__(
            program, tensors, backend=backend, device=device, blocks_per_graph=blocks_per_graph
        )

    @cached_property
    def _packs(self) -> dict[str, tuple[Pack, ...]]:
        """Those of the program that the weights were laid out for; they stay as they are in
        `with_program`."""
        return {part.name: packs_of(self.program, part) for part in self.program.parts}

    def _packed(self, part: Part, params: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The parameters of a part as its function takes them."""
        return packed(params, self._packs[part.name])

    def _build(self, part: Part, module: fx.GraphModule) -> Built:
        lowered = on_device(module, self.device)
        pack_products(lowered, self._packs[part.name])
        emitted = lower_collectives(lowered, self.collectives)
        if self.device.type == "cpu":
            use_cpu_operators(lowered, widens=self._widens)
        return Built(self._compile(lowered, lowered.code), input_names(lowered), emitted)


def _has_bfloat16_weights(program: Program) -> bool:
    dtypes = {ref.dtype for part in program.parts for ref in part.params.values()}
    return torch.bfloat16 in dtypes
