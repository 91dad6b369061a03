"""What the measurement calls: a model that one variant has made ready."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from spdcompile.compiled import CompiledModel
from spdcompile.errors import SpdCompileError


class NotMeasuredError(SpdCompileError):
    """A variant cannot be measured here; the message is the reason, in one line."""


class Subject(ABC):
    """A model that is called token by token, every rank alike."""

    @abstractmethod
    def new_cache(self, batch: int, length: int) -> Any:
        """An empty cache.

        Args:
            batch: sequences, B.
            length: most tokens of a sequence.
        """

    @abstractmethod
    def run(self, input_ids: Tensor, cache: Any) -> Tensor:
        """The logits of the last token, [B, V]; the tokens go on where the cache ends.

        Args:
            input_ids: int64 [B, S].
        """

    def fill(self, input_ids: Tensor, cache: Any) -> None:
        """Puts a context into an empty cache; this is not timed."""
        self.run(input_ids, cache)


class Compiled(Subject):
    """A model that this compiler made, called as `CompiledModel.generate` calls it."""

    def __init__(self, compiled: CompiledModel) -> None:
        self.compiled = compiled

    def new_cache(self, batch: int, length: int) -> Any:
        return self.compiled.new_cache(batch, length)

    def run(self, input_ids: Tensor, cache: Any) -> Tensor:
        logits = self.compiled(input_ids, past_key_values=cache, logits_to_keep=1).logits
        assert logits is not None, "a compiled model returns logits"
        return logits[:, -1]
