"""What `spd::grouped_mm` computes: its kernel, its gradient and its rule for torch.vmap.

Importing this module registers them. Several blocks of rows can share one call, each with groups of
its own: so all ranks' experts are multiplied at once, without a copy of their weights.

Shapes: R ranks (the vmapped dim), G blocks, N rows of a block, E experts, K and J features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spdcompile.passes.ops import GROUPED_MM
from spdcompile.runtime._torch import register_autograd

_LIBRARY = torch.library.Library("spd", "FRAGMENT")
_LIBRARY.define("grouped_outer(Tensor rows, Tensor others, Tensor ends) -> Tensor")
GROUPED_OUTER = torch.ops.spd.grouped_outer.default

_ALIGNED_BYTES = 16  # what the fused CUDA kernel wants of every row


def _grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [G * N, K], weight [G * E, K, J], ends [G, E] or, for one block, [E] -> [G * N, J]."""
    if _is_fused(rows, weight):
        out = F.grouped_mm(rows, weight, offs=_absolute(ends, rows.shape[0]))
        return torch.where(_covered(ends, rows.shape[0]), out, 0)
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    for number, group in _groups(ends, rows.shape[0]):
        torch.mm(rows[group], weight[number], out=out[group])
    return out


def _grouped_outer(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    """rows [G * N, K], others [G * N, J] -> rows' @ others of each group, [G * E, K, J]."""
    if _is_fused(rows, others):
        others = torch.where(_covered(ends, rows.shape[0]), others, 0)
        return F.grouped_mm(rows.mT, others, offs=_absolute(ends, rows.shape[0]))
    out = rows.new_zeros(ends.numel(), rows.shape[1], others.shape[1])
    for number, group in _groups(ends, rows.shape[0]):
        torch.mm(rows[group].mT, others[group], out=out[number])
    return out


def _groups(ends: Tensor, num_rows: int) -> Iterator[tuple[int, slice]]:
    """(number, its rows) of each group that has rows."""
    size = num_rows // (ends.numel() // ends.shape[-1])
    number = 0
    for block, block_ends in enumerate(ends.reshape(-1, ends.shape[-1]).tolist()):
        start = 0
        for end in block_ends:
            if end > start:
                yield number, slice(block * size + start, block * size + end)
            start, number = end, number + 1


def _is_fused(a: Tensor, b: Tensor) -> bool:
    """Whether torch has one kernel for all groups: bfloat16 on a CUDA device from 8.0 on."""
    if not a.is_cuda or a.dtype != torch.bfloat16:
        return False
    new_enough = torch.cuda.get_device_capability(a.device) >= (8, 0)
    return new_enough and _is_aligned(a) and _is_aligned(b)


def _is_aligned(x: Tensor) -> bool:
    """Rows or columns lie together and each starts at a multiple of the alignment."""
    strides = sorted(x.stride()[-2:])
    steps = (*strides[1:], *x.stride()[:-2])
    aligned = all(step * x.element_size() % _ALIGNED_BYTES == 0 for step in steps)
    return strides[0] == 1 and aligned and x.data_ptr() % _ALIGNED_BYTES == 0


def _absolute(ends: Tensor, num_rows: int) -> Tensor:
    """Ends of all groups counted from the first row of all, int32 [G * E]."""
    if ends.ndim == 1:
        return ends.int()
    starts = torch.arange(ends.shape[0], device=ends.device) * (num_rows // ends.shape[0])
    return (ends + starts[:, None]).flatten().int()


def _covered(ends: Tensor, num_rows: int) -> Tensor:
    """Which rows belong to a group, bool [G * N, 1]."""
    last = ends.reshape(-1, ends.shape[-1])[:, -1:]
    numbers = torch.arange(num_rows // last.shape[0], device=ends.device)
    return (numbers < last).reshape(-1, 1)


@torch.library.register_fake("spd::grouped_outer", lib=_LIBRARY)
def _grouped_outer_fake(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.numel(), rows.shape[1], others.shape[1])


def _save(ctx: Any, *inputs: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, ends = ctx.saved_tensors
    needs_rows, needs_weight, _ = ctx.needs_input_grad[-3:]
    return (
        GROUPED_MM(grad, weight.mT, ends) if needs_rows else None,
        GROUPED_OUTER(rows, grad, ends) if needs_weight else None,
        None,
    )


def _grouped_outer_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, others, ends = ctx.saved_tensors
    return GROUPED_MM(others, grad.mT, ends), GROUPED_MM(rows, grad, ends), None


_LIBRARY.impl(GROUPED_MM, _grouped_mm, "CompositeExplicitAutograd")
_LIBRARY.impl(GROUPED_OUTER, _grouped_outer, "CompositeExplicitAutograd")
register_autograd(_LIBRARY, GROUPED_MM, save=_save, backward=_grouped_mm_gradient)
register_autograd(_LIBRARY, GROUPED_OUTER, save=_save, backward=_grouped_outer_gradient)


@torch.library.register_vmap("spd::grouped_mm", lib=_LIBRARY)
def _grouped_mm_rule(
    info: Any, in_dims: Any, rows: Tensor, weight: Tensor, ends: Tensor
) -> tuple[Tensor, int]:
    """All ranks' blocks in one call; ranks that share weights and groups have wider groups."""
    if in_dims[1] is None and in_dims[2] is None and ends.ndim == 1:
        wide = rows.movedim(in_dims[0], 1).flatten(0, 1)
        out = GROUPED_MM(wide, weight, ends * info.batch_size)
        return out.unflatten(0, (-1, info.batch_size)), 1
    tensors = _folded(info, in_dims, rows, weight, ends)
    return GROUPED_MM(*tensors).unflatten(0, (info.batch_size, -1)), 0


@torch.library.register_vmap("spd::grouped_outer", lib=_LIBRARY)
def _grouped_outer_rule(info: Any, in_dims: Any, *tensors: Tensor) -> tuple[Tensor, int]:
    out = GROUPED_OUTER(*_folded(info, in_dims, *tensors))
    return out.unflatten(0, (info.batch_size, -1)), 0


def _folded(info: Any, in_dims: Any, *tensors: Tensor) -> list[Tensor]:
    """Each, batched or not, as [R * n, ...]; the ends, which are last, as [R * G, E]."""
    first = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for dim, x in zip(in_dims, tensors, strict=True)
    ]
    return [x.flatten(0, 1) for x in first[:-1]] + [first[-1].reshape(-1, first[-1].shape[-1])]
