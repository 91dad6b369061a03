"""What `spd::attention` computes: its kernels, its gradient and its rule for torch.vmap.

Importing this module registers them. All ranks' heads are folded into the batch.

Shapes: R ranks (the vmapped dim), B batch, S tokens, H query heads, G KV heads, D width of a query
head, V width of a value head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spdcompile.passes.ops import ATTENTION
from spdcompile.runtime._torch import autograd_in_kernel, register_autograd

_LIBRARY = torch.library.Library("spd", "FRAGMENT")
_LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor valid, Tensor? sinks,"
    " float scale, bool causal, int window, float softcap, int chunk=0)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
ATTENTION_BACKWARD = torch.ops.spd.attention_backward.default


def _attention(q: Tensor, *inputs: Any) -> Tensor:
    """q [B, H, S, D], k [B, G, S, D], v [B, G, S, V], valid [B, S] -> [B, S, H, V]."""
    return _attend(q, *inputs).transpose(1, 2).contiguous()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, sinks: Tensor | None, *settings: Any
) -> Tensor:
    """The same in differentiable operators -> [B, H, S, V]; sinks [H], or [B, H] per sequence."""
    # The dispatcher leaves a trailing argument out that has its default.
    scale, causal, window, softcap, chunk = (*settings, 0)[:5]
    length = q.shape[2]
    if k.shape[2] != length:
        raise ValueError(f"attention of {length} queries to {k.shape[2]} keys; needs as many")
    # On CUDA the question would wait for the device.
    if not q.is_cuda and bool(valid.all()):
        if not (sinks is not None or softcap or 0 < window < length or 0 < chunk < length):
            return attend_by_sdpa(q, k, v, None, scale, causal=causal)
        valid = valid[:1]
    columns = torch.arange(length, device=valid.device)[None]
    mask = visible(columns, columns, valid, padding_of(valid), causal, window, chunk)
    return attend_by_mask(q, k, v, mask, sinks, scale, softcap)


def visible(
    queries: Tensor,
    keys: Tensor,
    valid: Tensor,
    padding: Tensor,
    causal: bool,
    window: int,
    chunk: int,
) -> Tensor:
    """Which of K keys each of S queries sees, bool [B, 1, S, K].

    Args:
        queries: their columns in the sequence, int64 [B, S] or [1, S].
        keys: their columns, [B, K] or [1, K].
        valid: [B, K], zero where a key is no token.
        padding: tokens of padding in front of each sequence, [B, 1].

    Each token sees itself, so that no row is empty.
    """
    rows, columns = queries[:, None, :, None], keys[:, None, None, :]
    seen = valid.bool()[:, None, None, :]
    if causal:
        seen = seen & (columns <= rows)
    if window:
        seen = seen & (rows - columns < window)
    if chunk:
        start = padding[:, None, None]
        own = (rows - start).div(chunk, rounding_mode="floor")
        seen = seen & (own == (columns - start).div(chunk, rounding_mode="floor"))
    return seen | (rows == columns)


def padding_of(valid: Tensor) -> Tensor:
    """valid [B, T] -> tokens of padding in front of each sequence, int64 [B, 1]."""
    return (valid.cumsum(1) == 0).sum(1, keepdim=True)


def attend_by_mask(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None, scale: float, cap: float
) -> Tensor:
    """q [B, H, S, D], k [B, G, K, D], v [B, G, K, V], mask bool [B, 1, S, K] -> [B, H, S, V]."""
    if sinks is not None or cap:
        return _attend_by_softmax(q, k, v, mask, sinks, scale, cap)
    return attend_by_sdpa(q, k, v, mask, scale)


def attend_by_sdpa(
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
    keys = k.shape[2]
    scores = (rows @ k.mT * scale).reshape(batch, heads, length, keys)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    scores = at_least_float32(scores).masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks[..., None, None].to(scores.dtype)
        scores = torch.cat([scores, sink.expand(batch, heads, length, 1)], -1)
    weights = scores.softmax(-1)[..., :keys].to(q.dtype)
    out = weights.reshape(batch, k.shape[1], -1, keys) @ v
    return out.reshape(batch, heads, length, -1)


def at_least_float32(value: Tensor) -> Tensor:
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
    dsinks = None if ctx.saved_tensors[4] is None else dsinks
    return *dqkv, None, dsinks, *[None] * len(ctx.settings)


def save_nothing(ctx: Any, *inputs: Any) -> None:
    pass


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("spd::attention has no second derivative")


_LIBRARY.impl(ATTENTION, _attention, "CompositeExplicitAutograd")
_LIBRARY.impl(ATTENTION_BACKWARD, _attention_backward, "CompositeExplicitAutograd")
register_autograd(_LIBRARY, ATTENTION, save=_save_attention, backward=_attention_gradient)
register_autograd(_LIBRARY, ATTENTION_BACKWARD, save=save_nothing, backward=_no_second_gradient)


@torch.library.register_vmap("spd::attention", lib=_LIBRARY)
def _attention_rule(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
    out = ATTENTION(*ranks_in_batch(info, in_dims[:5], inputs[:5]), *inputs[5:])
    return out.unflatten(0, (info.batch_size, -1)), 0


@torch.library.register_vmap("spd::attention_backward", lib=_LIBRARY)
def _attention_backward_rule(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
    sinks = inputs[5]
    grads = ATTENTION_BACKWARD(*ranks_in_batch(info, in_dims[:6], inputs[:6]), *inputs[6:])
    *dqkv, dsinks = grads
    dqkv = [x.unflatten(0, (info.batch_size, -1)) for x in dqkv]
    if sinks is None:
        return (*dqkv, dsinks), (0, 0, 0, None)
    dsinks = dsinks.unflatten(0, (info.batch_size, -1))
    shared = sinks.ndim - (in_dims[5] is not None) == 1  # by the sequences of a rank
    return (*dqkv, dsinks.sum(1) if shared else dsinks), (0, 0, 0, 0)


def ranks_in_batch(info: Any, in_dims: Any, tensors: Any) -> list[Tensor | None]:
    """Each of [B, ...], batched or not -> [R * B, ...]; `sinks`, which is last, -> [R * B, H]."""
    *operands, sinks = [
        None if x is None else ranks_first(info, dim, x)
        for dim, x in zip(in_dims, tensors, strict=True)
    ]
    if sinks is not None and sinks.ndim == 2:  # [R, H]: the same for all sequences of a rank
        sinks = sinks.unsqueeze(1).expand(-1, operands[0].shape[1], -1)
    return [None if x is None else x.flatten(0, 1) for x in (*operands, sinks)]


def ranks_first(info: Any, dim: int | None, value: Tensor) -> Tensor:
    """The vmapped dim in front, [R, ...]; a value that all ranks share is expanded."""
    return value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
