"""The operators that programs speak, as schemas and fakes; runtime/ops.py gives them kernels.

`spd::attention`  whole attention of one call: the unit that is split by heads.
`spd::attend_cached` the same for new tokens, whose keys and values it writes into its caches.
`spd::attend`     the same for new tokens, given the keys and values of all.
`spd::append`     writes what is to be remembered of new tokens into a cache.
`spd::sync`       a sync point: partial sums in, their sum over the ranks out.
`spd::gather`     shards along a dim in, the concatenation over the ranks out.
`spd::take`       a replicated value in, this rank's share along a dim out.
`spd::grouped_mm` a matrix of its own for each group of consecutive rows: a mixture of experts.
`spd::call`       code that no graph can hold, by name (passes/opaque.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("spd", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor valid, Tensor? sinks, float scale, bool causal,"
    " int window, float softcap, int chunk=0) -> Tensor"
)
_LIBRARY.define(
    "attend_cached(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor valid, Tensor start, Tensor? sinks, float scale, bool causal, int window,"
    " float softcap, int chunk=0) -> Tensor"
)
_LIBRARY.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor valid, Tensor start, Tensor? sinks, float scale,"
    " bool causal, int window, float softcap, int chunk=0) -> Tensor"
)
_LIBRARY.define("append(Tensor new, Tensor(a!) cache, Tensor start, int dim) -> ()")
_LIBRARY.define("sync(Tensor partial, str point) -> Tensor")
_LIBRARY.define("gather(Tensor shard, int dim) -> Tensor")
_LIBRARY.define("take(Tensor whole, Tensor index, int dim, int units) -> Tensor")
_LIBRARY.define("grouped_mm(Tensor rows, Tensor weight, Tensor ends) -> Tensor")
_LIBRARY.define("call(Tensor[] tensors, str code, int[] shape, ScalarType dtype) -> Tensor")

ATTENTION = torch.ops.spd.attention.default
ATTEND_CACHED = torch.ops.spd.attend_cached.default
ATTEND = torch.ops.spd.attend.default
APPEND = torch.ops.spd.append.default
SYNC = torch.ops.spd.sync.default
GATHER = torch.ops.spd.gather.default
TAKE = torch.ops.spd.take.default
GROUPED_MM = torch.ops.spd.grouped_mm.default
CALL = torch.ops.spd.call.default


@torch.library.register_fake("spd::attention")
def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, sinks: Tensor | None, *settings: object
) -> Tensor:
    """q [B, H, S, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], valid [B, T] -> [B, S, H, Dv]."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.register_fake("spd::attend_cached")
@torch.library.register_fake("spd::attend")
def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.register_fake("spd::append")
def _append_fake(new: Tensor, cache: Tensor, start: Tensor, dim: int) -> None:
    return None


@torch.library.register_fake("spd::sync")
def _sync_fake(partial: Tensor, point: str) -> Tensor:
    return torch.empty_like(partial, memory_format=torch.contiguous_format)


@torch.library.register_fake("spd::gather")
def _gather_fake(shard: Tensor, dim: int) -> Tensor:
    """Shape-preserving: how many ranks there are is not known to a program."""
    return torch.empty_like(shard, memory_format=torch.contiguous_format)


@torch.library.register_fake("spd::grouped_mm")
def _grouped_mm_fake(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [N, K], weight [E, K, J], ends int [E] -> [N, J]; the rows after the last end get zeros.

    Group e is the rows from ends[e - 1], or 0, to ends[e].
    """
    return rows.new_empty(rows.shape[0], weight.shape[2])


@torch.library.impl("spd::take", "CompositeImplicitAutograd", lib=_LIBRARY)
def _take(whole: Tensor, index: Tensor, dim: int, units: int) -> Tensor:
    """Picks `index` out of the `units` entries of `dim`, which may have the batch folded in front.

    Args:
        whole: [..., n * units, ...], where n is 1 or the folded batch.
        index: this rank's entries, int64 [k].
        dim: counted from the front.

    Returns: [..., n * k, ...].
    """
    parts = whole.unflatten(dim, (-1, units)).index_select(dim + 1, index)
    return parts.flatten(dim, dim + 1)


@torch.library.register_fake("spd::call")
def _call_fake(tensors: list[Tensor], code: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Each size of the result is one of an input's, (input, dim), or a constant, (-1, size)."""
    pairs = zip(shape[::2], shape[1::2], strict=True)
    sizes = [dim if place < 0 else tensors[place].shape[dim] for place, dim in pairs]
    return tensors[0].new_empty(sizes, dtype=dtype)
