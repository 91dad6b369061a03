"""Rewrites a graph whose values may be pending sums, (R, P): a rank holds R + its own P.

A partial sum is not summed where it arises but carried along, through whatever is linear, to the
first operator that is not. There a pending value with a kept sync point is *settled*: R + sum P.
So partials that meet in an addition share one all-reduce, exactly. A pending value all of whose
sync points are dropped is *shown* instead: each rank goes on with its own R + P, and P stays
pending beside it until the next kept point (SPD, arXiv 2502.20727, in its general form).

A value computed from a shown one *varies*: it differs from rank to rank. It may feed split linears,
whose partial sums become pending in turn. It must not reach the residual stream or the block's
output by any other way, or the ranks would disagree for good: then the drop is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from spdcompile.passes.base import add_call, module_path
from spdcompile.passes.linearity import carries, is_size, tensor_args
from spdcompile.passes.ops import SYNC
from spdcompile.passes.placement.types import P, R, V
from spdcompile.passes.residual import LeakError, Pending, Rewritten, Value
from spdcompile.passes.routing import CHOOSES, ReplicatedPart, choice_error, weighs
from spdcompile.plan import Router

aten = torch.ops.aten
Source = Callable[[fx.Node, Callable[[fx.Node], fx.Node]], Pending | None]


class PendingRewriter:
    """Interprets a graph on pending values and writes the graph that results.

    Args:
        source: for a node of the old graph at which a pending value arises: that value; it gets
            the node and a function that copies the node into the new graph.
        pending_inputs: placeholders that come in as a pair (R, P).
        router: what a choosing operator reads; see routing.py.
    """

    def __init__(
        self,
        graph: fx.Graph,
        source: Source,
        pending_inputs: frozenset[str] = frozenset(),
        router: Router = Router.EXACT,
    ) -> None:
        self.old, self.source, self.pending_inputs = graph, source, pending_inputs
        self.new = fx.Graph()
        self.env: dict[fx.Node, Value] = {}
        self.varies: dict[fx.Node, str] = {}
        self.unsteady: set[fx.Node] = set()
        self.order: list[str] = []
        self.points: list[tuple[str, ...]] = []
        self.partial_inputs: dict[str, str] = {}
        self.partial_outputs: dict[int, int] = {}
        chooses = any(node.target in CHOOSES for node in graph.nodes)
        self.routers: list[str] = []
        self.routes = chooses and router is Router.REPLICATED
        self.replicated = ReplicatedPart(
            self.new, self.env, self.varies, self._whole_of, self.plain
        )

    def run(self) -> Rewritten:
        """The new graph.

        Raises:
            LeakError: a value that differs between the ranks gets where it must not.
        """
        for node in self.old.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                value = self.source(node, self._copy)
                if value is None:
                    value = self._step(node)
                else:
                    self.order += value.points
                    if not value.kept:
                        self._note_unsteady(node)
                self.env[node] = self._settle_early(node, value)
            else:
                self._output(node)
        if self.routes:
            self.new.eliminate_dead_code()  # what ranks would have chosen by themselves
        return Rewritten(
            self.new,
            tuple(self.points),
            self.partial_inputs,
            self.partial_outputs,
            tuple(dict.fromkeys((*self.routers, *self.replicated.projections))),
        )

    def plain(self, node: fx.Node) -> fx.Node:
        """The value of an old node as one node of the new graph: settled or shown."""
        value = self.env[node]
        if isinstance(value, fx.Node):
            return value
        if value.seen is None:
            value.seen = self._settle(value) if value.kept else self._show(value)
        return value.seen

    def _placeholder(self, node: fx.Node) -> None:
        whole = self._placeholder_like(node, node.name, node.meta["placement"])
        self.env[node] = whole
        if node.name in self.pending_inputs:
            partial = self._placeholder_like(node, f"{node.name}_partial", P)
            self.partial_inputs[whole.name] = partial.name
            self.env[node] = Pending(whole, partial, (), kept=False)
            self._note_unsteady(node)

    def _note_unsteady(self, node: fx.Node) -> None:
        """What follows from a value that is not summed may differ from rank to rank."""
        found = [node]
        while found:
            one = found.pop()
            if one not in self.unsteady:
                self.unsteady.add(one)
                found += [user for user in one.users if user.target is not SYNC]

    def _copy(self, node: fx.Node) -> fx.Node:
        """The node in the new graph, reading plain values."""
        reads = [self._read(node, arg) for arg in node.all_input_nodes]
        varying = [arg for arg in reads if arg in self.varies]
        if varying and node.target in CHOOSES:
            raise choice_error(node)
        args = fx.map_arg(node.args, lambda arg: self._read(node, arg))
        kwargs = fx.map_arg(node.kwargs, lambda arg: self._read(node, arg))
        new = add_call(self.new, node.target, args, node.meta, kwargs)
        if varying and new.meta["placement"] == R:
            self._mark_varying(new, self._origin(node, reads, varying))
        return new

    def _read(self, node: fx.Node, arg: fx.Node) -> fx.Node:
        """What a node reads of an operand: as the rank sees it, or the replicated part alone."""
        if self.routes and (node.target in CHOOSES or weighs(node, arg)):
            found = self.replicated.of(arg)
            if node.target in CHOOSES and found is not self.plain(arg):
                self.routers.append(module_path(node))
            return found
        return self.plain(arg)

    def _whole_of(self, value: Pending) -> fx.Node | None:
        """R of a pending value, in the shape of P."""
        return None if value.whole is None else self._expanded(value.whole, value.partial)

    def _origin(self, node: fx.Node, reads: list[fx.Node], varying: list[fx.Node]) -> str:
        """The module whose varying result first meets a value that all ranks share, if it has."""
        known = [self.varies[arg] for arg in varying if self.varies[arg]]
        if known or node.target is not aten.add.Tensor:
            return known[0] if known else ""
        shape = node.meta["val"].shape
        shared = [arg for arg in reads if arg not in self.varies]
        if any(arg.meta["val"].shape == shape for arg in shared):
            return next(module_path(a) for a in node.args if self.plain(a) in self.varies)
        return ""

    def _copy_settled(self, node: fx.Node) -> fx.Node:
        """A copy of a node that may have read partial sums and now reads the sums."""
        new = self._copy(node)
        if new.meta["placement"] == P and all(
            arg.meta.get("placement") == R for arg in new.all_input_nodes
        ):
            new.meta["placement"] = R
        return new

    def _size(self, node: fx.Node) -> fx.Node:
        """A size: the same whichever half it is read off."""

        def half(arg: fx.Node) -> fx.Node:
            value = self.env[arg]
            return value.partial if isinstance(value, Pending) else value

        args = fx.map_arg(node.args, half)
        return add_call(self.new, node.target, args, node.meta, node.kwargs)

    def _step(self, node: fx.Node) -> Value:
        if is_size(node):
            return self._size(node)
        pending = [a for a in node.all_input_nodes if isinstance(self.env[a], Pending)]
        if not pending or not carries(node, frozenset(pending), self.unsteady):
            return self._copy_settled(node)
        if len(tensor_args(node)) > 1 and node.target is aten.add.Tensor:
            return self._add(node)
        (operand,) = pending
        value = self.env[operand]
        whole = self._whole_of(value)
        if whole is not None:
            whole = self._half(node, operand, whole, R)
        partial = self._half(node, operand, value.partial, P)
        return Pending(whole, partial, value.points, value.kept)

    def _expanded(self, whole: fx.Node, partial: fx.Node) -> fx.Node:
        """R in the shape of P; a bias is smaller, the pieces of one are expanded."""
        value, wanted = whole.meta["val"], partial.meta["val"]
        if isinstance(value, list | tuple) or str(value.shape) == str(wanted.shape):
            return whole
        args = (whole, partial)
        return add_call(self.new, aten.expand_as.default, args, partial.meta, placement=R)

    def _half(self, node: fx.Node, operand: fx.Node, half: fx.Node, placement: Any) -> fx.Node:
        """A linear operator on one half of a pending value."""

        def swap(arg: fx.Node) -> fx.Node:
            return half if arg is operand else self._read(node, arg)

        args, kwargs = fx.map_arg(node.args, swap), fx.map_arg(node.kwargs, swap)
        return add_call(self.new, node.target, args, node.meta, kwargs, placement=placement)

    def _add(self, node: fx.Node) -> Pending:
        """(Ra, Pa) + (Rb, Pb) = (Ra + Rb, Pa + Pb)."""
        values = [self.env[arg] for arg in node.args]
        whole = [v if isinstance(v, fx.Node) else v.whole for v in values]
        for half, arg in zip(whole, node.args, strict=True):
            if half in self.varies:
                raise LeakError(self._leak_text(half, arg))
        partials = [v.partial for v in values if isinstance(v, Pending)]
        pending = [v for v in values if isinstance(v, Pending)]
        met = {point for v in pending for point in v.points}
        points = tuple(point for point in self.order if point in met)
        return Pending(
            self._sum([half for half in whole if half is not None], node, R),
            self._sum(partials, node, P),
            points,
            any(v.kept for v in pending),
        )

    def _sum(self, terms: list[fx.Node], like: fx.Node, placement: Any) -> Any:
        if len(terms) < 2:
            return terms[0] if terms else None
        return add_call(self.new, aten.add.Tensor, tuple(terms), like.meta, placement=placement)

    def _settle_early(self, node: fx.Node, value: Value) -> Value:
        """Settles a kept value at once if some reader needs the sum: all read the same sum."""
        if isinstance(value, Pending) and value.kept:
            readers = [u for u in node.users if u.op != "output" and not is_size(u)]
            if not all(carries(user, frozenset({node}), self.unsteady) for user in readers):
                return self._settle(value)
        return value

    def _settle(self, value: Pending) -> fx.Node:
        """R + the sum of P over the ranks."""
        name = value.points[-1]
        self.points.append(value.points)
        total = add_call(self.new, SYNC, (value.partial, name), value.partial.meta, placement=R)
        if value.whole is None:
            return total
        return self._joined(value, total)

    def _show(self, value: Pending) -> fx.Node:
        """R + this rank's P."""
        if value.whole is None:
            self._mark_varying(value.partial, "")
            return value.partial
        shown = self._joined(value, value.partial)
        self._mark_varying(shown, "")
        return shown

    def _mark_varying(self, node: fx.Node, origin: str) -> None:
        self.varies[node] = origin
        node.meta["placement"] = V

    def _joined(self, value: Pending, addend: fx.Node) -> fx.Node:
        args = (value.whole, addend)
        return add_call(self.new, aten.add.Tensor, args, value.partial.meta, placement=R)

    def _output(self, node: fx.Node) -> None:
        results: list[fx.Node] = []
        extra: list[tuple[int, fx.Node]] = []
        for position, arg in enumerate(node.args[0]):
            value = self.env[arg]
            if isinstance(value, Pending) and not value.kept:
                if value.whole is None:
                    raise LeakError("the block's output would be a partial sum alone")
                extra.append((position, value.partial))
                results.append(value.whole)
            else:
                results.append(self.plain(arg))
            if results[-1] in self.varies:
                raise LeakError(self._leak_text(results[-1], arg))
        positions = [position for position, _ in extra]
        self.partial_outputs = {p: len(results) + n for n, p in enumerate(positions)}
        self.new.output((*results, *(partial for _, partial in extra)))

    def _leak_text(self, varying: fx.Node, arg: fx.Node) -> str:
        """Why a value that varies must not get onto the residual stream, named by its module."""
        where = self.varies[varying] or module_path(arg) or arg.name
        return (
            f"{where} acts on the sum before it reaches the residual stream; f(sum of P) is not "
            "the sum of f(P), so the partial sums cannot travel on to the next sync point"
        )

    def _placeholder_like(self, node: fx.Node, name: str, placement: Any) -> fx.Node:
        new = self.new.placeholder(name)
        new.meta = {**node.meta, "placement": placement}
        return new
