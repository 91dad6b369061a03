"""A program's inputs, completed as the model itself completes them."""

from __future__ import annotations

import torch
from torch import Tensor

from spdcompile.errors import UsageError
from spdcompile.passes.base import Positions, Program
from spdcompile.passes.columns import START
from spdcompile.runtime.cache import KVCache


def program_inputs(
    program: Program,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: KVCache | None = None,
) -> dict[str, Tensor]:
    """A program's inputs by name, those that are absent filled in as the model itself would.

    Args:
        input_ids: int64 [B, S].
        attention_mask: [B, S], or [B, T] with a cache, over the tokens before and the new ones.
        position_ids: int64 [B, S].
        cache: what is remembered of the tokens before, for a program that remembers.

    Raises:
        UsageError: a tensor of another shape or kind, or of a length that the program or
            cache does not take.
    """
    _check_ids("input_ids", input_ids, None)
    batch, num_new = input_ids.shape
    before = 0 if cache is None else cache.longest
    if cache is not None:
        cache.check(program, batch, num_new)
    _check_length(program, before + num_new)
    total = (batch, before + num_new)
    mask = input_ids.new_ones(total) if attention_mask is None else attention_mask
    _check_ids("attention_mask", mask, total)
    mask = mask.to(torch.long)
    if position_ids is not None and program.positions is Positions.FROM_IDS:
        raise UsageError(
            "The model numbers its tokens itself.",
            where="position_ids",
            found="position ids",
            needed="none: its program counts the ids that are no padding",
        )
    start = None if cache is None else cache.lengths.to(input_ids.device)
    if position_ids is None:
        position_ids = _positions(program, input_ids, mask, start)
    _check_ids("position_ids", position_ids, (batch, num_new))
    values = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
    values = {name: value.contiguous() for name, value in values.items()}
    return values if start is None else {**values, START: start}


def _check_length(program: Program, length: int) -> None:
    shortest, longest = program.min_length, program.max_length
    if length < shortest:
        raise UsageError(
            "The input is too short.",
            where="input_ids",
            found=f"{length} tokens",
            needed=f"at least {shortest}, below which the captured graph does not hold",
            fix="pad it on the left, with 0 in the attention mask",
        )
    if longest is not None and length > longest:
        raise UsageError(
            "The input is too long.",
            where="input_ids",
            found=f"{length} tokens",
            needed=f"at most {longest}, beyond which the model takes another path",
        )


def _positions(program: Program, input_ids: Tensor, mask: Tensor, start: Tensor | None) -> Tensor:
    columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if start is not None:
        columns = columns + start[:, None]
    if program.positions is Positions.FROM_MASK:
        return (mask.cumsum(1) * mask - 1).gather(1, columns)
    return columns


def _check_ids(name: str, tensor: Tensor, needed: tuple[int, ...] | None) -> None:
    shape = tuple(tensor.shape)
    wrong_shape = tensor.dim() != 2 if needed is None else shape != needed
    if wrong_shape or tensor.is_floating_point() or 0 in shape:
        raise UsageError(
            f"{name} does not fit.",
            where=name,
            found=f"{str(tensor.dtype).removeprefix('torch.')} {list(shape)}",
            needed="whole numbers [batch, length]" if needed is None else f"{list(needed)}",
        )
