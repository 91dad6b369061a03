"""What of a program's graphs bears witness to the cause of a difference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from torch import Tensor, fx

from spdcompile.passes.base import Part, Program
from spdcompile.passes.ops import ATTENTION, TAKE
from spdcompile.passes.roles import Roles, decide_roles


class Witness:
    """The graph of one part, before anything was split in it.

    Args:
        program: what `split` made.
    """

    def __init__(self, program: Program, part: Part, tp: int) -> None:
        self.graph, self.params = program.graph_of(part).module.graph, frozenset(part.params)
        self.tp, self.ends_program = tp, part.outputs == (program.output,)

    @cached_property
    def roles(self) -> Roles:
        """What the compiler decided about the graph's projections."""
        return decide_roles(self.graph, self.params, self.tp, ends_program=self.ends_program)

    def readers(self, name: str) -> str:
        """The operators that take a weight itself."""
        return _listed(user for node in self._named(name) for user in node.users)

    def operators(self, name: str) -> str:
        """The operators that compute on the features that a weight makes or contracts."""
        return _listed(self._touching(name))

    def shared_heads(self, name: str) -> str:
        """Whether K of the attention on a weight's features leaves the block or comes into it."""
        found = set()
        output = next(iter(self.graph.find_nodes(op="output")))
        for node in self._touching(name):
            if node.target is ATTENTION:
                chain = list(_sources(node.args[1]))
                found |= {"leaves" for key in chain if key in output.args[0]}
                found |= {"arrives" for key in chain if key.op == "placeholder"}
        return ", ".join(sorted(found))

    def _named(self, name: str) -> Iterator[fx.Node]:
        return (node for node in self.graph.find_nodes(op="placeholder") if node.name == name)

    def _touching(self, name: str) -> list[fx.Node]:
        flow, classes = self.roles.flow, set()
        for node, projection in flow.projections.items():
            if projection.weight.name == name:
                for ids in (flow.produced.get(node), flow.consumed.get(node)):
                    classes |= set() if ids is None else set(flow.class_of(ids))
        return [node for node, ids in flow.touched.items() if classes & set(flow.class_of(ids))]


def takes_shares(graph: fx.Graph, name: str) -> bool:
    """Whether each rank takes its share of a weight, or of a view of it, at run time."""
    takes = graph.find_nodes(op="call_function", target=TAKE)
    return any(node.name == name for take in takes for node in _sources(take.args[0]))


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """A value, what it is a view of, and so on."""
    yield node
    while len(given := list(filter(_is_tensor, node.all_input_nodes))) == 1:
        (node,) = given
        yield node


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _listed(nodes: Iterator[fx.Node] | list[fx.Node]) -> str:
    return ", ".join(sorted({str(node.target) for node in nodes}))
