"""Text from a compiled model, by transformers' own generation code.

The model that generates is of the original's class, so that whatever this class does its own way
when it generates stays so; only its forward pass and its cache are those of the compiled model.
"""

from __future__ import annotations

import copy
import logging
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from spdcompile.errors import UsageError
from spdcompile.passes.base import Positions
from spdcompile.runtime.cache import KVCache
from spdcompile.runtime.distributed import DistributedExecutor
from spdcompile.runtime.launch import agree, same_random_state

if TYPE_CHECKING:
    from spdcompile.compiled import CompiledModel

_LOG = logging.getLogger(__name__)
# What generate() passes on and a program has no use for, unless it asks for something.
_IGNORED = {
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "tokenizer"),
    *("is_first_iteration", "next_sequence_length"),
}


@cache
def _tell(reason: str) -> None:
    """Once a reason, not once a call."""
    _LOG.warning("Without a KV cache, all tokens are computed at each step: %s", reason)


def generate(compiled: CompiledModel, input_ids: Tensor, **settings: Any) -> Any:
    """What `transformers.GenerationMixin.generate` returns for the compiled model.

    Args:
        input_ids: int64 [B, S].
        settings: those of `generate`. On ranks other than 0, a streamer is left out.
    """
    model = _generating(compiled)
    executor = compiled.executor
    if not isinstance(executor, DistributedExecutor):
        return model.generate(input_ids.to(executor.device), **settings)
    if dist.get_rank(executor.group) != 0:
        settings.pop("streamer", None)
    watch = executor.ranks.watch
    with ExitStack() as stack:
        with watch.call("sharing the random state"):
            stack.enter_context(same_random_state(executor.group, executor.device))
        out = model.generate(input_ids.to(executor.device), **settings)
    tokens = out if isinstance(out, Tensor) else out.sequences
    with watch.call("comparing the generated tokens"):
        agree(executor.group, {"generated tokens": str(tokens.tolist())})
    return out


def _generating(compiled: CompiledModel) -> PreTrainedModel:
    """A model that shares everything with the original but what it computes."""
    original = compiled.model
    made = object.__new__(
        type(f"Compiled{type(original).__name__}", (_Compiled, type(original)), {})
    )
    made.__dict__.update(original.__dict__)
    made.__dict__["compiled"] = compiled
    made.__dict__["generation_config"] = copy.deepcopy(original.generation_config)
    return made


class _Compiled:
    """What a generating model overrides; mixed in before the class of the original."""

    compiled: Any  # a CompiledModel; transformers evaluates the annotations of its models

    @property
    def device(self) -> torch.device:
        return self.compiled.executor.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        logits_to_keep: int = 0,
        **settings: Any,
    ) -> CausalLMOutputWithPast:
        asked = {name: value for name, value in settings.items() if value is not None}
        unknown = sorted(name for name in asked if name not in _IGNORED)
        unknown += sorted(
            name for name in asked.keys() & _IGNORED if name.startswith("output_") and asked[name]
        )
        if unknown:
            raise UsageError(
                "A compiled model returns logits alone.",
                where="generate",
                found=", ".join(unknown),
                needed="settings of the generation, not of the model",
            )
        before = 0 if past_key_values is None else past_key_values.longest
        total = None if attention_mask is None else attention_mask.shape[1]
        if 0 < before < input_ids.shape[1] == total:  # of a model that knows of no cache
            input_ids = input_ids[:, before:]
            position_ids = None if position_ids is None else position_ids[:, before:]
        if self.compiled.program.positions in (None, Positions.FROM_IDS):
            position_ids = None  # the model numbers its tokens itself
        return self.compiled(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Allocates the cache, or does without one where the model cannot have it."""
        if model_kwargs.get("past_key_values") is not None or not generation_config.use_cache:
            return
        if reason := self.compiled.cache_refusal:
            _tell(reason)
            generation_config.use_cache = model_kwargs["use_cache"] = False
            return
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs["past_key_values"] = self.compiled.new_cache(
            batch_size * copies, max_cache_length + 1
        )
