"""The model that calibration, distillation and head grouping start from: nothing dropped yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from spdcompile.api import compile as compile_model
from spdcompile.compiled import CompiledModel
from spdcompile.errors import UsageError
from spdcompile.models import ModelSource
from spdcompile.plan import Plan, Router
from spdcompile.planning import choice, groups_of, make_plan
from spdcompile.runtime.local import LocalExecutor

Groups = Mapping[int, Sequence[Sequence[int]]]


def undropped(
    model: ModelSource | CompiledModel,
    tp: int,
    head_groups: Groups | None = None,
    router: str | None = None,
    plan: Plan | None = None,
) -> CompiledModel:
    """The model with every sync point, all ranks in this process, eager unless given compiled.

    Args:
        plan: brings head groups and router setting.

    Raises:
        UsageError: tp, head groups or model do not fit, or a plan comes with what it brings.
        PlanError: the plan was made for another model or tp.
    """
    if isinstance(model, CompiledModel):
        if plan is not None:
            make_plan(model.model, tp, plan, head_groups, router)
            head_groups, router = plan.head_groups, plan.router.value
        _check_fits(model, tp, head_groups)
        reads = model.plan.router if router is None else choice(Router, router, "router")
        return model.with_mask(replace(model.plan, dropped=frozenset(), router=reads))
    dtype = None if isinstance(model, PreTrainedModel) else torch.float32
    return compile_model(
        model,
        tp=tp,
        spd_mask=None if plan is None else replace(plan, dropped=frozenset()),
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


def local_executor(compiled: CompiledModel) -> LocalExecutor:
    """What runs all ranks of a compiled model in this process.

    Raises:
        UsageError: it runs one rank a process.
    """
    if not isinstance(compiled.executor, LocalExecutor):
        raise UsageError(
            "Calibration and distillation run all ranks in one process.",
            where="model",
            found="a model compiled for one rank a process",
            fix="compile it with executor='local'",
        )
    return compiled.executor
