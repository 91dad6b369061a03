"""Finding out what a drop costs, and recovering from it: the public face of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spdcompile.api import compile as compile_model
from spdcompile.compiled import CompiledModel
from spdcompile.errors import UsageError
from spdcompile.models import ModelSource
from spdcompile.plan import Plan, Router
from spdcompile.planning import choice, groups_of
from spdcompile.runtime.calibrate import Sensitivity
from spdcompile.runtime.calibrate import calibrate as run_calibration
from spdcompile.runtime.data import chunks_of
from spdcompile.runtime.distill import Distilled, DistillSettings, StudentInput
from spdcompile.runtime.distill import distill as run_distillation
from spdcompile.runtime.local import LocalExecutor

__all__ = [
    "DistillSettings",
    "Distilled",
    "Sensitivity",
    "StudentInput",
    "calibrate",
    "chunks_of",
    "distill",
]

Groups = Mapping[int, Sequence[Sequence[int]]]


def calibrate(
    model: ModelSource | CompiledModel,
    tokens: Tensor,
    *,
    tp: int,
    head_groups: Groups | None = None,
    router: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Sensitivity:
    """Measures how much perplexity each block loses without its attention sync point.

    The paper's cumulative scores (SPD, arXiv 2502.20727): L + 1 evaluations from the last block
    on, the hidden states before the range computed once.

    Args:
        model: a loaded model, or a local directory with weights, which is loaded in float32; or
            what `compile` made of it for the local executor, which spares the capture.
        tokens: calibration chunks, int64 [chunks, length]; see `chunks_of`.
        tp: number of ranks; all of them run in this process.
        head_groups: layer -> tp lists of head group units.
        router: as in `compile`; that of a compiled model if None.
        batch_size: chunks at a time.
        progress: whether to show a progress bar.

    Raises:
        UsageError: tp, the tokens or the model do not fit.
        RefusalError: a block's attention point cannot be dropped.
    """
    compiled = _undropped(model, tp, head_groups, router)
    return run_calibration(
        compiled.base,
        _local(compiled),
        tokens,
        router=compiled.plan.router,
        batch_size=batch_size,
        progress=progress,
    )


def distill(
    model: ModelSource | CompiledModel,
    tokens: Tensor,
    *,
    tp: int,
    spd_mask: Sequence[bool] | Plan,
    head_groups: Groups | None = None,
    router: str | None = None,
    settings: DistillSettings | None = None,
    progress: bool = True,
) -> Distilled:
    """Trains each block that loses a sync point to give what the original block gives (B2B).

    Args:
        model: as in `calibrate`; it is left as it is. A compiled one must be eager.
        tokens: calibration chunks, int64 [chunks, length]; see `chunks_of`.
        tp: number of ranks; all of them run in this process.
        spd_mask: what is dropped: one bool a decoder layer, or a Plan.
        router: as in `compile`; that of a compiled model if None. A Plan brings its own.
        settings: how a block is trained.

    Returns: the new tensors; `.apply_to(model)` writes them into a model.

    Raises:
        UsageError: an argument does not fit the model.
        RefusalError: a sync point that cannot be dropped, or one whose block passes partial sums
            on to the next block, so that it has no output of its own to compare.
    """
    if isinstance(spd_mask, Plan):
        if router is not None:
            raise UsageError("A Plan brings its own router setting.", where="router")
        head_groups = spd_mask.head_groups
    compiled = _undropped(model, tp, head_groups, router)
    plan = compiled.with_mask(spd_mask).plan
    return run_distillation(
        compiled.base,
        _local(compiled),
        tokens,
        points=plan.dropped,
        router=plan.router,
        settings=settings,
        progress=progress,
    )


def _undropped(
    model: ModelSource | CompiledModel,
    tp: int,
    head_groups: Groups | None,
    router: str | None,
) -> CompiledModel:
    """The model with every sync point, all ranks in this process, eager unless given compiled."""
    if isinstance(model, CompiledModel):
        _check_fits(model, tp, head_groups)
        reads = model.plan.router if router is None else choice(Router, router, "router")
        return model.with_mask(replace(model.plan, dropped=frozenset(), router=reads))
    dtype = None if isinstance(model, PreTrainedModel) else torch.float32
    return compile_model(
        model,
        tp=tp,
        head_groups=head_groups,
        router=router,
        executor="local",
        backend="eager",
        dtype=dtype,
    )


def _check_fits(compiled: CompiledModel, tp: int, head_groups: Groups | None) -> None:
    """Raises UsageError if a compiled model was not compiled for this tp and these head groups."""
    if compiled.plan.tp != tp or (
        head_groups is not None and groups_of(head_groups) != dict(compiled.plan.head_groups)
    ):
        raise UsageError(
            "The model was compiled for something else.",
            where="model",
            found=f"tp={compiled.plan.tp}, head groups {dict(compiled.plan.head_groups)}",
            needed=f"tp={tp}, head groups {head_groups or {}}",
            fix="give the model itself",
        )


def _local(compiled: CompiledModel) -> LocalExecutor:
    if not isinstance(compiled.executor, LocalExecutor):
        raise UsageError(
            "Calibration and distillation run all ranks in one process.",
            where="model",
            found="a model compiled for one rank a process",
            fix="compile it with executor='local'",
        )
    return compiled.executor
