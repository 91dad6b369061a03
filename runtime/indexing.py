"""Replacements of indexing operators whose own vmap rules freeze sizes (torch 2.13).

As `VMAP_REPLACEMENTS` in ops.py; importing this module registers them.

Shapes: R ranks (the vmapped dim), always in front here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from spdcompile.runtime._torch import OpOverload, define_copy

_LIBRARY = torch.library.Library("spd_indexing", "DEF")  # spd::gather is another operator
aten = torch.ops.aten
Rule = Callable[..., tuple[Tensor, int]]


def _ranks_first(info: Any, dim: int | None, value: Tensor) -> Tensor:
    """The vmapped dim in front, [R, ...]; a value that all ranks share is expanded."""
    return value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)


def _own_dim(info: Any, in_dims: Any, x: Tensor, dim: int) -> int:
    """Where the dim of a rank's x lies, counted from the front, once the ranks are in front."""
    return dim % (x.ndim - (in_dims[0] is not None)) + 1


def _everywhere(index: Tensor, like: Tensor, dim: int) -> Tensor:
    """index [R, k] as [R, ..., k, ...]: the same at each position of the other dims of `like`."""
    sizes = [1] * like.ndim
    sizes[0], sizes[dim] = index.shape
    shape = list(like.shape)
    shape[dim] = index.shape[1]
    return index.reshape(sizes).expand(shape)


def _index_select(
    info: Any, in_dims: Any, x: Tensor, dim: int, index: Tensor
) -> tuple[Tensor, int]:
    dim = _own_dim(info, in_dims, x, dim)
    x = _ranks_first(info, in_dims[0], x)
    if in_dims[2] is None:
        return x.index_select(dim, index), 0
    index = index.movedim(in_dims[2], 0)
    return x.gather(dim, _everywhere(index, x, dim)), 0


def _by_position(method: Callable[..., Tensor]) -> Rule:
    """(x, dim, index, ...) with an index of as many dims as x: gather, scatter and the like."""

    def rule(
        info: Any, in_dims: Any, x: Tensor, dim: int, index: Tensor, *source: Any
    ) -> tuple[Tensor, int]:
        dim = _own_dim(info, in_dims, x, dim)
        x, index = _ranks_first(info, in_dims[0], x), _ranks_first(info, in_dims[2], index)
        rest = [
            _ranks_first(info, d, s) if isinstance(s, Tensor) else s
            for d, s in zip(in_dims[3:], source, strict=True)
        ]
        return method(x, dim, index, *rest), 0

    return rule


def _index_add(
    info: Any,
    in_dims: Any,
    x: Tensor,
    dim: int,
    index: Tensor,
    source: Tensor,
    **settings: Any,
) -> tuple[Tensor, int]:
    dim = _own_dim(info, in_dims, x, dim)
    x, source = _ranks_first(info, in_dims[0], x), _ranks_first(info, in_dims[3], source)
    if in_dims[2] is None:
        return x.index_add(dim, index, source, **settings), 0
    index = index.movedim(in_dims[2], 0)
    source = source * settings.get("alpha", 1)
    return x.scatter_add(dim, _everywhere(index, source, dim), source), 0


def _index_copy(
    info: Any, in_dims: Any, x: Tensor, dim: int, index: Tensor, source: Tensor
) -> tuple[Tensor, int]:
    dim = _own_dim(info, in_dims, x, dim)
    x, source = _ranks_first(info, in_dims[0], x), _ranks_first(info, in_dims[3], source)
    if in_dims[2] is None:
        return x.index_copy(dim, index, source), 0
    index = index.movedim(in_dims[2], 0)
    return x.scatter(dim, _everywhere(index, source, dim), source), 0


_RULES: Mapping[OpOverload, Rule] = {
    aten.index_select.default: _index_select,
    aten.gather.default: _by_position(torch.gather),
    aten.scatter.src: _by_position(torch.scatter),
    aten.scatter.value: _by_position(torch.scatter),
    aten.scatter_add.default: _by_position(torch.scatter_add),
    aten.index_add.default: _index_add,
    aten.index_copy.default: _index_copy,
}


def _replacement(op: OpOverload, rule: Rule) -> OpOverload:
    copy = define_copy(_LIBRARY, op)
    torch.library.register_vmap(copy, rule, lib=_LIBRARY)
    return copy


INDEXING_REPLACEMENTS: Mapping[OpOverload, OpOverload] = MappingProxyType(
    {op: _replacement(op, rule) for op, rule in _RULES.items()}
)
