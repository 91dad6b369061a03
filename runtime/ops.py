"""What the operators of passes/ops.py compute: kernels, gradients, and rules for torch.vmap.

Importing this module registers them. The local executor runs all ranks in one process as
`torch.vmap` over the rank dim, so a rule says what an operator does to all ranks at once: a sync
point sums over them, a gather concatenates them.

Shapes: R ranks (the vmapped dim), B batch, S tokens, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spdcompile.errors import SpdCompileError
from spdcompile.passes.ops import GATHER, SYNC
from spdcompile.runtime._torch import (
    OpOverload,
    define_copy,
    register_autograd,
    register_unbatched_vmap,
)
from spdcompile.runtime.attention import at_least_float32, ranks_first, save_nothing

_LIBRARY = torch.library.Library("spd", "FRAGMENT")

# vmap's own rules for these turn dynamic sizes into constants (torch 2.13): one compilation for
# each new length. A replacement takes the same arguments, computes the same outside vmap, and has
# a rule that keeps sizes dynamic.
VMAP_REPLACEMENTS: Mapping[OpOverload, OpOverload] = MappingProxyType(
    {
        (op := getattr(torch.ops.aten, name).default): define_copy(_LIBRARY, op)
        for name in ("cat", "layer_norm", "scaled_dot_product_attention")
    }
)


class NotPerRankError(SpdCompileError):
    """Ranks are to be combined, but the value is one for all of them."""


# ---- what ranks exchange


def _alone(value: Tensor, setting: Any) -> Tensor:
    """A single rank: its partial is the sum, its shard the whole."""
    return value.clone(memory_format=torch.contiguous_format)


def _refuse_shared(value: Tensor, setting: Any) -> None:
    raise NotPerRankError(
        "A sync point or gather got a value that is one for all ranks.",
        found=f"shape {tuple(value.shape)}, setting {setting!r}, unbatched",
        needed="a partial sum or a shard per rank, batched by the innermost vmap",
        fix="stack the weights of the linear before it over ranks",
    )


for _op in (SYNC, GATHER):
    _LIBRARY.impl(_op, _alone, "CompositeExplicitAutograd")
    register_autograd(_LIBRARY, _op, save=save_nothing, backward=lambda ctx, grad: (grad, None))
    register_unbatched_vmap(_LIBRARY, _op, _refuse_shared)


@torch.library.register_vmap("spd::sync", lib=_LIBRARY)
def _sync_rule(info: Any, in_dims: Any, partial: Tensor, point: str) -> tuple[Tensor, None]:
    """[R, ...] -> the sum, one value for all ranks."""
    return partial.sum(in_dims[0]), None


@torch.library.register_vmap("spd::gather", lib=_LIBRARY)
def _gather_rule(info: Any, in_dims: Any, shard: Tensor, dim: int) -> tuple[Tensor, None]:
    """[R, ..., k, ...] -> [..., R * k, ...], one value for all ranks."""
    dim %= shard.ndim - 1
    return shard.movedim(in_dims[0], dim).flatten(dim, dim + 1), None


@torch.library.register_vmap("spd::take", lib=_LIBRARY)
def _take_rule(
    info: Any, in_dims: Any, whole: Tensor, index: Tensor, dim: int, units: int
) -> tuple[Tensor, int]:
    """[R, ..., n * units, ...], index [R, k] -> [R, ..., n * k, ...]; vmap's own freezes sizes."""
    whole, index = (ranks_first(info, *x) for x in zip(in_dims, (whole, index), strict=False))
    dim = dim % (whole.ndim - 1) + 1
    parts = whole.unflatten(dim, (-1, units)).movedim(dim + 1, 1)  # [R, units, ..., n, ...]
    index = index.reshape(*index.shape, *(1 for _ in parts.shape[2:]))
    taken = parts.gather(1, index.expand(-1, -1, *parts.shape[2:]))
    return taken.movedim(1, dim + 1).flatten(dim, dim + 1), 0


# ---- replacements of operators whose own vmap rules freeze sizes


@torch.library.register_vmap("spd::cat", lib=_LIBRARY)
def _cat_rule(info: Any, in_dims: Any, tensors: list[Tensor], dim: int = 0) -> tuple[Tensor, int]:
    parts = [ranks_first(info, *x) for x in zip(in_dims[0], tensors, strict=True)]
    return torch.cat(parts, dim if dim < 0 else dim + 1), 0


@torch.library.register_vmap("spd::layer_norm", lib=_LIBRARY)
def _layer_norm_rule(
    info: Any, in_dims: Any, x: Tensor, shape: list[int], *rest: Any
) -> tuple[Tensor, int]:
    """A weight per rank is applied after the norm proper, in float32 as torch does."""
    weight, bias, eps, *_ = (*rest, *(None, None, 1e-5)[len(rest) :])
    weight_dim, bias_dim = (*in_dims[2:], None, None)[:2]
    x = ranks_first(info, in_dims[0], x)
    if weight_dim is None and bias_dim is None:
        return F.layer_norm(x, shape, weight, bias, eps), 0
    form = (info.batch_size, *[1] * (x.ndim - 1 - len(shape)), *shape)
    out = F.layer_norm(at_least_float32(x), shape, eps=eps)
    if weight is not None:
        out = out * ranks_first(info, weight_dim, weight).reshape(form)
    if bias is not None:
        out = out + ranks_first(info, bias_dim, bias).reshape(form)
    return out.to(x.dtype), 0


@torch.library.register_vmap("spd::scaled_dot_product_attention", lib=_LIBRARY)
def _sdpa_rule(info: Any, in_dims: Any, *inputs: Any, **settings: Any) -> tuple[Tensor, int]:
    """[R, B, H, S, D] folds to [R * B, H, S, D], which the fused kernels take."""
    q, k, v, *mask = (
        None if x is None else ranks_first(info, dim, x)
        for dim, x in zip(in_dims, inputs[:4], strict=False)
    )
    fold = q.ndim == 5
    if mask and mask[0] is not None:  # [R, (B or 1), (H or 1), S, S], perhaps without B, H
        shape = mask[0].shape
        mask = [mask[0].reshape(shape[0], *[1] * (q.ndim - len(shape)), *shape[1:])]
        mask = [mask[0].expand(-1, q.shape[1], -1, -1, -1)] if fold else mask
    tensors = (q, k, v, *mask)
    if fold:
        tensors = (None if x is None else x.flatten(0, 1) for x in tensors)
    out = F.scaled_dot_product_attention(*tensors, *inputs[4:], **settings)
    return out.unflatten(0, (info.batch_size, -1)) if fold else out, 0
