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
from spdcompile.runtime._torch import register_autograd, register_unbatched_vmap

_LIBRARY = torch.library.Library("spd", "FRAGMENT")
_LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor valid, Tensor? sinks,"
    " float scale, bool causal, int window, float softcap) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define("cat(Tensor[] tensors, int dim=0) -> Tensor")
_LIBRARY.define(
    "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None,"
    " float eps=1e-05, bool cudnn_enable=True) -> Tensor"
)
_LIBRARY.define(
    "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None,"
    " float dropout_p=0.0, bool is_causal=False, *, float? scale=None, bool enable_gqa=False)"
    " -> Tensor"
)
ATTENTION_BACKWARD = torch.ops.spd.attention_backward.default

# vmap's own rules for these operators turn dynamic sizes into constants (torch 2.13), so that a
# compiled program is compiled again for each new length. Each replacement takes the same arguments,
# computes the same outside vmap, and has a rule that keeps sizes dynamic.
VMAP_REPLACEMENTS: Mapping[torch._ops.OpOverload, torch._ops.OpOverload] = MappingProxyType(
    {
        torch.ops.aten.cat.default: torch.ops.spd.cat.default,
        torch.ops.aten.layer_norm.default: torch.ops.spd.layer_norm.default,
        torch.ops.aten.scaled_dot_product_attention.default: (
            torch.ops.spd.scaled_dot_product_attention.default
        ),
    }
)


class NotPerRankError(SpdCompileError):
    """Ranks are to be combined, and the value is one for all of them."""


# ---- attention


def _attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, *settings: Any) -> Tensor:
    """q [B, H, S, D], k [B, G, S, D], v [B, G, S, V], valid [B, S] -> [B, S, H, V]."""
    return _attend(q, k, v, valid, *settings).transpose(1, 2).contiguous()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    """The same in differentiable operators -> [B, H, S, V]; sinks [H], or [B, H] per sequence."""
    length = q.shape[2]
    if k.shape[2] != length:
        raise ValueError(f"attention of {length} queries to {k.shape[2]} keys; needs as many")
    # On CUDA the question would wait for the device.
    padded = q.is_cuda or not bool(valid.all())
    windowed = 0 < window < length
    if sinks is not None or softcap:
        mask = _visible(valid, causal, window)
        return _attend_by_softmax(q, k, v, mask, sinks, scale, softcap)
    if not padded and not windowed:
        return _attend_by_sdpa(q, k, v, None, causal, scale)
    mask = _visible(valid if padded else valid[:1], causal, window)
    return _attend_by_sdpa(q, k, v, mask, False, scale)


def _visible(valid: Tensor, causal: bool, window: int) -> Tensor:
    """valid [B, S] -> bool [B, 1, S, S]; each token sees itself, so that no row is empty."""
    places = torch.arange(valid.shape[1], device=valid.device)
    rows, columns = places[:, None], places
    seen = valid.bool()[:, None, None, :]
    if causal:
        seen = seen & (columns <= rows)
    if window:
        seen = seen & (rows - columns < window)
    return seen | (rows == columns)


def _attend_by_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if q.is_cuda and groups > 1:  # no kernel there takes both a mask and grouped queries
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _attend_by_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Written out; the softmax is in float32 for half dtypes, as in Hugging Face's eager form."""
    batch, heads, length, _ = q.shape
    # The queries of a group as more rows of its KV head: K and V are never repeated.
    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    scores = (rows @ k.mT * scale).reshape(batch, heads, length, length)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = _at_least_float32(scores).masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks[..., None, None].to(scores.dtype)
        scores = torch.cat([scores, sink.expand(batch, heads, length, 1)], -1)
    weights = scores.softmax(-1)[..., :length].to(q.dtype)
    out = weights.reshape(batch, k.shape[1], -1, length) @ v
    return out.reshape(batch, heads, length, -1)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, sinks: Tensor | None, *settings: Any
) -> tuple[Tensor, ...]:
    """grad [B, S, H, V] -> gradients of q, k, v and sinks (empty without sinks); computes anew."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, sinks) if x is not None]
    with torch.enable_grad():
        out = _attend(*leaves[:3], valid, *(leaves[3:] or [None]), *settings)
    grads = torch.autograd.grad(out, leaves, grad.transpose(1, 2))
    absent = [grad.new_empty(0)] if sinks is None else []
    return *(g.contiguous() for g in grads), *absent


@torch.library.register_fake("spd::attention_backward", lib=_LIBRARY)
def _attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, sinks: Tensor | None, *settings: Any
) -> tuple[Tensor, ...]:
    like = [q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)]
    return *like, grad.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _save_attention(ctx: Any, *inputs: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _attention_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, valid, sinks = ctx.saved_tensors
    dq, dk, dv, dsinks = ATTENTION_BACKWARD(grad, q, k, v, valid, sinks, *ctx.settings)
    return dq, dk, dv, None, None if sinks is None else dsinks, *(None for _ in ctx.settings)


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("spd::attention has no second derivative")


@torch.library.register_vmap("spd::attention", lib=_LIBRARY)
def _attention_rule(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
    out = ATTENTION(*_ranks_in_batch(info, in_dims[:5], inputs[:5]), *inputs[5:])
    return out.unflatten(0, (info.batch_size, -1)), 0


@torch.library.register_vmap("spd::attention_backward", lib=_LIBRARY)
def _attention_backward_rule(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
    sinks = inputs[5]
    grads = ATTENTION_BACKWARD(*_ranks_in_batch(info, in_dims[:6], inputs[:6]), *inputs[6:])
    if sinks is None:
        grads, absent = grads[:3], grads[3]
        return (*(g.unflatten(0, (info.batch_size, -1)) for g in grads), absent), (0, 0, 0, None)
    *others, dsinks = (g.unflatten(0, (info.batch_size, -1)) for g in grads)
    shared = sinks.ndim - (in_dims[5] is not None) == 1
    return (*others, dsinks.sum(1) if shared else dsinks), (0, 0, 0, 0)


def _ranks_in_batch(info: Any, in_dims: Any, tensors: Any) -> list[Tensor | None]:
    """Each of [B, ...], batched or not -> [R * B, ...]; `sinks`, which is last, -> [R * B, H]."""
    *operands, sinks = [
        None if x is None else _ranks_first(x, dim, info.batch_size)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]
    if sinks is not None and sinks.ndim == 2:  # [R, H]: the same for all sequences of a rank
        sinks = sinks.unsqueeze(1).expand(-1, operands[0].shape[1], -1)
    return [None if x is None else x.flatten(0, 1) for x in (*operands, sinks)]


def _ranks_first(value: Tensor, dim: int | None, ranks: int) -> Tensor:
    """The vmapped dim in front, [R, ...]; a value that all ranks share is expanded."""
    return value.expand(ranks, *value.shape) if dim is None else value.movedim(dim, 0)


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


# ---- what ranks say to each other


def _alone(value: Tensor, *settings: Any) -> Tensor:
    """A single rank: its partial is the sum, its shard the whole."""
    return value.clone(memory_format=torch.contiguous_format)


def _alone_gradient(num_settings: int) -> dict[str, Any]:
    return {
        "save": lambda ctx, *inputs: None,
        "backward": lambda ctx, grad: (grad, *(None for _ in range(num_settings))),
    }


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
    whole = _ranks_first(whole, in_dims[0], info.batch_size)
    index = _ranks_first(index, in_dims[1], info.batch_size)
    dim = dim % (whole.ndim - 1) + 1
    parts = whole.unflatten(dim, (-1, units)).movedim(dim + 1, 1)  # [R, units, ..., n, ...]
    index = index.reshape(*index.shape, *(1 for _ in parts.shape[2:]))
    taken = parts.gather(1, index.expand(-1, -1, *parts.shape[2:]))
    return taken.movedim(1, dim + 1).flatten(dim, dim + 1), 0


def _refuse_shared(value: Tensor, *settings: Any) -> None:
    raise NotPerRankError(
        "A sync point or gather was given a value that is the same on all ranks.",
        found=f"an unbatched value of shape {tuple(value.shape)}, with {settings}",
        needed="a partial sum or shard per rank, batched by the innermost vmap",
        fix="stack the weights of the layer before it over ranks, or leave the operator out",
    )


# ---- replacements of operators whose own vmap rules freeze sizes


@torch.library.register_vmap("spd::cat", lib=_LIBRARY)
def _cat_rule(
    info: Any, in_dims: Any, tensors: list[Tensor], dim: int = 0
) -> tuple[Tensor, int]:
    pairs = zip(tensors, in_dims[0], strict=True)
    parts = [_ranks_first(x, x_dim, info.batch_size) for x, x_dim in pairs]
    return torch.cat(parts, dim if dim < 0 else dim + 1), 0


@torch.library.register_vmap("spd::layer_norm", lib=_LIBRARY)
def _layer_norm_rule(
    info: Any,
    in_dims: Any,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> tuple[Tensor, int]:
    """A weight per rank is applied after the norm proper, in float32 as torch does."""
    x = _ranks_first(input, in_dims[0], info.batch_size)
    dims = dict(zip(("weight", "bias"), (*in_dims[2:4], None, None), strict=False))
    if dims["weight"] is None and dims["bias"] is None:
        return F.layer_norm(x, normalized_shape, weight, bias, eps), 0
    out = F.layer_norm(_at_least_float32(x), normalized_shape, eps=eps)
    ones = [1] * (x.ndim - 1 - len(normalized_shape))
    for name, value, combine in (("weight", weight, torch.mul), ("bias", bias, torch.add)):
        if value is not None:
            per_rank = _ranks_first(value, dims[name], info.batch_size)
            out = combine(out, per_rank.reshape(info.batch_size, *ones, *normalized_shape))
    return out.to(x.dtype), 0


@torch.library.register_vmap("spd::scaled_dot_product_attention", lib=_LIBRARY)
def _sdpa_rule(
    info: Any,
    in_dims: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **settings: Any,
) -> tuple[Tensor, int]:
    """[R, B, H, S, D] folds to [R * B, H, S, D], which the fused kernels take."""
    ranks = info.batch_size
    pairs = zip((query, key, value), in_dims, strict=False)
    q, k, v = (_ranks_first(x, dim, ranks) for x, dim in pairs)
    fold = q.ndim == 5
    if attn_mask is not None:
        attn_mask = _mask_like(q, _ranks_first(attn_mask, in_dims[3], ranks), fold)
    if fold:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **settings)
    return out.unflatten(0, (ranks, -1)) if fold else out, 0


def _mask_like(q: Tensor, mask: Tensor, fold: bool) -> Tensor:
    """mask [R, (B or 1), (H or 1), S, T], inner dims perhaps missing -> the form of `q`."""
    mask = mask.reshape(mask.shape[0], *[1] * (q.ndim - mask.ndim), *mask.shape[1:])
    return mask.expand(-1, q.shape[1], -1, -1, -1).flatten(0, 1) if fold else mask
