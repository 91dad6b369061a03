"""What `normalize` rewrites: the same numbers, in the operators that have rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (defines an operator of its experts)
from torch import Tensor, fx, nn
from torch.export import Dim

import spdcompile.runtime.grouped  # noqa: F401  (gives the operator its kernel)
from spdcompile.passes.base import BlockGraph, ParamRef, Part, Program
from spdcompile.passes.normalize import normalize
from spdcompile.passes.ops import GROUPED_MM
from tests.compare import rel_err

aten = torch.ops.aten
ENDS = torch.tensor([1, 1, 4], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


class _Calling(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return (self.function(*inputs),)


def exported(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> Program:
    """A program of one part that computes `function`; `dynamic` makes each first dim symbolic."""
    dims = tuple({0: Dim("length")} if x.dim() else {} for x in inputs) if dynamic else None
    export = torch.export.export(
        _Calling(function), inputs, dynamic_shapes={"inputs": dims} if dims else None, strict=False
    )
    graph = export.graph_module.graph
    params = {
        spec.arg.name: ParamRef(spec.target, (), torch.int64, constant=True)
        for spec in export.graph_signature.input_specs
        if spec.target
    }
    nodes = graph.find_nodes(op="placeholder")
    names = [node.name for node in nodes if node.name not in params]
    part = Part("model", None, "model", params, {name: name for name in names}, ("logits",))
    return Program(
        graphs={"model": BlockGraph(fx.GraphModule({}, graph))},
        parts=(part,),
        inputs=tuple(names),
        output="logits",
        layers="",
        constants=export.constants,
    )


def operators_of(program: Program) -> list[Any]:
    """The operators of a program of one part, in order; sizes apart."""
    graph = program.graphs["model"].module.graph
    return [node.target for node in graph.nodes if node.op == "call_function"]


def run(program: Program, *inputs: Tensor) -> Tensor:
    """The program's one result; its constants come first."""
    return program.graphs["model"].module(*program.constants.values(), *inputs)[0]


@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        (torch.float64, torch.ops.transformers.grouped_mm_fallback),
        (torch.bfloat16, lambda a, b, ends: F.grouped_mm(a, b, offs=ends)),
        (torch.bfloat16, lambda *x: aten._grouped_mm(*x, None, torch.bfloat16)),
    ],
)
def test_experts_become_one_operator(dtype: torch.dtype, target: Callable[..., Any]) -> None:
    rows, weight = torch.randn(4, 8).to(dtype), torch.randn(3, 8, 16).to(dtype)
    program = exported(target, rows, weight, ENDS)
    result = normalize(program)
    assert operators_of(result.program) == [GROUPED_MM]
    found = run(result.program, rows, weight, ENDS)
    assert found.dtype == dtype and rel_err(found, target(rows, weight, ENDS)) < 1e-13
    assert GROUPED_MM not in operators_of(program)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_sizes_of_another_value_become_sizes(dynamic: bool) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return x.reshape_as(y) + x.view_as(y).mT.mT

    x, y = torch.randn(5, 6), torch.randn(5, 2, 3)
    program = normalize(exported(function, x, y, dynamic=dynamic)).program
    assert {aten.reshape_as.default, aten.view_as.default, aten.mT.default}.isdisjoint(
        operators_of(program)
    )
    assert run(program, x, y).equal(function(x, y))


@pytest.mark.parametrize("largest", [torch.sym_max, torch.sym_min])
def test_sizes_in_a_known_order_are_settled(largest: Callable[..., Any]) -> None:
    def function(x: Tensor) -> Tensor:
        return x.sum(0) * largest(1 - x.shape[0], 0) + largest(x.shape[0], 4)

    x = torch.randn(7, 6)
    program = normalize(exported(function, x, dynamic=True)).program
    assert operators_of(program).count(largest) == 1
    assert run(program, x).equal(function(x))


def test_grouped_product_of_blocks_stays() -> None:
    a, b = torch.randn(3, 8, 8).bfloat16(), torch.randn(3, 8, 16).bfloat16()
    program = normalize(exported(F.grouped_mm, a, b)).program
    assert operators_of(program) == [aten._grouped_mm.default]


def _half(x: Tensor, y: Tensor) -> Tensor:
    """A key made of two parts, written one after the other into an empty tensor."""
    out = torch.empty(x.shape[0], 3, 6, dtype=x.dtype)
    out = torch.slice_scatter(out, aten.copy(out[..., :2], x), 2, 0, 2)
    return torch.slice_scatter(out, aten.copy(out[..., 2:], y), 2, 2)


def _overwritten(x: Tensor, y: Tensor) -> Tensor:
    """A slice in the middle, an index, and the middle read again."""
    out = torch.slice_scatter(torch.cat([x, y], -1), y[..., :3], 2, 1, 4)
    out = torch.select_scatter(out, y[..., 0], -1, -1)
    return out + out[..., 1:4].sum()


WRITES = {
    "two halves": _half,
    "parts": _overwritten,
    "first dim": lambda x, y: torch.slice_scatter(x, y[:1, :, :2], 0, 0, 1),
    "first dim to the end": lambda x, y: torch.slice_scatter(x, y[1:, :, :2], 0, 1),
    "cast": lambda x, y: aten.copy(x.float(), y[..., :2]),
    "every index": lambda x, y: torch.select_scatter(x, y[0, :, :2], 0, 3),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", WRITES)
def test_writes_become_joined_parts(case: str, dynamic: bool) -> None:
    function = WRITES[case]
    x, y = torch.randn(5, 3, 2).double(), torch.randn(5, 1, 4).double().expand(-1, 3, -1)
    if case == "every index":
        dynamic = False
    program = normalize(exported(function, x, y, dynamic=dynamic)).program
    written = (aten.slice_scatter.default, aten.select_scatter.default, aten.copy.default)
    assert not set(written) & set(operators_of(program))
    assert torch.equal(run(program, x, y), function(x, y))
    if dynamic:
        assert torch.equal(run(program, x[:4], y[:4]), function(x[:4], y[:4]))


def test_a_key_of_two_parts_is_one_join() -> None:
    x, y = torch.randn(5, 3, 2).double(), torch.randn(5, 3, 4).double()
    program = normalize(exported(_half, x, y)).program
    assert operators_of(program) == [aten.cat.default]
    assert torch.equal(run(program, x, y), torch.cat([x, y], -1))


def test_write_with_a_step_stays() -> None:
    x, y = torch.randn(4), torch.randn(2)
    program = normalize(exported(lambda x, y: torch.slice_scatter(x, y, 0, 0, 4, 2), x, y)).program
    assert operators_of(program) == [aten.slice_scatter.default]


READS = {
    "all": (lambda x: torch.cat([x, x])[:4] * 2, [aten.cat.default, aten.mul.Tensor]),
    "part": (lambda x: torch.cat([x, -x], 1)[:, 3:] * 2, [aten.neg.default, aten.mul.Tensor]),
    "two parts": (
        lambda x: torch.cat([x, -x, x], 1)[:, 3:],
        [aten.neg.default, aten.cat.default],
    ),
    "in a part": (
        lambda x: torch.cat([x, -x], 1)[:, 2:],
        [aten.neg.default, aten.cat.default, aten.slice.Tensor],
    ),
}


@pytest.mark.parametrize("case", READS)
def test_slice_of_joined_parts_is_one_of_them(case: str) -> None:
    function, operators = READS[case]
    x = torch.randn(2, 3, 6)
    program = normalize(exported(function, x)).program
    assert operators_of(program) == operators
    assert torch.equal(run(program, x), function(x))


@pytest.mark.parametrize(
    ("index", "target"),
    [
        ([-1], aten.slice.Tensor),
        ([2, 3], aten.slice.Tensor),
        ([-2, -1], aten.slice.Tensor),
        ([3, 2], aten.index.Tensor),
        ([0, 2], aten.index.Tensor),
    ],
)
def test_index_by_a_constant_becomes_a_slice(index: list[int], target: Any) -> None:
    def function(x: Tensor) -> Tensor:
        return x[:, :, torch.tensor(index)]

    x = torch.randn(2, 3, 4)
    program = normalize(exported(function, x)).program
    assert operators_of(program)[-1] is target
    found, wanted = run(program, x), function(x)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("function", "target"),
    [
        (lambda x: torch.multiply(x, x), aten.mul.Tensor),
        (lambda x: torch.subtract(x, x[:1]), aten.sub.Tensor),
        (lambda x: torch.max(x, x[:1]), aten.maximum.default),
        (lambda x: torch.concat([x, x]), aten.cat.default),
        (lambda x: torch.clip(x, -0.5, 0.5), aten.clamp.default),
        (lambda x: x.new_zeros(2, 3), aten.zeros.default),
        (lambda x: x.new_ones(2, 3, dtype=torch.int32), aten.ones.default),
        (lambda x: x.new_full((x.shape[0], 3), 2.5), aten.full.default),
        (lambda x: torch.nn.functional.pad(x, [1, 2]), aten.constant_pad_nd.default),
        (lambda x: torch.nn.functional.pad(x, [1, 2], value=3.0), aten.constant_pad_nd.default),
    ],
)
def test_other_names_become_the_known_one(function: Callable[..., Any], target: Any) -> None:
    x = torch.randn(3, 4)
    program = normalize(exported(function, x)).program
    assert operators_of(program)[-1] is target
    found, wanted = run(program, x), function(x)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)
