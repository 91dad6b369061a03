"""Attention of new tokens to those before: kernels and torch.vmap rules of the caching operators.

Importing this module registers them. A cache holds the token of column c in slot c modulo its
length, so that one shorter than the context holds the last tokens of it: a window.

Shapes: R ranks (the vmapped dim), B sequences, S new tokens, T tokens with those before, M slots of
a cache, H query heads, G KV heads, D width of a query head, V width of a value head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spdcompile.passes.ops import APPEND, ATTEND, ATTEND_CACHED
from spdcompile.runtime.attention import (
    attend_by_mask,
    attend_by_sdpa,
    padding_of,
    ranks_first,
    ranks_in_batch,
    visible,
)

_LIBRARY = torch.library.Library("spd", "FRAGMENT")
_SLOTS = 2  # the dim of a key or value cache that holds the tokens


def _attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    valid: Tensor,
    start: Tensor,
    sinks: Tensor | None,
    *settings: Any,
) -> Tensor:
    """q [B, H, S, D], k [B, G, S, D], v [B, G, S, V], caches [B, G, M, D] and [B, G, M, V],

    valid [B, T], start [B] -> [B, S, H, V]; the caches get the new tokens.
    """
    num_new, total, slots = q.shape[2], valid.shape[1], k_cache.shape[_SLOTS]
    tail = (start, sinks, *settings)
    if num_new == total and not q.is_cuda and not bool(start.any()):
        out = _attend(q, k, v, valid, *tail)
        _append(k, k_cache, start, _SLOTS)
        _append(v, v_cache, start, _SLOTS)
    elif num_new == 1 or total <= slots:
        _append(k, k_cache, start, _SLOTS)
        _append(v, v_cache, start, _SLOTS)
        if total <= slots:
            out = _attend(q, k_cache[:, :, :total], v_cache[:, :, :total], valid, *tail)
        else:
            kept = _kept_columns(start, slots)
            out = _attend_by_columns(q, k_cache, v_cache, kept, valid, *tail)
    else:
        # The first of several new tokens see what the last of them drive out of the cache.
        kept = torch.cat([_kept_columns(start - 1, slots), _columns(start, num_new)], 1)
        keys, values = torch.cat([k_cache, k], _SLOTS), torch.cat([v_cache, v], _SLOTS)
        out = _attend_by_columns(q, keys, values, kept, valid, *tail)
        _append(k, k_cache, start, _SLOTS)
        _append(v, v_cache, start, _SLOTS)
    return out.transpose(1, 2).contiguous()


def _attend_all(q: Tensor, *inputs: Any) -> Tensor:
    """q [B, H, S, D], k [B, G, T, D], v [B, G, T, V], valid [B, T], start [B] -> [B, S, H, V]."""
    return _attend(q, *inputs).transpose(1, 2).contiguous()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    start: Tensor,
    sinks: Tensor | None,
    *settings: Any,
) -> Tensor:
    """The same -> [B, H, S, V]."""
    scale, _, window, softcap, chunk = (*settings, 0)[:5]
    num_new, total = q.shape[2], k.shape[2]
    limited = 0 < window < total or 0 < chunk < total
    plain = sinks is None and not softcap and not limited and num_new in (1, total)
    # On CUDA the question would wait for the device.
    if plain and not q.is_cuda and bool(valid.all() & (start == total - num_new).all()):
        return attend_by_sdpa(q, k, v, None, scale, causal=num_new > 1)
    columns = torch.arange(total, device=q.device)[None]
    return _attend_by_columns(q, k, v, columns, valid, start, sinks, *settings)


def _attend_by_columns(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    valid: Tensor,
    start: Tensor,
    sinks: Tensor | None,
    *settings: Any,
) -> Tensor:
    """Attention to keys in any order.

    Args:
        columns: of the K keys, int64 [B, K] or [1, K]; below 0 where a slot is empty.
    """
    scale, causal, window, softcap, chunk = (*settings, 0)[:5]
    real = valid.bool().gather(1, columns.clamp(min=0).expand(valid.shape[0], -1)) & (columns >= 0)
    queries = _columns(start, q.shape[2])
    mask = visible(queries, columns, real, padding_of(valid), causal, window, chunk)
    return attend_by_mask(q, k, v, mask, sinks, scale, softcap)


def _columns(start: Tensor, count: int) -> Tensor:
    """start [B] -> the columns from there on, [B, count]."""
    return start[:, None] + torch.arange(count, device=start.device)


def _kept_columns(last: Tensor, slots: int) -> Tensor:
    """The columns that a cache's slots hold after column `last` [B] was written, [B, M]."""
    slot = torch.arange(slots, device=last.device)
    return last[:, None] - (last[:, None] - slot) % slots


def _append(new: Tensor, cache: Tensor, start: Tensor, dim: int) -> None:
    """Writes new [B, ..., S, ...] into cache [B, ..., M, ...], from column start [B] on."""
    slots, num_new = cache.shape[dim], new.shape[dim]
    if num_new > slots:
        new, start = new.narrow(dim, num_new - slots, slots), start + (num_new - slots)
        num_new = slots
    if not cache.is_cuda:
        first = int(start[0]) % slots
        if first + num_new <= slots and bool((start == start[0]).all()):
            cache.narrow(dim, first, num_new).copy_(new)
            return
    sequence = torch.arange(new.shape[0], device=new.device)[:, None]
    cache.movedim(dim, 1)[sequence, _columns(start, num_new) % slots] = new.movedim(dim, 1)


_LIBRARY.impl(ATTEND_CACHED, _attend_cached, "CompositeExplicitAutograd")
_LIBRARY.impl(ATTEND, _attend_all, "CompositeExplicitAutograd")
_LIBRARY.impl(APPEND, _append, "CompositeExplicitAutograd")


@torch.library.register_vmap("spd::attend_cached", lib=_LIBRARY)
def _attend_cached_rule(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
    """A rank's sequences are further sequences; ranks that share K and V, further query heads."""
    if in_dims[3] is not None:
        out = ATTEND_CACHED(*ranks_in_batch(info, in_dims[:8], inputs[:8]), *inputs[8:])
        return out.unflatten(0, (info.batch_size, -1)), 0
    k, v, *rest = (_shared(*x) for x in zip(in_dims[1:7], inputs[1:7], strict=True))
    q, sinks = inputs[0], inputs[7]
    heads = ranks_first(info, in_dims[0], q).movedim(0, 1).flatten(1, 2)
    if sinks is not None:
        sinks = ranks_first(info, in_dims[7], sinks).flatten()
    out = ATTEND_CACHED(heads, k, v, *rest, sinks, *inputs[8:])
    return out.unflatten(2, (info.batch_size, -1)), 2


def _shared(dim: int | None, value: Tensor) -> Tensor:
    """One of the ranks' values, which are all the same where their cache is one."""
    return value if dim is None else value.select(dim, 0)


@torch.library.register_vmap("spd::attend", lib=_LIBRARY)
def _attend_rule(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
    out = ATTEND(*ranks_in_batch(info, in_dims[:6], inputs[:6]), *inputs[6:])
    return out.unflatten(0, (info.batch_size, -1)), 0


@torch.library.register_vmap("spd::append", lib=_LIBRARY)
def _append_rule(
    info: Any, in_dims: Any, new: Tensor, cache: Tensor, start: Tensor, dim: int
) -> tuple[None, None]:
    if in_dims[1] is None:
        APPEND(_shared(in_dims[0], new), cache, start, dim)
    else:
        tensors = zip(in_dims[:3], (new, cache, start), strict=True)
        APPEND(*(ranks_first(info, *x).flatten(0, 1) for x in tensors), dim)
    return None, None
