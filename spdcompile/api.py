"""The public face: compile a model, and call what comes out as the model itself is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import cached_property
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from spdcompile.errors import PlanError, UsageError
from spdcompile.generation import generate
from spdcompile.models import ModelSource, resolve_model
from spdcompile.passes import pipeline
from spdcompile.passes.base import Program
from spdcompile.passes.capture import decoder_layers
from spdcompile.passes.tokens import SUBJECT as CACHE
from spdcompile.plan import HeadGroups, Plan, Router, attention_points
from spdcompile.report import Report, build_report
from spdcompile.runtime import launch
from spdcompile.runtime.cache import KVCache
from spdcompile.runtime.distributed import DistributedExecutor
from spdcompile.runtime.executor import Backend, Executor
from spdcompile.runtime.inputs import program_inputs
from spdcompile.runtime.local import LocalExecutor
from spdcompile.runtime.weights import checkpoint_tensors

_Kind = TypeVar("_Kind", bound=Enum)


class CompiledModel:
    """A model split over ranks; called as the Hugging Face model is.

    Args:
        base: the program before anything was dropped.
        lowering: the program that runs, and how it came about.
        executor: what runs it.
        plan: what was dropped.
        model: the model that was compiled.
    """

    def __init__(
        self,
        base: pipeline.Lowering,
        lowering: pipeline.Lowering,
        executor: Executor,
        plan: Plan,
        model: PreTrainedModel,
    ) -> None:
        self.base, self.lowering, self.executor = base, lowering, executor
        self.plan, self.model, self.config = plan, model, model.config

    def with_mask(self, spd_mask: Sequence[bool] | Plan | None) -> CompiledModel:
        """The same model with other sync points dropped; weights and compiled blocks are shared.

        Args:
            spd_mask: as in `compile`; a Plan must have this model's tp and head groups, and
                brings its own router setting.

        Raises:
            UsageError, PlanError: the mask or plan does not fit.
            RefusalError: a sync point that cannot be dropped.
        """
        given = spd_mask if isinstance(spd_mask, Plan) else None
        plan = make_plan(self.model, self.plan.tp, spd_mask)
        if given is None:
            own = self.plan
            plan = replace(plan, head_groups=own.head_groups, router=own.router)
        elif given.head_groups != self.plan.head_groups:
            raise PlanError(
                "The plan has other head groups, so its shards are others.",
                where="with_mask",
                needed="the head groups that the model was compiled with",
                fix="compile the model anew with this plan",
            )
        _agree_on(self.executor, plan, self.model)
        lowering = pipeline.advance(self.base, pipeline.changing(plan.dropped, plan.router))
        executor = self.executor.with_program(lowering.program)
        return CompiledModel(self.base, lowering, executor, plan, self.model)

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        past_key_values: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """The logits of every position.

        Args:
            input_ids: int64 [B, S].
            attention_mask: nonzero where a token is real, [B, S], or with a cache [B, T], over the
                T tokens before and new; all of them if None.
            position_ids: int64 [B, S]; numbered as the model itself does if None.
            past_key_values: from `new_cache`; the tokens go on where it ends, and are added to it.
            logits_to_keep: compute the logits of so many last positions alone; 0 for all.

        Returns: an output whose `.logits` is [B, S, V], in the model's dtype.

        Raises:
            UsageError: a tensor of another shape or kind, or a cache that is full.
        """
        cache = past_key_values
        executor = self.executor if cache is None else self._remembering
        inputs = program_inputs(executor.program, input_ids, attention_mask, position_ids, cache)
        on_device = {name: tensor.to(executor.device) for name, tensor in inputs.items()}
        logits = executor.run(on_device, cache, logits_to_keep)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def generate(self, input_ids: Tensor, **settings: Any) -> Any:
        """Text, by transformers' own generation code.

        Args:
            input_ids: int64 [B, S], the prompts.
            settings: those of `transformers.GenerationMixin.generate`: attention_mask,
                max_new_tokens, do_sample, num_beams, streamer, stop_strings and so on.

        Returns: int64 [B, S + new], or what `return_dict_in_generate` asks for. Every rank gets
            the same: they draw from the random state of rank 0.
        """
        return generate(self, input_ids, **settings)

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty KV cache for `past_key_values`.

        Args:
            batch: number of sequences.
            max_length: the most tokens of a sequence, padding included.

        Raises:
            RefusalError: the model cannot run on new tokens alone; see `cache_refusal`.
        """
        return self._remembering.new_cache(batch, max_length)

    @property
    def cache_refusal(self) -> str:
        """Why the model has no KV cache; "" if it has one."""
        refusals = [r.reason for r in self.base.program.refusals if r.subject == CACHE]
        return refusals[0] if refusals else ""

    @cached_property
    def _remembering(self) -> Executor:
        """Runs the same program on new tokens alone."""
        lowering = pipeline.advance(self.lowering, pipeline.remembering())
        return self.executor.with_program(lowering.program)

    def with_weights(self, tensors: Mapping[str, Tensor]) -> CompiledModel:
        """The same program over other weights, such as distillation gives.

        Args:
            tensors: new global tensors under their state_dict names; the others stay.
        """
        everything = {**checkpoint_tensors(self.model), **tensors}
        executor = self.executor.with_tensors(everything)
        return CompiledModel(self.base, self.lowering, executor, self.plan, self.model)

    @property
    def program(self) -> Program:
        """The program that runs."""
        return self.lowering.program

    @cached_property
    def report(self) -> Report:
        """What was split, synced, dropped and refused, and why."""
        return build_report(self.lowering)


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
) -> CompiledModel:
    """Splits a causal LM over `tp` tensor-parallel ranks, drops sync points and makes it callable.

    Args:
        model: a loaded model, or a local directory with config.json and safetensors.
        tp: number of ranks.
        spd_mask: one bool a decoder layer, True drops its attention all-reduce (SPD, arXiv
            2502.20727); or a Plan, which may drop MLP points too; None drops nothing, and the
            result equals the model's own up to rounding.
        head_groups: layer -> tp lists of head group units; other layers split evenly, in order.
        router: what the router of a mixture of experts reads where a dropped sync point is
            pending: "exact" (default) refuses such a drop; "replicated" lets it read the part of
            the value that all ranks share, an approximation besides that of the drop.
        executor: "local" runs all ranks in this process, "distributed" is one rank of the process
            group that torchrun started; None chooses by WORLD_SIZE.
        backend: "inductor" compiles the distinct blocks, "eager" runs them operator by operator.
        device: where to run; the model's own by default.

    Raises:
        UsageError: something in the call does not fit the model or the launch.
        RefusalError: a sync point that cannot be dropped; names it and the reason.
        CaptureError: the model cannot be captured.
    """
    chosen = choice(Backend, backend, "backend")
    distributed = _is_distributed(executor)
    check_tp(tp)
    if distributed:
        launch.check_world_size(tp, launch.launched_world_size())
    loaded = resolve_model(model, weights=True)
    tensors = checkpoint_tensors(loaded)
    plan = make_plan(loaded, tp, spd_mask, head_groups, router)
    base = pipeline.advance(pipeline.start(loaded), pipeline.preserving(plan.tp, plan.head_groups))
    lowering = pipeline.advance(base, pipeline.changing(plan.dropped, plan.router))
    where = torch.device(device) if device is not None else loaded.device
    if distributed:
        group = launch.process_group(where)
        runner: Executor = DistributedExecutor(
            lowering.program, tensors, backend=chosen, device=where, group=group
        )
        _agree_on(runner, plan, loaded)
    else:
        runner = LocalExecutor(lowering.program, tensors, backend=chosen, device=where)
    return CompiledModel(base, lowering, runner, plan, loaded)


def make_plan(
    model: PreTrainedModel,
    tp: int,
    spd_mask: Sequence[bool] | Plan | None,
    head_groups: Mapping[int, Sequence[Sequence[int]]] | None = None,
    router: str | None = None,
) -> Plan:
    """The plan that a call to `compile` describes.

    Raises:
        UsageError: the mask does not fit the model, or there is no such router setting.
        PlanError: the plan was made for another tp or model.
        CaptureError: the model has no list of decoder layers.
    """
    num_layers = len(decoder_layers(model)[1])  # which not every config has under that name
    if not isinstance(spd_mask, Plan):
        points = attention_points(spd_mask, num_layers)
        reads = Router.EXACT if router is None else choice(Router, router, "router")
        return Plan(tp, num_layers, points, groups_of(head_groups or {}), router=reads)
    if head_groups is not None:
        raise UsageError("A Plan brings its own head groups.", where="head_groups")
    if router is not None:
        raise UsageError("A Plan brings its own router setting.", where="router")
    if (spd_mask.tp, spd_mask.num_layers) != (tp, num_layers):
        raise PlanError(
            "The plan was made for something else.",
            found=f"a plan for tp={spd_mask.tp} and {spd_mask.num_layers} layers",
            needed=f"tp={tp} and {num_layers} layers",
        )
    return spd_mask


def groups_of(head_groups: Mapping[int, Sequence[Sequence[int]]]) -> HeadGroups:
    """Head groups as a plan holds them: the units of each rank in ascending order."""
    return {
        layer: tuple(tuple(sorted(units)) for units in ranks)
        for layer, ranks in head_groups.items()
    }


def check_tp(tp: int) -> None:
    """Raises UsageError unless tp is a whole number of at least 1."""
    if not isinstance(tp, int) or isinstance(tp, bool) or tp < 1:
        raise UsageError(f"tp={tp!r} is no number of ranks.", where="tp", needed="an int >= 1")


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


def choice(kind: type[_Kind], value: str, where: str) -> _Kind:
    """The member of an enum that a setting names; raises UsageError if there is none."""
    names = [member.value for member in kind]
    if value not in names:
        raise UsageError(
            f"There is no {where} {value!r}.", where=where, needed=" or ".join(map(repr, names))
        )
    return kind(value)


def _agree_on(executor: Executor, plan: Plan, model: PreTrainedModel) -> None:
    """Ranks compare what they are about to run; one process has nothing to compare."""
    if isinstance(executor, DistributedExecutor):
        facts = {
            "plan": plan.content_hash,
            "dtype": str(model.dtype),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "config": model.config.to_json_string(),
        }
        launch.agree(executor.group, facts)
