"""Token chunks out of a text, and the perplexity of a program on them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spdcompile.errors import UsageError
from spdcompile.runtime.executor import Executor
from spdcompile.runtime.inputs import program_inputs


def chunks_of(
    text: str, tokenizer: PreTrainedTokenizerBase, *, length: int, count: int | None = None
) -> Tensor:
    """Contiguous, non-overlapping chunks of a text, as the GPTQ protocol cuts them.

    Args:
        length: tokens a chunk.
        count: that many chunks, evenly spaced over the text; all of them if None.

    Returns: int64 [chunks, length].

    Raises:
        UsageError: the text holds fewer chunks.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    available = len(ids) // length
    wanted = available if count is None else count
    if not 0 < wanted <= available:
        raise UsageError(
            "The text is too short.",
            where="text",
            found=f"{len(ids)} tokens, {available} chunks of {length}",
            needed=f"{max(wanted, 1)} chunks",
            fix="give a longer text, or ask for fewer or shorter chunks",
        )
    chunks = ids[: available * length].view(available, length)
    chosen = torch.arange(wanted) * available // wanted
    return chunks[chosen]


def check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    """Raises UsageError unless tokens are chunks of ids that a model has an embedding for.

    Args:
        tokens: int64 [chunks, length].
    """
    _check_chunks(tokens)
    size = model.get_input_embeddings().weight.shape[0]
    outside = ((tokens < 0) | (tokens >= size)).nonzero()
    if len(outside):
        chunk, position = outside[0].tolist()
        raise UsageError(
            f"{len(outside)} tokens are outside the model's vocabulary.",
            where=f"tokens[{chunk}, {position}]",
            found=f"id {int(tokens[chunk, position])}",
            needed=f"ids from 0 to {size - 1}",
            fix="use the tokenizer that belongs to the model",
        )


def batches_of(tokens: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Batches of chunks, int64 [<= batch_size, length]."""
    _check_chunks(tokens)
    yield from tokens.split(batch_size)


def _check_chunks(tokens: Tensor) -> None:
    if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
        raise UsageError(
            "The calibration tokens do not fit.",
            where="tokens",
            found=f"{tokens.dtype} {list(tokens.shape)}",
            needed="whole numbers [chunks, length]",
        )


def token_loss(logits: Tensor, tokens: Tensor) -> tuple[float, int]:
    """Sum of the negative log-likelihoods of each chunk's tokens after its first, and their count.

    Args:
        logits: [B, S, V].
        tokens: int64 [B, S].
    """
    flat = logits[:, :-1].float().flatten(0, 1)
    targets = tokens[:, 1:].to(flat.device).flatten()
    return float(F.cross_entropy(flat, targets, reduction="sum")), targets.numel()


@torch.no_grad()
def perplexity(
    executor: Executor, tokens: Tensor, *, batch_size: int = 8, progress: str | None = None
) -> float:
    """exp of the mean negative log-likelihood per token.

    Args:
        tokens: int64 [chunks, length].
        progress: label of a progress bar; None shows none.
    """
    loss, count = 0.0, 0
    batches = list(batches_of(tokens, batch_size))
    for batch in tqdm(batches, desc=progress, disable=progress is None, leave=False):
        inputs = program_inputs(executor.program, batch.to(executor.device))
        batch_loss, batch_count = token_loss(executor.run(inputs), batch)
        loss, count = loss + batch_loss, count + batch_count
    return math.exp(loss / count)
