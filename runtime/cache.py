"""What attention remembers of a batch of sequences: a tensor for each cache of a program."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import Cache

from spdcompile.errors import UsageError
from spdcompile.passes.base import CacheSpec, Program


class KVCache(Cache):
    """Keys and values of a batch, allocated once; a program's calls write into it.

    A rank has its own K/V heads only. Where attention sees no further back than a window or a
    chunk, no more tokens than that are kept; of MLA, the latents.

    Args:
        batch: number of sequences, B.
        max_length: most tokens of a sequence, padding included.
        tp: ranks whose caches are stacked in front, [tp, B, ...]; None for this rank's alone.
    """

    is_compileable = False  # for transformers, which would compile the model itself

    def __init__(
        self,
        program: Program,
        *,
        batch: int,
        max_length: int,
        device: torch.device,
        tp: int | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.program, self.batch, self.max_length = program, batch, max_length
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.longest = 0
        self._stacked = tp is not None
        self.tensors: dict[str, dict[str, Tensor]] = {
            part.name: {
                name: torch.zeros(self._shape(spec, tp), dtype=spec.dtype, device=device)
                for name, spec in part.caches.items()
            }
            for part in program.parts
        }

    def _shape(self, spec: CacheSpec, tp: int | None) -> list[int]:
        shape = [size or self.batch for size in spec.shape]
        shape[spec.dim] = min(spec.span or self.max_length, self.max_length)
        return [tp, *shape] if tp is not None and spec.per_rank else shape

    @property
    def num_bytes(self) -> int:
        """Memory of all caches of this process."""
        return sum(
            tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values()
        )

    def set_lengths(self, lengths: Tensor) -> None:
        """Says how many tokens each sequence has; what was written behind them is overwritten.

        After a prompt that is padded on the right, whose sequences go on at their own ends.

        Args:
            lengths: int64 [B].

        Raises:
            UsageError: a length that was not written, or lengths that differ where the model
                numbers its tokens by column.
        """
        if tuple(lengths.shape) != (self.batch,) or not bool((lengths <= self.lengths).all()):
            raise UsageError(
                "The lengths do not fit.",
                where="lengths",
                found=str(lengths.tolist()),
                needed=f"int64 [{self.batch}], each at most {self.lengths.tolist()}",
            )
        if self.program.one_start and len(set(lengths.tolist())) > 1:
            raise UsageError(
                "The sequences cannot be of different lengths.",
                where="lengths",
                found=str(lengths.tolist()),
                needed="one length: this model numbers its tokens by their columns",
                fix="pad the prompts on the left",
            )
        shortest = min((spec.span for spec in self._specs() if spec.span), default=0)
        if shortest and bool((lengths < self.lengths).any()) and self.longest > shortest:
            raise UsageError(
                "Tokens cannot be taken back.",
                where="lengths",
                found=f"{self.longest} tokens in a cache that keeps the last {shortest}",
                needed=f"at most {shortest} tokens so far: what they drove out is gone",
            )
        self.lengths = lengths.to(self.lengths)
        self.longest = int(self.lengths.max())

    def advance(self, num_new: int) -> None:
        """After a call that wrote `num_new` tokens to every sequence."""
        self.lengths = self.lengths + num_new
        self.longest += num_new

    def check(self, program: Program, batch: int, num_new: int) -> None:
        """Raises UsageError unless `num_new` further tokens of `batch` sequences fit."""
        fault = None
        if self.program is not program:
            fault = "a cache of another model or plan", "one from this model's new_cache"
        elif batch != self.batch:
            fault = f"{batch} sequences", f"{self.batch}, as the cache was made for"
        elif self.longest + num_new > self.max_length:
            fault = (
                f"{self.longest} tokens before and {num_new} new ones",
                (f"at most {self.max_length} tokens: make it with a larger max_length"),
            )
        if fault is not None:
            found, needed = fault
            raise UsageError(
                "The KV cache does not fit.", where="past_key_values", found=found, needed=needed
            )

    # ---- what transformers' generate() asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens of the longest sequence so far."""
        return self.longest

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The most tokens that fit."""
        return self.max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what sequence beam_idx[b] was, int64 [B]."""
        for part in self.program.parts:
            for name, spec in part.caches.items():
                tensor = self.tensors[part.name][name]
                dim = int(self._stacked and spec.per_rank)
                tensor.copy_(tensor.index_select(dim, beam_idx.to(tensor.device)))
        self.lengths = self.lengths[beam_idx.to(self.lengths.device)]

    def crop(self, max_length: int) -> None:
        """Forgets what lies behind a length, or, below 0, so many of the last tokens."""
        length = self.longest + max_length if max_length < 0 else max_length
        self.set_lengths(self.lengths.clamp(max=length))

    def reset(self) -> None:
        """Forgets everything."""
        self.lengths = torch.zeros_like(self.lengths)
        self.longest = 0

    def _specs(self) -> list[CacheSpec]:
        return [spec for part in self.program.parts for spec in part.caches.values()]

    def of(self, part: str) -> Mapping[str, Tensor]:
        """The caches of one part, by placeholder."""
        return self.tensors[part]
