"""The compiler on one screen: from a causal LM to one program for every rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel

from spdcompile.errors import PassError, SpdCompileError
from spdcompile.passes.assign import Assign, HeadGroups
from spdcompile.passes.base import Invariant, Numerics, Pass, PassResult, Program, Refusal
from spdcompile.passes.cache import remember
from spdcompile.passes.capture import capture
from spdcompile.passes.drop import Drop, PointName
from spdcompile.passes.localize import localize
from spdcompile.passes.normalize import normalize
from spdcompile.passes.propagate import propagate
from spdcompile.passes.regions import FindRegions
from spdcompile.passes.split import split
from spdcompile.passes.sync import insert_sync_points
from spdcompile.passes.tokens import follow_tokens
from spdcompile.passes.verify import verify
from spdcompile.passes.vocabulary import SplitVocabulary, Vocabulary
from spdcompile.plan import Router

_LOG = logging.getLogger(__name__)
_I = Invariant
_START = frozenset({_I.WELL_FORMED})


@dataclass(frozen=True, slots=True)
class Step:
    """A pass: a body under the contract that the runner checks."""

    name: str
    body: Callable[[Program], PassResult]
    numerics: Numerics
    requires: frozenset[Invariant]
    ensures: frozenset[Invariant]

    def __call__(self, program: Program) -> PassResult:
        return self.body(program)


def preserving(
    tp: int, head_groups: HeadGroups, vocabulary: Vocabulary = Vocabulary.BY_SIZE
) -> tuple[Step, ...]:
    """The passes that keep the numbers: from the captured graph to a program for `tp` ranks."""
    exact, rounding = Numerics.EXACT, Numerics.ROUNDING
    normal = _START | {_I.NORMAL}
    parts = normal | {_I.SPLIT}
    assigned = parts | {_I.ASSIGNED}
    placed = assigned | {_I.PLACED}
    synced = placed | {_I.SYNCED}
    local = synced | {_I.LOCAL}
    return (
        Step("normalize", normalize, exact, _START, normal),
        Step("split", split, exact, normal, parts),
        Step("tokens", follow_tokens, exact, parts, parts),
        Step("regions", FindRegions(tp), rounding, parts, parts),
        Step("assign", Assign(tp, head_groups), exact, parts, assigned),
        Step("propagate", propagate, rounding, assigned, placed),
        Step("sync", insert_sync_points, rounding, placed, synced),
        Step("localize", localize, exact, synced, local),
        Step("vocabulary", SplitVocabulary(vocabulary), exact, local, local),
    )


def changing(points: frozenset[PointName], router: Router = Router.EXACT) -> tuple[Step, ...]:
    """The passes that change the numbers: dropping the sync points that a plan names."""
    local = _START | {_I.NORMAL, _I.SPLIT, _I.ASSIGNED, _I.PLACED, _I.SYNCED, _I.LOCAL}
    return (Step("drop", Drop(points, router), Numerics.CHANGES, local, local),)


def remembering() -> tuple[Step, ...]:
    """The pass after which a program runs on new tokens alone."""
    local = _START | {_I.SPLIT, _I.ASSIGNED, _I.PLACED, _I.SYNCED, _I.LOCAL}
    return (Step("cache", remember, Numerics.EXACT, local, local),)


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What one pass did.

    Args:
        seconds: wall time of the pass, without its checks.
        nodes: operator calls over all distinct graphs, after it.
    """

    name: str
    numerics: Numerics
    seconds: float
    nodes: int
    rewrites: int
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class Lowering:
    """A program and how it came about."""

    program: Program
    records: tuple[PassRecord, ...]


def start(model: PreTrainedModel) -> Lowering:
    """Captures a model.

    Raises:
        CaptureError: the model cannot be captured.
    """
    began = time.perf_counter()
    result = capture(model)
    verify(result.program, _START)
    return Lowering(result.program, (_record("capture", Numerics.EXACT, began, result),))


def advance(lowering: Lowering, steps: Iterable[Pass]) -> Lowering:
    """Runs passes one after the other, each between the checks that its contract names.

    Raises:
        PassError: a pass failed for a reason of its own; names it and those before it.
        UsageError, RefusalError: what the caller asked for cannot be had.
    """
    program, records = lowering.program, list(lowering.records)
    for step in steps:
        verify(program, step.requires)
        began = time.perf_counter()
        try:
            result = step(program)
        except SpdCompileError:
            raise
        except Exception as error:
            raise PassError(
                f"The pass {step.name} failed.",
                pass_name=step.name,
                passes_before=[record.name for record in records],
                found=f"{type(error).__name__}: {error}",
            ) from error
        record = _record(step.name, step.numerics, began, result)
        verify(result.program, step.ensures)
        _LOG.info("%s: %.3f s, %d nodes", record.name, record.seconds, record.nodes)
        records.append(record)
        program = result.program
    return Lowering(program, tuple(records))


def _record(name: str, numerics: Numerics, began: float, result: PassResult) -> PassRecord:
    seconds = time.perf_counter() - began
    graphs = [block.module.graph for block in result.program.graphs.values()]
    nodes = sum(node.op == "call_function" for graph in graphs for node in graph.nodes)
    return PassRecord(name, numerics, seconds, nodes, result.rewrites, result.refusals)
