"""Finding out what a drop costs, and recovering from it: the public face of both."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spdcompile.compiled import CompiledModel
from spdcompile.models import ModelSource
from spdcompile.plan import Plan
from spdcompile.planning import check_tp, make_plan
from spdcompile.runtime.calibrate import CalibrateSettings, Method, Points, Sensitivity
from spdcompile.runtime.calibrate import calibrate as run_calibration
from spdcompile.runtime.data import check_tokens, chunks_of
from spdcompile.runtime.distill import distill as run_distillation
from spdcompile.runtime.distill_settings import DistillSettings, StudentInput
from spdcompile.runtime.distilled import Distilled
from spdcompile.runtime.evaluate import Quality
from spdcompile.runtime.texts import calibration_tokens
from spdcompile.undropped import Groups, Source, local_executor, undropped

__all__ = [
    "CalibrateSettings",
    "DistillSettings",
    "Distilled",
    "Method",
    "Points",
    "Quality",
    "Sensitivity",
    "StudentInput",
    "calibrate",
    "calibration_tokens",
    "chunks_of",
    "distill",
]


def calibrate(
    model: ModelSource | CompiledModel,
    tokens: Tensor,
    *,
    tp: int,
    head_groups: Groups | None = None,
    router: str | None = None,
    plan: Plan | None = None,
    settings: CalibrateSettings | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measures what dropping each sync point costs in perplexity, KL divergence and agreement.

    By default the paper's cumulative scores (SPD, arXiv 2502.20727), from the last point on, for
    attention and MLP points alike; leave-one-out and a first-order estimate on request.

    Args:
        model: a loaded model, or a local directory with weights, which is loaded in float32; or
            what `compile` made of it for the local executor, which spares the capture.
        tokens: calibration chunks, int64 [chunks, length]; see `calibration_tokens`, `chunks_of`.
        tp: number of ranks; all of them run in this process.
        head_groups: layer -> tp lists of head group units.
        router: as in `compile`; that of a compiled model if None.
        plan: brings head groups and router setting; what it drops is not dropped here.
        settings: which points, how, and where hidden states and results so far are kept.
        progress: whether to show a progress bar.

    Raises:
        UsageError: tp, the tokens or the model do not fit.
        PlanError: the plan was made for another model or tp.
        RefusalError: no sync point can be dropped.
        SaveError: there is no room for hidden states or results.
    """
    compiled = undropped(model, tp, head_groups, router, plan)
    check_tokens(compiled.model, tokens)
    return run_calibration(
        compiled.base,
        local_executor(compiled),
        tokens,
        router=compiled.plan.router,
        settings=settings,
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
    """Trains blocks that lose a sync point to give what the original blocks give (B2B).

    A block whose last sync point is dropped is trained together with those that follow, up to the
    next kept point. Of a directory's weights only a segment's are in memory.

    Args:
        model: as in `calibrate`; it is left as it is. A compiled one must be eager.
        tokens: calibration chunks, int64 [chunks, length]; see `chunks_of`.
        tp: number of ranks; all of them run in this process.
        spd_mask: what is dropped: one bool a decoder layer, or a Plan.
        router: as in `compile`; that of a compiled model if None. A Plan brings its own.
        settings: how blocks are trained.

    Returns: the new tensors; `.apply_to(model)` writes them into a model.

    Raises:
        UsageError: an argument does not fit the model.
        RefusalError: a sync point that cannot be dropped.
        PlanError: the plan was made for another model or tp.
        SaveError: there is no room for hidden states or results.
    """
    if isinstance(model, CompiledModel):
        given = spd_mask if isinstance(spd_mask, Plan) else None
        compiled = undropped(model, tp, head_groups, router, given)
        plan, own = compiled.with_mask(spd_mask).plan, compiled.model
        base, teacher = compiled.base, local_executor(compiled)
    else:
        check_tp(tp)
        source = Source(model)
        plan, own = make_plan(source.model, tp, spd_mask, head_groups, router), source.model
        base = source.lowering(tp, plan.head_groups)
        teacher = source.executor(base, on_demand=True)
    check_tokens(own, tokens)
    return run_distillation(
        base,
        teacher,
        tokens,
        points=plan.dropped,
        router=plan.router,
        settings=settings,
        progress=progress,
    )
