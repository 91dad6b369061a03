"""Measures one entry of the zoo: compiles it and compares it with the model itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

import spdcompile
from spdcompile.errors import CaptureError, SpdCompileError, UsageError
from spdcompile.passes import pipeline
from spdcompile.planning import make_plan
from spdcompile.report.data import PointState, Report
from spdcompile.runtime.executor import Backend
from spdcompile.runtime.local import LocalExecutor
from spdcompile.runtime.weights import checkpoint_tensors
from tests.compare import rel_err
from tests.zoo.models import build, left_padded, token_ids
from tests.zoo.rows import Reason, Row, Run, Share, Structure
from tests.zoo.structure import EXEMPT, Mixer, State, Weight, survey

SHAPES = ((3, 13), (1, 5))  # capture's example is (3, 11)
PADS = (0, 2, 6)  # of the rows of the first shape
_NO_REASON = "the compiler gives no reason"
_MAX_TEXT = 400


class References:
    """Logits of the unsharded model.

    Args:
        inputs: ids and mask of each batch that is compared.
        padding: why the model itself fails on the padded batch, or "".

    Raises:
        Exception: whatever the model raises on an unpadded batch.
        ValueError: its logits are not finite.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.vocab = model.config.get_text_config().vocab_size
        batches = [token_ids(shape, self.vocab) for shape in SHAPES]
        self.inputs: list[tuple[Tensor, Tensor | None]] = [(ids, None) for ids in batches]
        self.logits = self._run()
        for logits in self.logits:
            if not bool(logits.isfinite().all()):
                raise ValueError("the model's own logits are not finite")
        self.padding = ""
        padded = left_padded(batches[0], PADS)
        try:
            self.logits.append(self._of(*padded))
            self.inputs.append(padded)
        except Exception as error:
            self.padding = text_of(error)

    @torch.no_grad()
    def _of(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        extra = {} if mask is None else {"attention_mask": mask}
        return self.model(input_ids=ids, use_cache=False, **extra).logits

    def _run(self) -> list[Tensor]:
        return [self._of(ids, mask) for ids, mask in self.inputs]

    def errors(self, logits: Sequence[Tensor]) -> list[float]:
        """Relative error of the logits of each batch, at real tokens.

        Infinity where they are not finite, or not of the model's own shape and dtype.
        """
        cases = zip(logits, self.logits, self.inputs, strict=True)
        return [_error(given, own, mask) for given, own, (_, mask) in cases]

    def repeat(self) -> float:
        """Difference between the model now and when the references were made."""
        return max(self.errors(self._run()))

    def control(self) -> float:
        """How far another first token moves the last logits of the shortest batch."""
        ids, _ = self.inputs[1]
        changed = ids.clone()
        changed[:, 0] = ids[:, 1] if bool((ids[:, 0] != ids[:, 1]).all()) else ids[:, 0] - 1
        return rel_err(self._of(changed, None)[:, -1], self.logits[1][:, -1])


def _error(given: Tensor, own: Tensor, real: Tensor | None) -> float:
    try:
        return rel_err(given, own, real=real)
    except ValueError:
        return math.inf


def measure(entry: str, tps: tuple[int, ...]) -> Row:
    """The row of an entry; whatever goes wrong is in the row."""
    began = time.perf_counter()
    stage, name = "build", ""
    try:
        model = build(entry)
        stage, name = "model", type(model).__name__
        references = References(model)
        control = references.control()
    except Exception as error:
        seconds = time.perf_counter() - began
        return Row(entry, name, stage, text_of(error), seconds=seconds)
    outcome = _attempt(model, tps, references)
    repeat = references.repeat()
    seconds = time.perf_counter() - began
    return replace(
        outcome,
        entry=entry,
        model=name,
        padding=references.padding,
        repeat=repeat,
        control=control,
        seconds=seconds,
    )


def _attempt(model: PreTrainedModel, tps: tuple[int, ...], references: References) -> Row:
    """The outcome of each tp, as the part of a row that it determines."""
    try:
        captured = pipeline.start(model)
    except Exception as error:
        return Row("", stage="capture", failure=text_of(error))
    structure, runs = None, []
    for tp in tps:
        try:
            compiled = compile_captured(captured, model, tp)
            structure = structure or describe(compiled)
        except Exception as error:
            refused = isinstance(error, UsageError)
            runs.append(Run(tp, failure=text_of(error), refused=refused))
        else:
            runs.append(run_of(compiled, tp, references))
    if structure is None:
        return Row("", stage="compile", failure=runs[0].failure, runs=tuple(runs))
    return Row("", structure=structure, runs=tuple(runs))


def compile_captured(
    captured: pipeline.Lowering, model: PreTrainedModel, tp: int
) -> spdcompile.CompiledModel:
    """What `spdcompile.compile` makes, from a capture that serves every tp.

    Raises:
        UsageError: the model cannot be split over so many ranks.
        SpdCompileError: a pass failed.
    """
    plan = make_plan(model, tp, None, None)
    base = pipeline.advance(captured, pipeline.preserving(tp, plan.head_groups))
    lowering = pipeline.advance(base, pipeline.changing(plan.dropped))
    tensors = checkpoint_tensors(model)
    runner = LocalExecutor(
        lowering.program, tensors, backend=Backend.EAGER, device=torch.device("cpu")
    )
    return spdcompile.CompiledModel(base, lowering, runner, plan, model)


def run_of(compiled: spdcompile.CompiledModel, tp: int, references: References) -> Run:
    """The errors of a compiled model, or why it fails."""
    try:
        logits = [compiled(ids, attention_mask=mask).logits for ids, mask in references.inputs]
    except Exception as error:
        return Run(tp, failure=text_of(error))
    errors = references.errors(logits)
    unpadded, padded = errors[: len(SHAPES)], errors[len(SHAPES) :]
    run = Run(tp, max(unpadded), *padded)
    if compiled.cache_refusal:
        return run
    try:
        logits[-1] = _in_pieces(compiled, *references.inputs[-1])
    except Exception as error:
        return replace(run, failure=f"with a KV cache: {text_of(error)}")
    return replace(run, cached=references.errors(logits)[-1])


def _in_pieces(compiled: spdcompile.CompiledModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The logits of a batch that is given piece by piece, one token, several and one."""
    cache = compiled.new_cache(*ids.shape)
    ends = (ids.shape[1] - 4, ids.shape[1] - 3, ids.shape[1] - 1, ids.shape[1])
    logits, start = [], 0
    for end in ends:
        seen = None if mask is None else mask[:, :end]
        out = compiled(ids[:, start:end], attention_mask=seen, past_key_values=cache)
        logits.append(out.logits)
        start = end
    return torch.cat(logits, 1)


def describe(compiled: spdcompile.CompiledModel) -> Structure:
    """What is split, synced and refused."""
    program, report = compiled.program, compiled.report
    mixers, weights = survey(program)
    blocks = [program.graph_of(part) for part in program.parts if part.layer is not None]
    return Structure(
        layers=len(blocks),
        mixers=_shares(mixers),
        weights=_shares(weights),
        all_reduces=(
            sum(len(block.partials) for block in blocks),
            sum(len(block.sync_points) for block in blocks),
        ),
        droppable=_droppable(report),
        whole=tuple(_why_whole(weights, report)),
        fixed=tuple(_why_fixed(report)),
        recomputed=compiled.cache_refusal,
    )


def _shares(things: Iterable[Mixer | Weight]) -> dict[str, Share]:
    states: dict[str, list[State]] = {}
    for thing in things:
        states.setdefault(thing.kind.value, []).append(thing.state)
    return {
        kind: Share(len(own), own.count(State.SPLIT), sum(state in EXEMPT for state in own))
        for kind, own in states.items()
    }


def _droppable(report: Report) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for block in report.blocks:
        for point in block.sync_points:
            if block.layers and point.state is not PointState.MERGED:
                free, total = found.get(point.name, (0, 0))
                added = len(block.layers) * (point.state is PointState.KEPT)
                found[point.name] = (free + added, total + len(block.layers))
    return found


def _why_whole(weights: Iterable[Weight], report: Report) -> list[Reason]:
    """Reasons for the whole weights of blocks, each with the weights that it holds for."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for weight in weights:
        if weight.state is State.WHOLE and weight.layer is not None:
            text = _reason_for(weight, weight.layer, report)
            found.setdefault((weight.kind.value, text), {})[weight.path] = None
    return [Reason(kind, tuple(paths), text) for (kind, text), paths in found.items()]


def _reason_for(weight: Weight, layer: int, report: Report) -> str:
    """What the compiler says of the weight itself, or else of the regions of its block."""
    path = weight.path.removesuffix(".weight")
    refusals = [refusal for refusal in report.refusals if layer in refusal.layers]
    own = [r.reason for r in refusals if path in r.subject.split(", ")]
    regions = [r.reason for r in refusals if r.found_by == "propagate"]
    everywhere = [r.reason for r in report.refusals if not r.layers]
    return "; ".join(dict.fromkeys(own or regions or everywhere)) or _NO_REASON


def _why_fixed(report: Report) -> list[Reason]:
    points = [(point.name, point.reason) for b in report.blocks for point in b.sync_points]
    return [Reason("", (name,), text) for name, text in dict.fromkeys(points) if text]


def text_of(error: BaseException) -> str:
    """An error in one line, without the name of the model."""
    text = str(error)
    if isinstance(error, CaptureError):
        text = error.found or error.summary
    elif isinstance(error, SpdCompileError):
        text = f"{error.summary} {error.found or ''}"
    return f"{type(error).__name__}: {' '.join(text.split())}"[:_MAX_TEXT]
