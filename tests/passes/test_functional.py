"""Writes in place against torch's own run: plain ones become functional, others are left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spdcompile.passes.functional import made_functional, writes_in_place


class _Calls(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y)


def whole(x: Tensor, y: Tensor) -> Tensor:
    a = x * 2
    b = a + y
    a.mul_(y)
    return a + b


def returned(x: Tensor, y: Tensor) -> Tensor:
    return (x + y).clamp_(-0.5, 0.5).add_(y) * 3


def of_a_view(x: Tensor, y: Tensor) -> Tensor:
    return (x + y).view(2, 12).mul_(2.0).sum(1)


def parts(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_empty(4, 12)
    out[:, :6] = x
    out[:, 6:] = y
    return out * 2


def row_of_part(x: Tensor, y: Tensor) -> Tensor:
    out = x * 1
    out[1:][0].add_(y[0])
    return out * 2


def masked(x: Tensor, y: Tensor) -> Tensor:
    out = x.exp()
    out.masked_fill_(y > 0, 0.0)
    return out


def scattered(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out.scatter_(1, (y > 0).long(), x)
    return out


def part_twice(x: Tensor, y: Tensor) -> Tensor:
    out = x * 1
    part = out[:, :2]
    part.mul_(3.0)
    part.add_(y[:, :2])
    return out


def seen_through_a_transpose(x: Tensor, y: Tensor) -> Tensor:
    out = x * 1
    turned = out.t()
    out.add_(y)
    return turned


def through_a_transpose(x: Tensor, y: Tensor) -> Tensor:
    out = x * 1
    out.t().add_(y.t())
    return out


PLAIN = (whole, returned, of_a_view, parts, row_of_part, masked, scattered)
TANGLED = (part_twice, seen_through_a_transpose, through_a_transpose)


@pytest.mark.parametrize("function", PLAIN, ids=lambda f: f.__name__)
def test_plain_writes_become_functional(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, y, exported = _exported(function)
    assert any(writes_in_place(node) for node in exported.graph.nodes)
    graph = made_functional(exported.graph)
    assert graph is not None
    assert not any(writes_in_place(node) for node in graph.nodes)
    graph.lint()
    (result,) = torch.fx.GraphModule({}, graph)(x, y)
    assert torch.equal(result, function(x, y))


@pytest.mark.parametrize("function", TANGLED, ids=lambda f: f.__name__)
def test_other_writes_are_left_to_torch(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    _, _, exported = _exported(function)
    before = str(exported.graph)
    assert made_functional(exported.graph) is None
    assert str(exported.graph) == before


def test_a_result_of_another_dtype_is_left() -> None:
    def promoted(x: Tensor, y: Tensor) -> Tensor:
        return (x.half() * 1).mul_(y)

    assert made_functional(_exported(promoted)[2].graph) is None


def test_a_written_input_is_left() -> None:
    assert made_functional(_exported(lambda x, y: x.add_(y) * 2)[2].graph) is None


def _exported(
    function: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, torch.export.ExportedProgram]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 6, generator=generator)
    return x, y, torch.export.export(_Calls(function), (x, y), strict=False)
