"""What one operator computes and moves, by a table of those that are kernels of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spdcompile.passes.ops import APPEND, ATTEND, ATTEND_CACHED, ATTENTION, GROUPED_MM

_ATEN = torch.ops.aten
FUSED = "fused"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel on one rank.

    Args:
        name: its operator, or FUSED.
        flops: floating-point operations, a multiply-add counted as two.
        num_bytes: read and written.
        dtype: that of its result, in which it computes.
        rows: of a product by a matrix, how many vectors the matrix meets; of an attention, how many
            queries a head has; 0 for other kernels.
        matrix_bytes: of that matrix; 0 for other kernels.
        reads_state: whether it reads weights or caches, which every step reads once, rather than
            what the kernel before has just written.
    """

    name: str
    flops: float
    num_bytes: int
    dtype: torch.dtype
    rows: int = 0
    matrix_bytes: int = 0
    reads_state: bool = False


def _product(out: Tensor, left: Tensor, right: Tensor, *_: Any) -> float:
    """Of left [..., k], whatever the layout of the other."""
    return 2.0 * out.numel() * left.shape[-1]


def _sum_and_product(out: Tensor, bias: Tensor, left: Tensor, *_: Any) -> float:
    return 2.0 * out.numel() * left.shape[-1]


def _attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> float:
    """q [B, H, S, D], k [B, Hkv, T, D]; the half that a causal mask hides is not left out."""
    return 2.0 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])


def _cached_attention(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, *_: Any
) -> float:
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k_cache.shape[2]
    return 2.0 * pairs * (q.shape[3] + v.shape[3])


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *_: Any) -> float:
    return 2.0 * out.numel() * weight[0].numel()


def _nothing(*_: Any) -> float:
    return 0.0


Flops = Callable[..., float]
KERNELS: Mapping[Callable[..., Any], Flops] = {
    _ATEN.linear.default: _product,
    _ATEN.matmul.default: _product,
    _ATEN.mm.default: _product,
    _ATEN.bmm.default: _product,
    _ATEN.addmm.default: _sum_and_product,
    _ATEN.scaled_dot_product_attention.default: _attention,
    _ATEN.conv1d.default: _convolution,
    _ATEN.embedding.default: _nothing,
    _ATEN.index_select.default: _nothing,
    ATTENTION: _attention,
    ATTEND: _attention,
    ATTEND_CACHED: _cached_attention,
    GROUPED_MM: _product,
    APPEND: _nothing,
}
"""(output, *arguments) -> operations of each operator that is a kernel of its own."""
_LOOK_UPS = frozenset({_ATEN.embedding.default, _ATEN.index_select.default, APPEND})
# Where among the arguments the matrix is.
_BY_MATRIX = {_ATEN.linear.default: 1, _ATEN.mm.default: 1, _ATEN.addmm.default: 2}
_ATTENTIONS = frozenset(
    {_ATEN.scaled_dot_product_attention.default, ATTENTION, ATTEND, ATTEND_CACHED}
)
_BY_STATE = frozenset({*_BY_MATRIX, ATTEND_CACHED, GROUPED_MM})


def kernel_of(op: Any, out: Tensor, args: Sequence[Any], flops: float | None = None) -> Kernel:
    """The kernel of one call.

    Args:
        op: the operator; one of `KERNELS` unless `flops` are given.
        out: its result, or its first tensor if it has none.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    moved = out.nbytes + sum(tensor.nbytes for tensor in tensors)
    if op in _LOOK_UPS:
        moved = 2 * out.nbytes
    if op is GROUPED_MM:
        rows, experts = tensors[0].shape[0], tensors[1].shape[0]
        moved -= tensors[1].nbytes * max(experts - rows, 0) // experts  # no row, no read
    rows = matrix_bytes = 0
    if op in _BY_MATRIX:
        rows, matrix_bytes = out.numel() // out.shape[-1], tensors[_BY_MATRIX[op]].nbytes
    elif op in _ATTENTIONS:
        rows = tensors[0].shape[2]
    return Kernel(
        str(op).split(".")[-2],
        KERNELS[op](out, *args) if flops is None else flops,
        moved,
        out.dtype,
        rows=rows,
        matrix_bytes=matrix_bytes,
        reads_state=op in _BY_STATE,
    )
