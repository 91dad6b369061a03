"""A program's inputs, completed as the model itself completes them."""

from __future__ import annotations

import torch
from torch import Tensor

from spdcompile.errors import UsageError
from spdcompile.passes.base import Positions, Program


def program_inputs(
    program: Program,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """A program's three inputs, those that are absent filled in as the model itself would.

    Raises:
        UsageError: a tensor of another shape or kind, or of a length that the program does not
            take.
    """
    _check_ids("input_ids", input_ids, None)
    _check_length(program, input_ids)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    _check_ids("attention_mask", mask, input_ids)
    mask = mask.to(torch.long)
    if position_ids is not None and program.positions is Positions.FROM_IDS:
        raise UsageError(
            "The model numbers its tokens itself.",
            where="position_ids",
            found="position ids",
            needed="none: its program counts the ids that are no padding",
        )
    if position_ids is None:
        position_ids = _positions(program, input_ids, mask)
    _check_ids("position_ids", position_ids, input_ids)
    values = (input_ids, mask, position_ids)
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: value.contiguous() for name, value in zip(names, values, strict=True)}


def _check_length(program: Program, input_ids: Tensor) -> None:
    shortest, longest, length = program.min_length, program.max_length, input_ids.shape[1]
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


def _positions(program: Program, input_ids: Tensor, mask: Tensor) -> Tensor:
    if program.positions is Positions.FROM_MASK:
        return mask.cumsum(1) * mask - 1
    length = input_ids.shape[1]
    return torch.arange(length, device=input_ids.device).expand_as(input_ids)


def _check_ids(name: str, tensor: Tensor, like: Tensor | None) -> None:
    shape = tuple(tensor.shape)
    wrong_shape = tensor.dim() != 2 if like is None else shape != tuple(like.shape)
    if wrong_shape or tensor.is_floating_point() or 0 in shape:
        raise UsageError(
            f"{name} does not fit.",
            where=name,
            found=f"{str(tensor.dtype).removeprefix('torch.')} {list(shape)}",
            needed="whole numbers [batch, length]" if like is None else f"{list(like.shape)}",
        )
