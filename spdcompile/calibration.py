"""Finding out what a drop costs, and recovering from it: the public face of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spdcompile.api import ModelLike, check_tp, make_plan
from spdcompile.models import resolve_model
from spdcompile.plan import Plan
from spdcompile.runtime.calibrate import Sensitivity
from spdcompile.runtime.calibrate import calibrate as run_calibration
from spdcompile.runtime.data import chunks_of
from spdcompile.runtime.distill import Distilled, DistillSettings, StudentInput
from spdcompile.runtime.distill import distill as run_distillation

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
    model: ModelLike,
    tokens: Tensor,
    *,
    tp: int,
    head_groups: Groups | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Sensitivity:
    """Measures how much perplexity each block loses without its attention sync point.

    The paper's cumulative scores (SPD, arXiv 2502.20727): L + 1 evaluations from the last block
    on, the hidden states before the range computed once.

    Args:
        model: a loaded model, or a local directory with weights, which is loaded in float32.
        tokens: calibration chunks, int64 [chunks, length]; see `chunks_of`.
        tp: number of ranks; all of them run in this process.
        head_groups: layer -> tp lists of head group units.
        batch_size: chunks at a time.
        progress: whether to show a progress bar.

    Raises:
        UsageError: tp, the tokens or the model do not fit.
        RefusalError: a block's attention point cannot be dropped.
    """
    check_tp(tp)
    loaded = _loaded(model)
    plan = make_plan(loaded, tp, None, head_groups)
    return run_calibration(
        loaded,
        tokens,
        tp=tp,
        head_groups=plan.head_groups,
        batch_size=batch_size,
        progress=progress,
    )


def distill(
    model: ModelLike,
    tokens: Tensor,
    *,
    tp: int,
    spd_mask: Sequence[bool] | Plan,
    head_groups: Groups | None = None,
    settings: DistillSettings | None = None,
    progress: bool = True,
) -> Distilled:
    """Trains each block that loses a sync point to give what the original block gives (B2B).

    Args:
        model: a loaded model, left as it is, or a local directory with weights, which is loaded
            in float32.
        tokens: calibration chunks, int64 [chunks, length]; see `chunks_of`.
        tp: number of ranks; all of them run in this process.
        spd_mask: what is dropped: one bool a decoder layer, or a Plan.
        settings: how a block is trained.

    Returns: the new tensors; `.apply_to(model)` writes them into a model.

    Raises:
        UsageError: an argument does not fit the model.
        RefusalError: a sync point that cannot be dropped, or one whose block passes partial sums
            on to the next block, so that it has no output of its own to compare.
    """
    check_tp(tp)
    loaded = _loaded(model)
    plan = make_plan(loaded, tp, spd_mask, head_groups)
    return run_distillation(
        loaded,
        tokens,
        tp=tp,
        points=plan.dropped,
        head_groups=plan.head_groups,
        settings=settings,
        progress=progress,
    )


def _loaded(model: ModelLike) -> PreTrainedModel:
    """A model as it is; a directory in float32, in which errors and gradients are small enough."""
    dtype = None if isinstance(model, PreTrainedModel) else torch.float32
    return resolve_model(model, weights=True, dtype=dtype)
