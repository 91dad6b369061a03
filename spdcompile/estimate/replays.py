"""End-to-end latencies of a rank by itself: compute measured here, communication from a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from tabulate import tabulate

from spdcompile.estimate.counting import Kind
from spdcompile.estimate.links import Link
from spdcompile.estimate.structure import Structure
from spdcompile.estimate.work import Step
from spdcompile.plan import Plan
from spdcompile.runtime.executor import Backend
from spdcompile.runtime.replay import Replayed, ReplayExecutor, with_delays, without_delays


@dataclass(frozen=True, slots=True)
class ReplayRow:
    """One step of one plan on one link; times in seconds.

    Args:
        dropped: how many sync points are gone.
        collectives: how many the step ran.
        compute: measured, collectives taking no time.
        communication: modelled, the sum of all collectives.
        total: measured, with waits as long as the model says.
    """

    step: str
    batch: int
    new_tokens: int
    context: int
    dropped: int
    link: str
    collectives: int
    compute: float
    communication: float
    total: float


def replay(
    structure: Structure,
    plans: Sequence[Plan],
    links: Sequence[Link],
    steps: Sequence[Step],
    *,
    device: torch.device,
    backend: Backend = Backend.INDUCTOR,
    rounds: int = 20,
    graphs: bool = True,
) -> Iterator[ReplayRow]:
    """Runs rank 0 of each plan's program with random weights, for each step and link.

    Args:
        plans: of one tp, which share weights and what is compiled.
        rounds: calls of each, of which the median counts.
        graphs: whether a step is one captured CUDA graph on CUDA.

    Raises:
        RefusalError: a sync point cannot be dropped, or the model cannot run on new tokens alone.
    """
    executor: ReplayExecutor | None = None
    for plan in plans:
        program = structure.remembering(plan)
        if executor is None:
            executor = ReplayExecutor(program, backend=backend, device=device)
        own = executor.with_program(program)
        for step in steps:
            sizes = {"batch": step.batch, "new": step.new, "context": step.context}
            replayed = Replayed(own, **sizes, graphs=graphs)
            without_delays()
            compute = replayed.seconds(rounds)
            for link in links:
                delays = with_delays(*_delays(link, plan.tp))
                replayed.forget_graph()
                replayed.launch()
                count, waited = delays.count, delays.waited
                yield ReplayRow(
                    "decode" if step.context else "prefill",
                    *(step.batch, step.new, step.context + step.new, len(plan.dropped)),
                    *(link.name, count, compute, waited, replayed.seconds(rounds)),
                )


def _delays(link: Link, ranks: int) -> tuple[partial[float], ...]:
    """Bytes of a result -> seconds, of an all-reduce and of an all-gather."""
    return tuple(
        partial(_seconds, link, kind, ranks) for kind in (Kind.ALL_REDUCE, Kind.ALL_GATHER)
    )


def _seconds(link: Link, kind: Kind, ranks: int, num_bytes: int) -> float:
    return link.of(kind, num_bytes, ranks)


def table_of(rows: Sequence[ReplayRow], tablefmt: str = "simple") -> str:
    """The rows, and what each plan saves of the same step on the same link with nothing dropped."""
    plain = {_place(row): row.total for row in rows if not row.dropped}
    headers = ["step", "batch", "tokens", "context", "dropped", "link", "collectives"]
    headers += ["compute ms, measured", "communication ms, modelled", "end to end ms", "saved"]
    cells = []
    for row in rows:
        known = plain.get(_place(row))
        saved = f"{1 - row.total / known:.1%}" if row.dropped and known else ""
        times = (f"{1e3 * each:.2f}" for each in (row.compute, row.communication, row.total))
        places = (row.step, row.batch, row.new_tokens, row.context, row.dropped, row.link)
        cells.append((*places, row.collectives, *times, saved))
    return tabulate(cells, headers, tablefmt=tablefmt, disable_numparse=True)


def data_of(rows: Sequence[ReplayRow]) -> list[dict[str, Any]]:
    """The rows as JSON data; times in seconds."""
    return [asdict(row) for row in rows]


def _place(row: ReplayRow) -> tuple[object, ...]:
    return row.link, row.step, row.batch, row.new_tokens, row.context
