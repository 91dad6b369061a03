"""The public face: compile a model."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from spdcompile.compiled import CompiledModel, agree_on
from spdcompile.errors import UsageError
from spdcompile.loading import Loaded, capture_loaded, load_model
from spdcompile.models import ModelSource
from spdcompile.passes import pipeline
from spdcompile.passes.base import Program
from spdcompile.passes.vocabulary import Vocabulary
from spdcompile.plan import Plan
from spdcompile.planning import check_tp, choice, make_plan
from spdcompile.runtime import launch
from spdcompile.runtime.distributed import DistributedExecutor
from spdcompile.runtime.executor import Backend, Executor
from spdcompile.runtime.job import Ranks, chosen_timeout, join
from spdcompile.runtime.local import LocalExecutor
from spdcompile.runtime.weights import Weights


def compile(
    model: ModelSource,
    *,
    tp: int,
    spd_mask: Sequence[bool] | Plan | None = None,
    head_groups: Mapping[int, Sequence[Sequence[int]]] | None = None,
    router: str | None = None,
    executor: str | None = None,
    backend: str = "inductor",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    vocab: str | None = None,
    timeout: float | None = None,
) -> CompiledModel:
    """Splits a causal LM over `tp` tensor-parallel ranks, drops sync points and makes it callable.

    Args:
        model: a loaded model, or a local directory with config.json and safetensors, of which
            each rank reads only its own slices.
        tp: number of ranks.
        spd_mask: one bool a decoder layer, True drops its attention all-reduce (SPD, arXiv
            2502.20727); or a Plan, which may drop MLP points too; None drops nothing, and the
            result equals the model's own up to rounding.
        head_groups: layer -> tp lists of head group units; other layers split evenly, in order.
        router: what the router of a mixture of experts reads where a dropped sync point is
            pending: "exact" (default) refuses such a drop; "replicated" lets it read the part of
            the value that all ranks share, an approximation besides that of the drop.
        executor: "local" runs all ranks in this process, "distributed" is one rank of those that
            torchrun started, which may be several replicas of tp ranks; None chooses by WORLD_SIZE.
        backend: "inductor" compiles the distinct blocks, "eager" runs them operator by operator.
        device: where to run; a loaded model's own by default, else the CPU.
        dtype: of the parameters that are read from a directory, such as torch.bfloat16; that of
            its config by default, or else that of its files.
        vocab: "split" splits the token embeddings (one more all-reduce), "whole" does not; None
            splits tables of 256 MiB and more.
        timeout: seconds that ranks may wait for one before it counts as stalled and all of them
            end; loading and compiling are not counted. 120 by default; SPD_TIMEOUT overrides it.

    Raises:
        CheckpointError: a tensor is missing, extra, misshapen or not finite.
        UsageError: something in the call does not fit the model or the launch.
        RefusalError: a sync point that cannot be dropped; names it and the reason.
        CaptureError: the model cannot be captured.
        PlanError: the ranks do not run the same model, weights, plan or versions.
        RankError: a rank failed, stalled or ended.
    """
    chosen = choice(Backend, backend, "backend")
    distributed = _is_distributed(executor)
    table = choice(Vocabulary, vocab or "by size", "vocab")
    check_tp(tp)
    seconds = chosen_timeout(timeout)
    if distributed:
        launch.check_world_size(tp, launch.launched_world_size())
    where = None if device is None else torch.device(device)
    with _ranks(model, tp, where, seconds) if distributed else nullcontext() as ranks:
        loaded = load_model(model, dtype)
        plan = make_plan(loaded.model, tp, spd_mask, head_groups, router)
        return _compiled(loaded, plan, table, chosen, where or loaded.device, ranks)


def _compiled(
    loaded: Loaded,
    plan: Plan,
    table: Vocabulary,
    backend: Backend,
    device: torch.device,
    ranks: Ranks | None,
) -> CompiledModel:
    loaded, captured = capture_loaded(loaded)
    base = pipeline.advance(captured, pipeline.preserving(plan.tp, plan.head_groups, table))
    lowering = pipeline.advance(base, pipeline.changing(plan.dropped, plan.router))
    del captured
    gc.collect()  # the graph of the whole model, in which nodes point at each other
    runner = _executor(lowering.program, loaded.tensors, backend, device, ranks)
    agree_on(runner, plan, loaded.model, loaded.tensors)
    return CompiledModel(base, lowering, runner, plan, loaded.model)


def _executor(
    program: Program,
    tensors: Weights,
    backend: Backend,
    device: torch.device,
    ranks: Ranks | None,
) -> Executor:
    if ranks is None:
        return LocalExecutor(program, tensors, backend=backend, device=device)
    return DistributedExecutor(program, tensors, backend=backend, device=device, ranks=ranks)


@contextmanager
def _ranks(
    model: ModelSource, tp: int, device: torch.device | None, timeout: float
) -> Iterator[Ranks]:
    """This rank among the others, which bear with it while it loads and compiles."""
    if device is None:
        device = model.device if isinstance(model, PreTrainedModel) else torch.device("cpu")
    job = join(device, timeout)
    with job.watch.patience():
        yield job.ranks(tp, device)


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
