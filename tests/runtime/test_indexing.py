"""Replacements of indexing operators against a loop over ranks.

Shapes: R ranks, N rows, C channels, K rows that are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spdcompile.runtime.indexing import INDEXING_REPLACEMENTS
from tests.compare import rel_err
from tests.runtime.operator_cases import R
from tests.runtime.test_compiled_operators import Counting
from tests.runtime.test_exchange import assert_replaces

pytestmark = pytest.mark.usefixtures("reproducible")

aten = torch.ops.aten
N, C, K = 5, 4, 3
# Which of x, the index and the source each rank has for itself.
DIMS = [(0, None, 0), (0, 0, 0), (1, 1, 1), (0, None, None), (None, 0, 0), (None, 0, None)]


def distinct(*shape: int) -> Tensor:
    """Indices into N rows, [..., K], none twice: what is written twice is not determined."""
    return torch.argsort(torch.rand(*shape, N), -1)[..., :K]


def operands(dims: tuple[Any, ...], *parts: Tensor) -> list[Tensor]:
    """Each [R, ...], as a vmapped dim lies, or one for all ranks."""
    return [x[0] if dim is None else x.movedim(0, dim) for dim, x in zip(dims, parts, strict=False)]


def check(op: Any, dim: int, dims: tuple[Any, ...], *parts: Tensor) -> None:
    """The replacement of `op` on (x, dim, index, ...)."""
    replacement = INDEXING_REPLACEMENTS[op]
    args = operands(dims, *parts)
    assert_replaces(
        lambda x, *rest: replacement(x, dim, *rest),
        lambda x, *rest: op(x, dim, *rest),
        args,
        dims[: len(args)],
    )


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_replacement_by_rows_matches_aten(dim: int, dims: tuple[Any, ...]) -> None:
    shape, part = [R, 2, 2], [R, 2, 2]
    shape[dim if dim < 0 else dim + 1], part[dim if dim < 0 else dim + 1] = N, K
    x, source, index = torch.randn(shape).double(), torch.randn(part).double(), distinct(R)
    check(aten.index_select.default, dim, dims, x, index)
    check(aten.index_add.default, dim, dims, x, index, source)
    check(aten.index_copy.default, dim, dims, x, index, source)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dim", [1, -1])
def test_replacement_by_position_matches_aten(dim: int, dims: tuple[Any, ...]) -> None:
    x, source, index = torch.randn(R, C, N).double(), torch.randn(R, C, K).double(), distinct(R, C)
    check(aten.gather.default, dim, dims, x, index)
    check(aten.scatter.src, dim, dims, x, index, source)
    check(aten.scatter_add.default, dim, dims, x, index, source)


@pytest.mark.parametrize("dims", [(0, None), (0, 0), (None, 1)], ids=str)
def test_scattering_a_number_matches_aten(dims: tuple[Any, ...]) -> None:
    args = operands(dims, torch.randn(R, C, N).double(), distinct(R, C))
    replacement = INDEXING_REPLACEMENTS[aten.scatter.value]
    assert_replaces(
        lambda x, index: replacement(x, 1, index, 2.5),
        lambda x, index: aten.scatter(x, 1, index, 2.5),
        args,
        dims,
    )


@pytest.mark.parametrize("dims", [(0, None, 0), (0, 0, None)], ids=str)
def test_index_add_keeps_its_factor(dims: tuple[Any, ...]) -> None:
    parts = torch.randn(R, N, C).double(), distinct(R), torch.randn(R, K, C).double()
    replacement = INDEXING_REPLACEMENTS[aten.index_add.default]
    assert_replaces(
        lambda x, index, source: replacement(x, 0, index, source, alpha=3),
        lambda x, index, source: aten.index_add(x, 0, index, source, alpha=3),
        operands(dims, *parts),
        dims,
    )


def _calls(op: Any, length: int) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """A function of (x, index, source), and tensors of the given length."""
    replacement = INDEXING_REPLACEMENTS[op]
    x, source = torch.randn(R, length, C), torch.randn(R, length, C)
    index = torch.randperm(length)
    if op in (aten.gather.default, aten.scatter.src, aten.scatter_add.default, aten.scatter.value):
        index = index[:, None].expand(-1, C)
    if op in (aten.gather.default, aten.index_select.default):
        return lambda x, index, source: replacement(x, 0, index) + source, (x, index, source)
    if op is aten.scatter.value:
        return lambda x, index, source: replacement(x, 0, index, 2.0) + source, (x, index, source)
    return lambda x, index, source: replacement(x, 0, index, source), (x, index, source)


@pytest.mark.parametrize("op", INDEXING_REPLACEMENTS, ids=str)
def test_new_lengths_compile_nothing(op: Any) -> None:
    backend = Counting()
    mapped = torch.vmap(_calls(op, 3)[0], (0, None, 0))
    compiled = torch.compile(mapped, backend=backend, fullgraph=True, dynamic=True)
    for length in (11, 5, 9, 17):
        _, args = _calls(op, length)
        assert rel_err(compiled(*args), mapped(*args)) < 1e-6
    assert backend.count == 1
