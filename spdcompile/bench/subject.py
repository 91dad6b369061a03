"""What the measurement calls: a model that one variant has made ready."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from spdcompile.compiled import CompiledModel
from spdcompile.errors import SpdCompileError


class NotMeasuredError(SpdCompileError):
    """A variant cannot be measured here; the message is the reason, in one line."""


class Subject(ABC):
    """A model that is called token by token, every rank alike."""

    @property
    def processes(self) -> list[int]:
        """The ids of processes beside this one that the model is in."""
        return []

    @abstractmethod
    def new_cache(self, text: Tensor, prompt: int) -> Any:
        """An empty cache for a text that will be given in pieces.

        Args:
            text: all its tokens, int64 [B, length].
            prompt: how many of them come first and together; the others come one by one.
        """

    @abstractmethod
    def run(self, input_ids: Tensor, cache: Any) -> Tensor:
        """The logits of the last token, [B, V]; the tokens go on where the cache ends.

        Args:
            input_ids: int64 [B, S].
        """

    def timed(self, input_ids: Tensor, cache: Any) -> tuple[Tensor, float]:
        """What `run` returns, and the seconds that it took."""
        began = time.perf_counter()
        logits = self.run(input_ids, cache)
        return logits, time.perf_counter() - began

    def fill(self, input_ids: Tensor, cache: Any) -> None:
        """Puts a context into an empty cache; this is not timed."""
        self.run(input_ids, cache)


class Compiled(Subject):
    """A model that this compiler made, called as `CompiledModel.generate` calls it."""

    def __init__(self, compiled: CompiledModel) -> None:
        self.compiled = compiled

    def new_cache(self, text: Tensor, prompt: int) -> Any:
        return self.compiled.new_cache(*text.shape)

    def run(self, input_ids: Tensor, cache: Any) -> Tensor:
        logits = self.compiled(input_ids, past_key_values=cache, logits_to_keep=1).logits
        assert logits is not None, "a compiled model returns logits"
        return logits[:, -1]
