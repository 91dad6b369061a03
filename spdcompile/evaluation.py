"""How well a compiled model predicts a text, and how far it is from the unsharded one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from spdcompile.compiled import CompiledModel
from spdcompile.errors import UsageError
from spdcompile.models import ModelSource
from spdcompile.reference import Reference
from spdcompile.runtime.data import batches_of, check_tokens, chunks_of, token_loss
from spdcompile.runtime.distributed import DistributedExecutor
from spdcompile.runtime.evaluate import Quality, compared
from spdcompile.runtime.texts import LENGTH, read_text


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a compiled model is worth on a text.

    Args:
        quality: its perplexity; KL(reference || model) in nats and the share of positions with the
            reference's likeliest token, or None without one.
        reference_perplexity: the reference's own, None without one.
        reference: what the reference is, None without one.
        chunks, length: the tokens that were scored, `length` - 1 predictions a chunk.
    """

    quality: Quality
    reference_perplexity: float | None
    reference: str | None
    chunks: int
    length: int

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON data, without nesting."""
        data = asdict(self)
        return {**data.pop("quality"), **data}


def evaluation_tokens(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int | None = None,
    count: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """A text as the GPTQ protocol cuts it: encoded as one sequence, in contiguous chunks.

    Args:
        source: as in `calibration_tokens`.
        length: tokens a chunk; 2,048 or as many as the model and the text allow if None.
        count: chunks, evenly spaced over the text; all of them if None.
        max_length: the longest input of the model.

    Returns: int64 [chunks, length].

    Raises:
        UsageError: the text is not there, is empty, not UTF-8 or too short, or the chunks are
            longer than the model's longest input.

    Source: GPTQ (arXiv 2210.17323), whose code scores WikiText-2 in chunks of 2,048 tokens.
    """
    text = read_text(source)
    available = len(tokenizer(text, verbose=False).input_ids)
    longest = LENGTH if max_length is None else max_length
    chosen = min(LENGTH, longest, available) if length is None else length
    if chosen < 2 or (length is not None and max_length is not None and length > max_length):
        raise UsageError(
            "Chunks of this length cannot be scored.",
            where=str(source),
            found=f"chunks of {chosen} tokens, a text of {available}",
            needed=f"2 to {longest} tokens, to predict one from another",
        )
    return chunks_of(text, tokenizer, length=chosen, count=count)


def evaluate(
    compiled: CompiledModel,
    tokens: Tensor,
    *,
    reference: Reference | ModelSource | CompiledModel | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Evaluation:
    """Perplexity of a compiled model, each chunk scored by itself, and what it differs in.

    Under torchrun every process calls it alike and gets the same; replicas share the batches.

    Args:
        tokens: int64 [chunks, length]; see `evaluation_tokens`.
        reference: what to compare with: the unsharded model or its directory, a compiled model,
            or "program" for this one with nothing dropped; None compares nothing.
        batch_size: chunks at a time.
        progress: whether to show a bar.

    Raises:
        UsageError: tokens or reference do not fit the model.
    """
    check_tokens(compiled.model, tokens)
    if reference is not None and not isinstance(reference, Reference):
        reference = Reference(reference, compiled)
    batches = list(batches_of(tokens, batch_size))
    with _bar(compiled, len(batches), progress) as bar:

        def sums_of(batch: Tensor) -> Tensor:
            own = compiled(batch).logits
            theirs = None if reference is None else reference.logits(batch)
            sums = _sums(own, theirs, batch)
            bar.update()
            return sums

        sums = torch.stack(compiled.over_replicas(sums_of, batches)).sum(0)
    means = _of_first_rank(compiled, sums) / tokens[:, 1:].numel()
    loss, kl, equal, other_loss = means.tolist()
    if reference is None:
        return Evaluation(Quality(math.exp(loss)), None, None, *tokens.shape)
    quality = Quality(math.exp(loss), kl, equal)
    return Evaluation(quality, math.exp(other_loss), reference.description, *tokens.shape)


def _sums(own: Tensor, theirs: Tensor | None, tokens: Tensor) -> Tensor:
    """Sums over the positions with a next token.

    Args:
        own, theirs: logits [B, S, V].
        tokens: int64 [B, S].

    Returns: float64 [4]: loss, KL(theirs || own), equal argmax, their loss; the last three 0
        without theirs.
    """
    if theirs is None:
        return torch.tensor([token_loss(own, tokens)[0], 0, 0, 0], dtype=torch.float64)
    if own.shape != theirs.shape:
        raise UsageError(
            "The reference has another vocabulary.",
            where="reference",
            found=f"logits for {theirs.shape[-1]} tokens",
            needed=f"for {own.shape[-1]}, as the model has",
        )
    theirs = theirs.to(own.device)
    loss = torch.tensor([token_loss(theirs, tokens)[0]], dtype=torch.float64)
    return torch.cat([compared(own, theirs, tokens), loss])


def _of_first_rank(compiled: CompiledModel, sums: Tensor) -> Tensor:
    """The sums of the rank that may have had the reference, on all ranks of a replica."""
    executor = compiled.executor
    if not isinstance(executor, DistributedExecutor):
        return sums
    shared = sums.to(executor.device)
    with executor.ranks.watch.call("sharing what was measured"):
        dist.broadcast(shared, group=executor.group, group_src=0)
    return shared.cpu()


@contextmanager
def _bar(compiled: CompiledModel, batches: int, progress: bool) -> Iterator[tqdm]:
    """A bar over this replica's batches; on rank 0 alone."""
    silent = not progress or (dist.is_initialized() and dist.get_rank() != 0)
    share = len(compiled.split_requests(range(batches)))
    with tqdm(total=share, desc="evaluate", unit="batch", disable=silent, leave=False) as bar:
        yield bar
