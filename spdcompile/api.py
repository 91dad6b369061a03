"""The public face: compile a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from spdcompile.compiled import CompiledModel, agree_on
from spdcompile.loading import load_model, lower_loaded
from spdcompile.log import Component, get_logger
from spdcompile.models import ModelSource
from spdcompile.passes.vocabulary import Vocabulary
from spdcompile.plan import PLAN_FILE, Plan
from spdcompile.planning import check_tp, choice, make_plan
from spdcompile.running import Running

_LOG = get_logger(Component.RUNTIME)


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
    transport: str = "auto",
    blocks_per_graph: int = 1,
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
        router: what a router of experts reads where a dropped sync point is pending: "exact"
            (default) refuses that; "replicated" reads what all ranks share, one more approximation.
        executor: "local" runs all ranks in this process, "distributed" is one rank of those that
            torchrun started, which may be several replicas of tp ranks; None chooses by WORLD_SIZE.
        backend: "inductor" compiles the distinct blocks, "eager" runs them operator by operator.
        device: where to run; a loaded model's own by default, else the CPU.
        dtype: of parameters read from a directory; that of its config, or its files, by default.
        vocab: "split" (one more all-reduce) or "whole" token embeddings; None goes by 256 MiB.
        timeout: seconds that ranks may wait for one before all of them end, without loading and
            compiling. 120 by default; SPD_TIMEOUT overrides it.
        transport: between ranks: "shared-memory" (one host, CPU), "sockets" (CPU), "process-group"
            (gloo, NCCL), or "auto", which takes the first of them that it can.
        blocks_per_graph: how many consecutive blocks are compiled as one: a slower first start,
            faster steps. Equal runs are compiled once: best is one that divides the blocks.

    Raises:
        CheckpointError: a tensor is missing, extra, misshapen or not finite.
        UsageError: something in the call does not fit the model or the launch.
        RefusalError: a sync point that cannot be dropped; names it and the reason.
        CaptureError: the model cannot be captured.
        PlanError: the ranks do not run the same model, weights, plan or versions.
        RankError: a rank failed, stalled or ended.
    """
    check_tp(tp)
    table = Vocabulary.BY_SIZE if vocab is None else choice(Vocabulary, vocab, "vocab")
    how = Running(tp, executor, backend, device, timeout, transport, blocks_per_graph)
    with how.among_ranks(model) as running:
        loaded = load_model(model, dtype)
        _mention_plan(loaded.directory, spd_mask)
        plan = make_plan(loaded.model, tp, spd_mask, head_groups, router)
        loaded, base, lowering = lower_loaded(loaded, plan, table)
        runner = running.executor(lowering.program, loaded.tensors, loaded.device)
        agree_on(runner, plan, loaded.model, loaded.tensors)
        return CompiledModel(base, lowering, runner, plan, loaded.model, loaded.directory)


def _mention_plan(directory: Path | None, spd_mask: Sequence[bool] | Plan | None) -> None:
    """Weights that were distilled for a plan are other ones than the model's first."""
    if spd_mask is None and directory is not None and (directory / PLAN_FILE).exists():
        _LOG.warning("%s holds a plan, which is not applied: no spd_mask", directory)
