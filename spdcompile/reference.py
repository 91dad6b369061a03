"""What a compiled model is compared with: the unsharded one, or the program that drops nothing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from spdcompile.compiled import CompiledModel
from spdcompile.models import ModelSource, resolve_model
from spdcompile.runtime.distributed import DistributedExecutor

PROGRAM = "program"


class Reference:
    """What a compiled model is compared with.

    Args:
        source: a loaded model, or the directory of one, that transformers runs in one process; a
            compiled model; or "program", the compiled model itself with nothing dropped. Of the
            processes of a replica, the first alone loads and runs a model of transformers'.
        compiled: the model that is compared.

    Raises:
        UsageError, CheckpointError: the directory holds no such model.
    """

    def __init__(self, source: ModelSource | CompiledModel, compiled: CompiledModel) -> None:
        self.description = _describe(source)
        self.model: PreTrainedModel | CompiledModel | None = None
        executor = compiled.executor
        ranks = executor.ranks if isinstance(executor, DistributedExecutor) else None
        self._patience = ranks.watch.patience if ranks else nullcontext
        if source == PROGRAM:
            nothing = replace(compiled.plan, dropped=frozenset())
            self.model = compiled.with_mask(nothing)
        elif isinstance(source, CompiledModel):
            self.model = source
        elif ranks is None or dist.get_rank(ranks.group) == 0:
            with self._patience():
                self.model = _load(source, compiled)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor | None:
        """The logits of every position, [B, S, V]; None where another process has the model.

        Args:
            tokens: int64 [B, S].
        """
        if self.model is None:
            return None
        if isinstance(self.model, CompiledModel):
            return self.model(tokens).logits
        with self._patience():
            return self.model(tokens.to(self.model.device)).logits


def _load(source: ModelSource, compiled: CompiledModel) -> PreTrainedModel:
    """A model in the dtype and on the device of the compiled one; a loaded one as it is."""
    if isinstance(source, PreTrainedModel):
        return resolve_model(source, weights=True)
    model = resolve_model(source, weights=True, dtype=compiled.model.dtype)
    return model.to(compiled.executor.device)


def _describe(source: ModelSource | CompiledModel) -> str:
    if source == PROGRAM:
        return "this program with nothing dropped"
    if isinstance(source, CompiledModel):
        return f"{type(source.model).__name__}, compiled, {len(source.plan.dropped)} points dropped"
    if isinstance(source, str | Path):
        return f"{source}, unsharded, run by transformers"
    return f"{type(source).__name__}, unsharded, run by transformers"
