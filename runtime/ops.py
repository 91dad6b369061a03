"""What the operators of passes/ops.py compute: kernels, gradients, and rules for torch.vmap.

Importing this module registers them. The local executor runs all ranks in one process as
`torch.vmap` over the rank dim, so a rule says what an operator does to all ranks at once: attention
folds them into its batch, a sync point sums over them, a gather concatenates them.

Shapes: R ranks (the vmapped dim), B batch, S tokens, H query heads, G KV heads, D width of a query
head, V width of a value head.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spdcompile.errors import SpdCompileError
from spdcompile.passes.ops import ATTENTION, GATHER, SYNC
from spdcompile.runtime._torch import (
    OpOverload,
    autograd_in_kernel,
    define_copy,
    register_autograd,
    register_unbatched_vmap,
)

_LIBRARY = torch.library.Library("spd", "FRAGMENT")
_LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor valid, Tensor? sinks,"
    " float scale, bool causal, int window, float softcap) -> (Tensor, Tensor, Tensor, Tensor)"
)
ATTENTION_BACKWARD = torch.ops.spd.attention_backward.default

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


# ---- attention


def _attention(q: Tensor, *inputs: Any) -> Tensor:
    """q [B, H, S, D], k [B, G, S, D], v [B, G, S, V], valid [B, S] -> [B, S, H, V]."""
    return _attend(q, *inputs).transpose(1, 2).contiguous()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, sinks: Tensor | None, *settings: Any
) -> Tensor:
    """The same in differentiable operators -> [B, H, S, V]; sinks [H], or [B, H] per sequence."""
    scale, causal, window, softcap = settings
    length = q.shape[2]
    if k.shape[2] != length:
        raise ValueError(f"attention of {length} queries to {k.shape[2]} keys; needs as many")
    if sinks is not None or softcap:
        return _attend_by_softmax(q, k, v, _visible(valid, causal, window), sinks, scale, softcap)
    # On CUDA the question would wait for the device.
    if not q.is_cuda and bool(valid.all()):
        if not 0 < window < length:
            return _attend_by_sdpa(q, k, v, None, scale, causal=causal)
        valid = valid[:1]
    return _attend_by_sdpa(q, k, v, _visible(valid, causal, window), scale)


def _visible(valid: Tensor, causal: bool, window: int) -> Tensor:
    """valid [B, S] -> bool [B, 1, S, S]; each token sees itself, so that no row is empty."""
    columns = torch.arange(valid.shape[1], device=valid.device)
    rows = columns[:, None]
    seen = valid.bool()[:, None, None, :]
    if causal:
        seen = seen & (columns <= rows)
    if window:
        seen = seen & (rows - columns < window)
    return seen | (rows == columns)


def _attend_by_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False
) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    if q.is_cuda and repeats > 1:  # there the kernel that takes a mask takes no grouped queries
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _attend_by_softmax(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None, scale: float, cap: float
) -> Tensor:
    """Written out; the softmax is in float32 for half dtypes, as in Hugging Face's eager form."""
    batch, heads, length, _ = q.shape
    # The queries of a group are more rows of its KV head: K and V are never repeated.
    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    scores = (rows @ k.mT * scale).reshape(batch, heads, length, length)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    scores = _at_least_float32(scores).masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks[..., None, None].to(scores.dtype)
        scores = torch.cat([scores, sink.expand(batch, heads, length, 1)], -1)
    weights = scores.softmax(-1)[..., :length].to(q.dtype)
    out = weights.reshape(batch, k.shape[1], -1, length) @ v
    return out.reshape(batch, heads, length, -1)


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _attention_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """grad [B, S, H, V] -> gradients of q, k, v and sinks (empty without sinks); computes anew."""
    leaves = {place: inputs[place].detach().requires_grad_() for place in _differentiable(inputs)}
    with autograd_in_kernel():
        out = _attend(*(leaves.get(place, x) for place, x in enumerate(inputs)))
        grads = torch.autograd.grad(out, list(leaves.values()), grad.transpose(1, 2))
    absent = [grad.new_empty(0)] if len(grads) == 3 else []
    return *(x.contiguous() for x in grads), *absent


@torch.library.register_fake("spd::attention_backward", lib=_LIBRARY)
def _attention_backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    like = [inputs[place].new_empty(inputs[place].shape) for place in _differentiable(inputs)]
    return tuple(like if len(like) == 4 else [*like, grad.new_empty(0)])


def _differentiable(inputs: tuple[Any, ...]) -> list[int]:
    """Where among an attention's inputs q, k, v and, if there are any, the sinks are."""
    return [place for place in (0, 1, 2, 4) if inputs[place] is not None]


def _save_attention(ctx: Any, *inputs: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _attention_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *dqkv, dsinks = ATTENTION_BACKWARD(grad, *ctx.saved_tensors, *ctx.settings)
    return *dqkv, None, None if ctx.saved_tensors[4] is None else dsinks, *[None] * 4


def _save_nothing(ctx: Any, *inputs: Any) -> None:
    pass


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("spd::attention has no second derivative")


_LIBRARY.impl(ATTENTION, _attention, "CompositeExplicitAutograd")
_LIBRARY.impl(ATTENTION_BACKWARD, _attention_backward, "CompositeExplicitAutograd")
register_autograd(_LIBRARY, ATTENTION, save=_save_attention, backward=_attention_gradient)
register_autograd(_LIBRARY, ATTENTION_BACKWARD, save=_save_nothing, backward=_no_second_gradient)


@torch.library.register_vmap("spd::attention", lib=_LIBRARY)
def _attention_rule(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
    out = ATTENTION(*_ranks_in_batch(info, in_dims[:5], inputs[:5]), *inputs[5:])
    return out.unflatten(0, (info.batch_size, -1)), 0


@torch.library.register_vmap("spd::attention_backward", lib=_LIBRARY)
def _attention_backward_rule(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
    sinks = inputs[5]
    grads = ATTENTION_BACKWARD(*_ranks_in_batch(info, in_dims[:6], inputs[:6]), *inputs[6:])
    *dqkv, dsinks = grads
    dqkv = [x.unflatten(0, (info.batch_size, -1)) for x in dqkv]
    if sinks is None:
        return (*dqkv, dsinks), (0, 0, 0, None)
    dsinks = dsinks.unflatten(0, (info.batch_size, -1))
    shared = sinks.ndim - (in_dims[5] is not None) == 1  # by the sequences of a rank
    return (*dqkv, dsinks.sum(1) if shared else dsinks), (0, 0, 0, 0)


def _ranks_in_batch(info: Any, in_dims: Any, tensors: Any) -> list[Tensor | None]:
    """Each of [B, ...], batched or not -> [R * B, ...]; `sinks`, which is last, -> [R * B, H]."""
    *operands, sinks = [
        None if x is None else _ranks_first(info, dim, x)
        for dim, x in zip(in_dims, tensors, strict=True)
    ]
    if sinks is not None and sinks.ndim == 2:  # [R, H]: the same for all sequences of a rank
        sinks = sinks.unsqueeze(1).expand(-1, operands[0].shape[1], -1)
    return [None if x is None else x.flatten(0, 1) for x in (*operands, sinks)]


def _ranks_first(info: Any, dim: int | None, value: Tensor) -> Tensor:
    """The vmapped dim in front, [R, ...]; a value that all ranks share is expanded."""
    return value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)


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
    register_autograd(_LIBRARY, _op, save=_save_nothing, backward=lambda ctx, grad: (grad, None))
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
    whole, index = (_ranks_first(info, *x) for x in zip(in_dims, (whole, index), strict=False))
    dim = dim % (whole.ndim - 1) + 1
    parts = whole.unflatten(dim, (-1, units)).movedim(dim + 1, 1)  # [R, units, ..., n, ...]
    index = index.reshape(*index.shape, *(1 for _ in parts.shape[2:]))
    taken = parts.gather(1, index.expand(-1, -1, *parts.shape[2:]))
    return taken.movedim(1, dim + 1).flatten(dim, dim + 1), 0


# ---- replacements of operators whose own vmap rules freeze sizes


@torch.library.register_vmap("spd::cat", lib=_LIBRARY)
def _cat_rule(info: Any, in_dims: Any, tensors: list[Tensor], dim: int = 0) -> tuple[Tensor, int]:
    parts = [_ranks_first(info, *x) for x in zip(in_dims[0], tensors, strict=True)]
    return torch.cat(parts, dim if dim < 0 else dim + 1), 0


@torch.library.register_vmap("spd::layer_norm", lib=_LIBRARY)
def _layer_norm_rule(
    info: Any, in_dims: Any, x: Tensor, shape: list[int], *rest: Any
) -> tuple[Tensor, int]:
    """A weight per rank is applied after the norm proper, in float32 as torch does."""
    weight, bias, eps, *_ = (*rest, *(None, None, 1e-5)[len(rest) :])
    weight_dim, bias_dim = (*in_dims[2:], None, None)[:2]
    x = _ranks_first(info, in_dims[0], x)
    if weight_dim is None and bias_dim is None:
        return F.layer_norm(x, shape, weight, bias, eps), 0
    form = (info.batch_size, *[1] * (x.ndim - 1 - len(shape)), *shape)
    out = F.layer_norm(_at_least_float32(x), shape, eps=eps)
    if weight is not None:
        out = out * _ranks_first(info, weight_dim, weight).reshape(form)
    if bias is not None:
        out = out + _ranks_first(info, bias_dim, bias).reshape(form)
    return out.to(x.dtype), 0


@torch.library.register_vmap("spd::scaled_dot_product_attention", lib=_LIBRARY)
def _sdpa_rule(info: Any, in_dims: Any, *inputs: Any, **settings: Any) -> tuple[Tensor, int]:
    """[R, B, H, S, D] folds to [R * B, H, S, D], which the fused kernels take."""
    q, k, v, *mask = (
        None if x is None else _ranks_first(info, dim, x)
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
