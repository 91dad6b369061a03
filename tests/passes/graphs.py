"""Small programs built by hand: one block, one position, so that a test shows all there is.

Shapes: [1, 1, D] for values, [out, in] for weights; batch and length are 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from spdcompile.passes.assign import Assign
from spdcompile.passes.base import (
    BlockGraph,
    ParamRef,
    Part,
    PassResult,
    Program,
    add_call,
)
from spdcompile.passes.drop import Drop
from spdcompile.passes.localize import localize
from spdcompile.passes.propagate import propagate
from spdcompile.passes.regions import FindRegions
from spdcompile.passes.sync import insert_sync_points
from spdcompile.runtime.executor import Backend
from spdcompile.runtime.local import LocalExecutor

aten = torch.ops.aten
HIDDEN, CHANNELS = 6, 8


class Block:
    """Writes the graph of a program of one part, `layers.0`, whose input is `x`.

    Its regions, and so its sync points, are named mlp, mlp_2, ... in graph order.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.params: dict[str, ParamRef] = {}
        self.x = self._placeholder("x", (1, 1, HIDDEN))

    def param(self, name: str, *shape: int) -> fx.Node:
        """A parameter, found under `name` in the checkpoint."""
        self.params[name] = ParamRef(name, shape, torch.float64)
        with self.graph.inserting_before(self.x):
            return self._placeholder(name, shape)

    def call(self, target: Callable[..., Any], *args: Any, at: str = "") -> fx.Node:
        """A call of an operator by the module `at`."""
        value = target(*fx.map_arg(args, lambda node: node.meta["val"]))
        stack = {"": (f"model.layers.0.{at}", object)} if at else {}
        return add_call(self.graph, target, args, {"val": value, "nn_module_stack": stack})

    def mlp(self, x: fx.Node, name: str, *, bias: bool = False) -> fx.Node:
        """down(relu(up(x))): channels that can be split, and a partial sum."""
        up = self.param(f"{name}_up", CHANNELS, HIDDEN)
        down = self.param(f"{name}_down", HIDDEN, CHANNELS)
        inner = self.call(aten.relu.default, self.call(aten.linear.default, x, up))
        biases = (self.param(f"{name}_bias", HIDDEN),) if bias else ()
        return self.call(aten.linear.default, inner, down, *biases, at=name)

    def add(self, a: fx.Node, b: Any) -> fx.Node:
        """a + b."""
        return self.call(aten.add.Tensor, a, b)

    def program(self, result: fx.Node) -> Program:
        """The program that returns `result`."""
        self.graph.output((result,))
        module = fx.GraphModule({}, self.graph)
        part = Part(
            name="layers.0",
            layer=0,
            graph="block",
            params=self.params,
            inputs={"x": "x"},
            outputs=("y",),
            module="layers.0",
        )
        # The output is not the logits, so that no region is taken for a language model head.
        return Program({"block": BlockGraph(module)}, (part,), ("x",), "logits", "layers")

    def _placeholder(self, name: str, shape: tuple[int, ...]) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta = {"val": torch.empty(shape, dtype=torch.float64, device="meta")}
        return node


def placed(program: Program, tp: int = 2) -> PassResult:
    """The program after regions, assign and propagate, with all that they refused."""
    found = FindRegions(tp)(program)
    result = propagate(Assign(tp, {})(found.program).program)
    return PassResult(result.program, result.rewrites, (*found.refusals, *result.refusals))


def synced(program: Program, tp: int = 2) -> Program:
    """The program before drop."""
    return localize(insert_sync_points(placed(program, tp).program).program).program


def dropped(program: Program, *names: str) -> Program:
    """The program without the named sync points of its block."""
    return Drop(frozenset((0, name) for name in names))(program).program


def values(program: Program) -> dict[str, Tensor]:
    """Random data for `x` and every parameter."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (1, 1, HIDDEN)}
    shapes |= {ref.fqn: ref.shape for ref in program.parts[0].params.values() if not ref.constant}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in sorted(shapes.items())
    }


def run(program: Program, data: Mapping[str, Tensor]) -> Tensor:
    """The block's output with all ranks in this process."""
    executor = LocalExecutor(program, data, backend=Backend.EAGER, device=torch.device("cpu"))
    return executor.call(program.parts[0], {"x": data["x"]})["y"]


def run_whole(program: Program, data: Mapping[str, Tensor]) -> Tensor:
    """The output of a program that no pass has touched, computed on whole tensors."""
    module = program.graphs["block"].module
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    return module(*(data[name] for name in names))[0]


def calls(program: Program, target: object) -> list[fx.Node]:
    """The block's calls of an operator, in order."""
    graph = program.graph_of(program.parts[0]).module.graph
    return [node for node in graph.nodes if node.target is target]
