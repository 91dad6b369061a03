"""What is measured: settings, and the steps that they ask for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor


class Kind(StrEnum):
    """What of a text is timed."""

    TTFT = "TTFT"
    """A prompt with an empty cache, up to the logits of its last token."""
    TPOT = "TPOT"
    """Each of some further tokens behind a context that the cache holds already."""


@dataclass(frozen=True, slots=True)
class Step:
    """What is timed of each variant.

    Args:
        tokens: of the prompt (TTFT), or of the context (TPOT).
        batch: sequences, B.
        new: further tokens of each; 0 for TTFT.
    """

    kind: Kind
    tokens: int
    batch: int
    new: int = 0

    @property
    def name(self) -> str:
        """Tells it from the others of a run."""
        return f"{self.kind}-{self.tokens}-{self.batch}"

    @property
    def title(self) -> str:
        """For readers."""
        what = "prompt" if self.kind is Kind.TTFT else "context"
        return f"{self.kind}, {what} of {self.tokens} tokens, batch {self.batch}"

    @property
    def length(self) -> int:
        """Most tokens of a sequence."""
        return self.tokens + self.new

    def input_ids(self, vocabulary: int) -> Tensor:
        """The tokens, the same in every process, int64 [B, length]."""
        generator = torch.Generator().manual_seed(1000 * self.tokens + self.batch)
        return torch.randint(vocabulary, (self.batch, self.length), generator=generator)


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What a run measures.

    Args:
        tp: ranks.
        dtype: of weights and activations, by torch's name.
        masks: name -> one bool a layer, True where the attention sync point is dropped.
        prompts: tokens, for TTFT at batch 1.
        contexts: tokens, for TPOT at each of `batches`.
        new_tokens: timed one by one behind each context.
        rounds: in each, every step of every variant is timed once.
        threads: of each rank.
        backend: "inductor", or "eager" for programs that are traced and not compiled.
        blocks_per_graph: each number makes variants of this compiler's with so many blocks a graph.
        only: names of variants; empty for all.
        memory: measure the peak memory of each variant in a launch of its own, too.
        timeout: seconds of a launch.
    """

    tp: int
    dtype: str = "float32"
    masks: Mapping[str, list[bool]] = field(default_factory=dict)
    prompts: tuple[int, ...] = (16, 128)
    contexts: tuple[int, ...] = (128,)
    batches: tuple[int, ...] = (1,)
    new_tokens: int = 8
    rounds: int = 20
    threads: int = 1
    backend: str = "inductor"
    blocks_per_graph: tuple[int, ...] = (1,)
    only: tuple[str, ...] = ()
    memory: bool = False
    timeout: float = 3600

    @property
    def steps(self) -> list[Step]:
        """What is timed, in the order of the tables."""
        first = [Step(Kind.TTFT, tokens, 1) for tokens in self.prompts]
        return first + [
            Step(Kind.TPOT, tokens, batch, self.new_tokens)
            for tokens in self.contexts
            for batch in self.batches
        ]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BenchSettings:
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BenchSettings:
        """From JSON data, which has lists in place of tuples."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**given)
