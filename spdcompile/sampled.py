"""Text that a model writes itself, to distil on where the calibration text is short."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from spdcompile.errors import UsageError
from spdcompile.models import ModelSource, resolve_model
from spdcompile.runtime.data import check_tokens

_START = 8
_WHOLE_DISTRIBUTION = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
"""What a model's own generation settings would narrow."""


def sampled_chunks(
    model: ModelSource,
    tokens: Tensor,
    *,
    count: int,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """Chunks that a model writes, each from a few tokens of a text on.

    Drawn from the whole distribution of the next token, the end of a text excepted, so that every
    chunk is as long as those given. What distillation learns are the original's answers; so text
    that the original writes serves as well, and a short text is learnt by heart.

    Args:
        model: a loaded model, or a local directory with weights, which is loaded in float32.
        tokens: chunks of a text, int64 [chunks, length].
        count: chunks to write.
        seed: for the beginnings and what is drawn; torch's own random state stays as it is.
        batch_size: chunks at a time.
        progress: whether to show a progress bar.

    Returns: int64 [count, length].

    Raises:
        UsageError: the chunks do not fit the model or are too short to begin with, or the model
            cannot be read.
    """
    dtype = None if isinstance(model, PreTrainedModel) else torch.float32
    writer = resolve_model(model, weights=True, dtype=dtype)
    check_tokens(writer, tokens)
    new = _new_tokens(count, tokens.shape[1])
    settings = GenerationConfig(
        **_WHOLE_DISTRIBUTION,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=0,  # nothing is padded: all chunks end at once
    )
    generator = torch.Generator().manual_seed(seed)
    written: list[Tensor] = []
    with (
        torch.random.fork_rng(),
        torch.no_grad(),
        tqdm(total=count, desc="sample text", unit="chunk", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        for begun in range(0, count, batch_size):
            starts = _starts(tokens, min(batch_size, count - begun), generator).to(writer.device)
            mask = torch.ones_like(starts)
            chunks = writer.generate(starts, attention_mask=mask, generation_config=settings)
            written.append(chunks.cpu())
            bar.update(len(starts))
    return torch.cat(written)


def _new_tokens(count: int, length: int) -> int:
    """How many tokens of each chunk are written."""
    if count < 1:
        raise UsageError("No text is to be written.", where="count", found=str(count), needed="1")
    if length <= _START:
        raise UsageError(
            "The chunks are too short to write others like them.",
            where="tokens",
            found=f"chunks of {length} tokens",
            needed=f"more than {_START} tokens",
        )
    return length - _START


def _starts(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The first tokens of new chunks, int64 [count, _START], from anywhere in a text."""
    text = tokens.flatten()
    places = torch.randint(len(text) - _START + 1, (count, 1), generator=generator)
    return text[places + torch.arange(_START)]
