"""How good a program is with some sync points dropped, beside the one that drops none.

The blocks before the first dropped point are plain: their values are computed once, for all
evaluations, and an evaluation begins at the block that drops something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from spdcompile.passes import pipeline
from spdcompile.passes.base import BlockGraph, Part, Program
from spdcompile.passes.drop import PointName
from spdcompile.plan import Router
from spdcompile.runtime.data import batches_of
from spdcompile.runtime.hidden import HiddenStates
from spdcompile.runtime.inputs import program_inputs
from spdcompile.runtime.local import LocalExecutor
from spdcompile.runtime.record import Record

Values = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Quality:
    """What a program is worth on the calibration data.

    Args:
        perplexity: exp of the mean negative log-likelihood of each chunk's tokens after its first.
        kl: mean over the same positions of KL(undropped || this), in nats; None if unknown.
        agreement: share of them at which the likeliest token is that of the undropped program;
            None if unknown.
    """

    perplexity: float
    kl: float | None = None
    agreement: float | None = None


class Evaluator:
    """Measures sets of dropped sync points.

    Args:
        base: the program before anything is dropped.
        plain: runs it.
        tokens: int64 [chunks, length].
        states: keeps the values of the plain run.
        record: keeps what was measured.
        router: what routers read where a dropped point is pending.
        batch_size: chunks at a time.
        advance: told how many blocks were just run on a batch.
    """

    def __init__(
        self,
        base: pipeline.Lowering,
        plain: LocalExecutor,
        tokens: Tensor,
        *,
        states: HiddenStates,
        record: Record,
        router: Router = Router.EXACT,
        batch_size: int = 8,
        advance: Callable[[int], object] = lambda blocks: None,
    ) -> None:
        self.base, self.plain, self.router = base, plain, router
        self.batches = list(batches_of(tokens, batch_size))
        self.record, self._states, self._advance = record, states, advance
        self.parts = base.program.parts
        self._plain_values: list[Values] = []
        self._known: dict[tuple[str, ...], BlockGraph] = {}
        self.blocks_run = 0

    def quality(self, points: Iterable[PointName]) -> Quality:
        """Perplexity, KL divergence and agreement with some sync points dropped.

        Raises:
            RefusalError: they cannot be dropped.
        """
        dropped = frozenset(points)
        found = self.record.get(_name(dropped))
        if found is None:
            found = asdict(self._measured(dropped))
            self.record.put(_name(dropped), found)
        return Quality(**found)

    def is_known(self, points: Iterable[PointName]) -> bool:
        """Whether `quality` runs nothing for these points."""
        return self.record.get(_name(points)) is not None

    def program_without(self, points: frozenset[PointName]) -> Program:
        """The program that drops some points; equal blocks are the same graph in all of them."""
        lowering = pipeline.advance(self.base, pipeline.changing(points, self.router))
        return self.known_graphs(lowering.program)

    def known_graphs(self, program: Program) -> Program:
        """The program with graphs that were there before, so that they are compiled once."""
        graphs = {
            key: self._known.setdefault((key, *_placeholders(block)), block)
            for key, block in program.graphs.items()
        }
        return replace(program, graphs=graphs)

    def blocks_from(self, points: Iterable[PointName]) -> int:
        """How many blocks an evaluation of these points runs."""
        return len(self.parts) - 1 - self._first(points)

    def count(self, blocks: int) -> None:
        """Takes note that blocks were run on one batch."""
        self.blocks_run += blocks
        self._advance(blocks)

    def plain_values(self, batch: int, parts: Iterable[Part]) -> Values:
        """What parts read of a plain run, on the executor's device."""
        if not self._plain_values:
            self._plain_values = [self._run_plain(tokens) for tokens in self.batches]
        kept = self._plain_values[batch]
        device = self.plain.device
        return {name: kept[name].to(device) for name in read_by(parts) if name in kept}

    @torch.no_grad()
    def _run_plain(self, tokens: Tensor) -> Values:
        """Every value of a plain run up to the last block."""
        inputs = program_inputs(self.plain.program, tokens.to(self.plain.device))
        kept = self._states.keep(inputs)
        for part in self.parts[:-1]:
            values = {name: kept[name].to(self.plain.device) for name in part.inputs.values()}
            kept |= self._states.keep(self.plain.call(part, values))
            self.count(part.layer is not None)
        return kept

    def _first(self, points: Iterable[PointName]) -> int:
        """Place of the first part that drops one of the points; of the last part if none is."""
        layers = {layer for layer, _ in points}
        places = [place for place, part in enumerate(self.parts) if part.layer in layers]
        return min(places, default=len(self.parts) - 1)

    @torch.no_grad()
    def _measured(self, points: frozenset[PointName]) -> Quality:
        first = self._first(points)
        executor = self.plain.with_program(self.program_without(points)) if points else self.plain
        parts = executor.program.parts[first:]
        sums = torch.zeros(3, dtype=torch.float64)
        for number, tokens in enumerate(self.batches):
            values = self.plain_values(number, parts)
            executor.run_parts(values, parts)
            logits = values[executor.program.output]
            sums += compared(logits, self._plain_logits(number) if points else logits, tokens)
            self.count(len(parts) - 1)
        loss, kl, equal = (sums / sum(tokens[:, 1:].numel() for tokens in self.batches)).tolist()
        return Quality(math.exp(loss), kl, equal)

    def _plain_logits(self, batch: int) -> Tensor:
        """Computed anew from the last block's output: kept for all tokens they are too large."""
        postlude = self.parts[-1]
        values = self.plain_values(batch, [postlude])
        return self.plain.call(postlude, values)[self.plain.program.output]


def _name(points: Iterable[PointName]) -> str:
    """Under which a record keeps what was measured with some points dropped."""
    return ",".join(f"{layer}.{point}" for layer, point in sorted(points)) or "none"


def read_by(parts: Iterable[Part]) -> set[str]:
    """Names of the values that consecutive parts read and do not make themselves."""
    read: set[str] = set()
    made: set[str] = set()
    for part in parts:
        read |= set(part.inputs.values()) - made
        made |= set(part.outputs)
    return read


def _placeholders(block: BlockGraph) -> list[str]:
    return [node.name for node in block.module.graph.find_nodes(op="placeholder")]


def compared(logits: Tensor, plain: Tensor, tokens: Tensor) -> Tensor:
    """Sums over the positions with a next token: loss, KL(plain || logits), equal argmax.

    Args:
        logits, plain: [B, S, V].
        tokens: int64 [B, S].

    Returns: float64 [3].
    """
    sums = torch.zeros(3, dtype=torch.float64)
    # Chunk by chunk: in float32 the log-probabilities of a batch are many times the hidden states.
    for row, plain_row, targets in zip(logits, plain, tokens, strict=True):
        own, other = (x[:-1].float().log_softmax(-1) for x in (row, plain_row))
        loss = F.nll_loss(own, targets[1:].to(own.device), reduction="sum")
        kl = F.kl_div(own, other, reduction="sum", log_target=True)
        equal = (own.argmax(-1) == other.argmax(-1)).sum()
        sums += torch.stack([loss.double(), kl.double(), equal.double()]).cpu()
    return sums
