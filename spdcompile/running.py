"""Where and how a program is to run, as a caller says it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from spdcompile.errors import UsageError
from spdcompile.models import ModelSource
from spdcompile.passes.base import Program
from spdcompile.planning import choice
from spdcompile.runtime import launch
from spdcompile.runtime.distributed import DistributedExecutor
from spdcompile.runtime.executor import Backend, Executor
from spdcompile.runtime.job import Ranks, chosen_timeout, join
from spdcompile.runtime.joining import check_blocks_per_graph
from spdcompile.runtime.local import LocalExecutor
from spdcompile.runtime.transport import Transport
from spdcompile.runtime.weights import Weights


class Running:
    """What `spdcompile.compile` takes beside the model and what becomes of it.

    Raises:
        UsageError: there is no such executor, backend or transport, WORLD_SIZE is no multiple of
            tp, or a graph is to hold no block.
    """

    def __init__(
        self,
        tp: int,
        executor: str | None,
        backend: str,
        device: torch.device | str | None,
        timeout: float | None,
        transport: str,
        blocks_per_graph: int,
    ) -> None:
        self.tp = tp
        self.backend = choice(Backend, backend, "backend")
        self.distributed = _is_distributed(executor)
        self.device = None if device is None else torch.device(device)
        self.timeout = chosen_timeout(timeout)
        self.transport = choice(Transport, transport, "transport")
        check_blocks_per_graph(blocks_per_graph)
        self.blocks_per_graph = blocks_per_graph
        self.ranks: Ranks | None = None
        if self.distributed:
            launch.check_world_size(tp, launch.launched_world_size())

    @contextmanager
    def among_ranks(self, model: ModelSource) -> Iterator[Running]:
        """This rank among the others, which bear with it while it loads and compiles."""
        if not self.distributed:
            yield self
            return
        device = self.device
        if device is None:
            device = model.device if isinstance(model, PreTrainedModel) else torch.device("cpu")
        job = join(device, self.timeout)
        with job.watch.patience():
            self.ranks = job.ranks(self.tp, device)
            yield self

    def executor(self, program: Program, tensors: Weights, device: torch.device) -> Executor:
        """What runs a program.

        Args:
            device: where the weights are, used unless the caller named one.
        """
        how: dict[str, Any] = {
            "backend": self.backend,
            "device": self.device or device,
            "blocks_per_graph": self.blocks_per_graph,
        }
        if self.ranks is None:
            return LocalExecutor(program, tensors, **how)
        return DistributedExecutor(
            program, tensors, ranks=self.ranks, transport=self.transport, **how
        )


def _is_distributed(executor: str | None) -> bool:
    if executor is None:
        return launch.launched_world_size() > 1
    if executor not in ("local", "distributed"):
        raise UsageError(
            f"There is no executor {executor!r}.",
            where="executor",
            needed="'local', 'distributed' or None",
        )
    return executor == "distributed"
