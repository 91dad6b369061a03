"""The replacement of `conv1d` against a loop over ranks.

Shapes: R ranks, B batch, C channels, T times.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spdcompile.runtime.convolution import CONVOLUTION_REPLACEMENTS
from tests.compare import rel_err
from tests.runtime.operator_cases import R
from tests.runtime.test_compiled_operators import Counting
from tests.runtime.test_exchange import assert_replaces

pytestmark = pytest.mark.usefixtures("reproducible")

(CONV1D,) = CONVOLUTION_REPLACEMENTS.values()
B, C, T = 2, 4, 7
# Which of x, the weight and the bias each rank has for itself.
DIMS = [(0, 0, 0), (0, None, None), (None, 0, None), (2, 1, 0), (None, None, 0), (0, 0, None)]


def operands(dims: tuple[Any, ...], *parts: Tensor) -> list[Tensor]:
    return [x[0] if dim is None else x.movedim(0, dim) for dim, x in zip(dims, parts, strict=True)]


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("groups", [1, 2, C])
@pytest.mark.parametrize("padding", [0, 3])
def test_replacement_matches_aten(dims: tuple[Any, ...], groups: int, padding: int) -> None:
    x, bias = torch.randn(R, B, C, T).double(), torch.randn(R, C).double()
    weight = torch.randn(R, C, C // groups, 3).double()
    rest = ([1], [padding], [1], groups)
    assert_replaces(
        lambda *args: CONV1D(*args, *rest),
        lambda *args: F.conv1d(*args, *rest),
        operands(dims, x, weight, bias),
        dims,
    )


def test_replacement_takes_optional_arguments() -> None:
    x, weight = torch.randn(R, B, C, T).double(), torch.randn(R, C, C, 3).double()
    assert_replaces(CONV1D, F.conv1d, [x, weight], [0, 0])
    assert_replaces(
        lambda x, w: CONV1D(x, w, None, [2]),
        lambda x, w: F.conv1d(x, w, None, 2),
        [x, weight],
        [0, 0],
    )


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)], ids=str)
def test_new_lengths_compile_nothing(dims: tuple[Any, ...]) -> None:
    backend = Counting()
    mapped = torch.vmap(lambda x, w: CONV1D(x, w, None, [1], [3], [1], C), dims)
    compiled = torch.compile(mapped, backend=backend, fullgraph=True, dynamic=True)
    weight = torch.nn.Parameter(torch.randn(R, C, 1, 4), requires_grad=False)
    # Torch tells batches of 16 and more from smaller ones.
    for batch, length in ((5, 11), (3, 6), (3, 9), (4, 17)):
        x = torch.randn(R, batch, C, length)
        args = [p[0] if dim is None else p for p, dim in zip((x, weight), dims, strict=True)]
        assert rel_err(compiled(*args), mapped(*args)) < 1e-6
    assert backend.count == 1
