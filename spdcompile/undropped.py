"""The model that calibration, distillation and head grouping start from: nothing dropped yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from spdcompile.api import compile as compile_model
from spdcompile.compiled import CompiledModel
from spdcompile.errors import UsageError
from spdcompile.loading import capture_loaded, load_model
from spdcompile.models import ModelSource
from spdcompile.passes import pipeline
from spdcompile.passes.capture import decoder_layers
from spdcompile.plan import HeadGroups, Plan, Router
from spdcompile.planning import choice, groups_of, make_plan
from spdcompile.runtime.executor import Backend
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
        UsageError: it runs one rank a process, or several blocks as one.
    """
    if compiled.executor.blocks_per_graph != 1:
        raise UsageError(
            "Calibration and distillation run a model block by block.",
            where="model",
            found=f"a model compiled with blocks_per_graph={compiled.executor.blocks_per_graph}",
            fix="compile it with blocks_per_graph=1",
        )
    if not isinstance(compiled.executor, LocalExecutor):
        raise UsageError(
            "Calibration and distillation run all ranks in one process.",
            where="model",
            found="a model compiled for one rank a process",
            fix="compile it with executor='local'",
        )
    return compiled.executor


class Source:
    """A model that is captured once, and split in several ways; all ranks in this process, eager.

    Args:
        model: a loaded model, or a local directory with weights, which is read in float32.
    """

    def __init__(self, model: ModelSource) -> None:
        dtype = None if isinstance(model, PreTrainedModel) else torch.float32
        self._loaded, self._captured = capture_loaded(load_model(model, dtype))
        self.model = self._loaded.model
        self.num_layers = len(decoder_layers(self.model)[1])

    def lowering(self, tp: int, head_groups: HeadGroups) -> pipeline.Lowering:
        """The program before anything is dropped."""
        return pipeline.advance(self._captured, pipeline.preserving(tp, head_groups))

    def executor(self, lowering: pipeline.Lowering, *, on_demand: bool = False) -> LocalExecutor:
        """What runs it.

        Args:
            on_demand: whether to hold a block's parameters only while they are needed.
        """
        loaded = self._loaded
        return LocalExecutor(
            lowering.program,
            loaded.tensors,
            backend=Backend.EAGER,
            device=loaded.device,
            on_demand=on_demand,
        )
