"""A compiled model: called, generating and reported on as the model itself is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from spdcompile.errors import PlanError, RefusalError
from spdcompile.generation import generate
from spdcompile.passes import pipeline
from spdcompile.passes.base import Program
from spdcompile.passes.tokens import SUBJECT as CACHE
from spdcompile.plan import Plan
from spdcompile.planning import make_plan
from spdcompile.report import Report, build_report
from spdcompile.runtime import launch
from spdcompile.runtime.cache import KVCache
from spdcompile.runtime.distributed import DistributedExecutor
from spdcompile.runtime.executor import Executor
from spdcompile.runtime.fingerprint import fingerprint
from spdcompile.runtime.inputs import program_inputs
from spdcompile.runtime.weights import Weights

_Request = TypeVar("_Request")
_Result = TypeVar("_Result")


class CompiledModel:
    """A model split over ranks; called as the Hugging Face model is.

    Args:
        base: the program before anything was dropped.
        lowering: the program that runs, and how it came about.
        executor: what runs it.
        plan: what was dropped.
        model: the model that was compiled; on the meta device where ranks read their weights
            from files.
        directory: where it was read from, if it was.
    """

    def __init__(
        self,
        base: pipeline.Lowering,
        lowering: pipeline.Lowering,
        executor: Executor,
        plan: Plan,
        model: PreTrainedModel,
        directory: Path | None = None,
    ) -> None:
        self.base, self.lowering, self.executor = base, lowering, executor
        self.plan, self.model, self.config = plan, model, model.config
        self.directory = directory
        self.weights_replaced = False

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
        agree_on(self.executor, plan, self.model)
        with _patience(self.executor):
            lowering = pipeline.advance(self.base, pipeline.changing(plan.dropped, plan.router))
            executor = self.executor.with_program(lowering.program)
        return CompiledModel(self.base, lowering, executor, plan, self.model, self.directory)

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

    @cached_property
    def cache_refusal(self) -> str:
        """Why the model has no KV cache; "" if it has one."""
        for refusal in self.program.refusals:
            if refusal.subject == CACHE:
                return refusal.reason
        try:
            self.remembering_program  # noqa: B018  (made here, or refused)
        except RefusalError as why:
            return why.reason
        return ""

    @cached_property
    def _remembering(self) -> Executor:
        """Runs the same program on new tokens alone."""
        with _patience(self.executor):
            return self.executor.with_program(self.remembering_program)

    @cached_property
    def remembering_program(self) -> Program:
        """The program that runs on new tokens alone.

        Raises:
            RefusalError: there is none; see `cache_refusal`.
        """
        return pipeline.advance(self.lowering, pipeline.remembering()).program

    def with_weights(self, tensors: Mapping[str, Tensor]) -> CompiledModel:
        """The same program over other weights, such as distillation gives.

        Args:
            tensors: new global tensors under their state_dict names; the others stay.
        """
        agree_on(self.executor, self.plan, self.model, tensors)
        other = copy.copy(self)
        other.__dict__.pop("_remembering", None)
        other.executor = self.executor.with_tensors(tensors)
        other.weights_replaced = True
        return other

    def save(self, directory: str | Path, *, weights: str = "reference") -> None:
        """Writes an artefact that `spdcompile.load` starts from; see `artefact.save`."""
        # Not above: that module restores what this class is.
        from spdcompile.artefact import save

        save(self, directory, weights=weights)

    def export_hf(self, directory: str | Path) -> None:
        """Writes a Hugging Face checkpoint of the weights in use, and `spd_plan.json`.

        Under torchrun, rank 0 writes. See `spdcompile.export_hf`.
        """
        # Not above: it takes what this class is made of apart.
        from spdcompile.export import export_hf

        executor = self.executor
        if isinstance(executor, DistributedExecutor) and torch.distributed.get_rank() != 0:
            return
        replaced = executor.tensors.items() if self.weights_replaced else ()
        known = self.model.state_dict()
        new = {name: x for name, x in replaced if isinstance(x, Tensor) and name in known}
        export_hf(self.directory or self.model, directory, plan=self.plan, tensors=new)

    @property
    def num_replicas(self) -> int:
        """How many copies of the model run side by side: WORLD_SIZE / tp."""
        executor = self.executor
        return executor.ranks.num_replicas if isinstance(executor, DistributedExecutor) else 1

    @property
    def replica(self) -> int:
        """Which of the copies this process is part of."""
        executor = self.executor
        return executor.ranks.replica if isinstance(executor, DistributedExecutor) else 0

    def split_requests(self, requests: Sequence[_Request]) -> Sequence[_Request]:
        """This replica's share of requests that every process has: each num_replicas-th."""
        return requests[self.replica :: self.num_replicas]

    def over_replicas(
        self, run: Callable[[_Request], _Result], requests: Sequence[_Request]
    ) -> list[_Result]:
        """Runs each request on one replica; all processes must call it alike.

        Args:
            run: called with one request at a time, alike on all ranks of a replica.
            requests: the same ones in every process.

        Returns: in every process, the result of each request, in order.
        """
        results = [run(request) for request in self.split_requests(requests)]
        if isinstance(self.executor, DistributedExecutor):
            results = self.executor.ranks.joined(results, len(requests))
        return results

    @property
    def program(self) -> Program:
        """The program that runs."""
        return self.lowering.program

    @cached_property
    def report(self) -> Report:
        """What was split, synced, dropped and refused, and why."""
        return build_report(self.lowering)


def agree_on(
    executor: Executor,
    plan: Plan,
    model: PreTrainedModel,
    tensors: Weights | None = None,
) -> None:
    """Ranks compare what they are about to run; one process has nothing to compare.

    Args:
        tensors: the global weights, if the ranks do not share them already.
    """
    if isinstance(executor, DistributedExecutor):
        facts = {
            "plan": plan.content_hash,
            "vocab": f"split: {sorted(executor.program.parts[0].shards)}",
            "dtype": str(model.dtype),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "config": model.config.to_json_string(),
            "blocks per graph": str(executor.blocks_per_graph),
        }
        ranks = executor.ranks
        with ranks.watch.call("comparing plan and weights"):
            if tensors is not None:
                facts["weights"] = fingerprint(tensors)
                if ranks.num_replicas > 1:
                    launch.agree(ranks.across, facts)
            launch.agree(ranks.group, facts)


@contextmanager
def _patience(executor: Executor) -> Iterator[None]:
    """The other ranks bear with this one while it compiles."""
    if not isinstance(executor, DistributedExecutor):
        yield
        return
    with executor.ranks.watch.patience():
        yield
