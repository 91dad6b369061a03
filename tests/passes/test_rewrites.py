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
from spdcompile.passes.base import BlockGraph, Part, Program
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
    names = [node.name for node in graph.find_nodes(op="placeholder")]
    part = Part("model", None, "model", {}, {name: name for name in names}, ("logits",))
    module = fx.GraphModule({}, graph)
    return Program({"model": BlockGraph(module)}, (part,), tuple(names), "logits", "")


def operators_of(program: Program) -> list[Any]:
    """The operators of a program of one part, in order; sizes apart."""
    graph = program.graphs["model"].module.graph
    return [node.target for node in graph.nodes if node.op == "call_function"]


def run(program: Program, *inputs: Tensor) -> Tensor:
    """The program's one result."""
    return program.graphs["model"].module(*inputs)[0]


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


def test_grouped_product_of_blocks_stays() -> None:
    a, b = torch.randn(3, 8, 8).bfloat16(), torch.randn(3, 8, 16).bfloat16()
    program = normalize(exported(F.grouped_mm, a, b)).program
    assert operators_of(program) == [aten._grouped_mm.default]
