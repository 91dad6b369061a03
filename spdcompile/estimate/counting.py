"""Kernels and collectives of one graph, counted by running it on the meta device.

An operator of `KERNELS` is a kernel of its own: it reads its inputs and writes its output. What
lies between those is taken to be fused: operators that feed each other without a kernel or a
collective between them are one kernel, which reads what comes from elsewhere, each value once, and
writes what goes elsewhere.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from spdcompile.errors import UsageError
from spdcompile.estimate.kernels import FUSED, KERNELS, Kernel, kernel_of
from spdcompile.passes.ops import GATHER, SYNC, TAKE

_ATEN = torch.ops.aten


class Kind(enum.Enum):
    """A kind of collective."""

    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"


_COLLECTIVES = {SYNC: Kind.ALL_REDUCE, GATHER: Kind.ALL_GATHER}


class Counting(fx.Interpreter):
    """Runs one graph, and notes every kernel and collective.

    Args:
        ranks: number of them, by which a gather's result is larger than its input.
    """

    def __init__(self, module: fx.GraphModule, ranks: int) -> None:
        super().__init__(module)
        self.ranks = ranks
        self.exchanges: list[tuple[Kind, str, int]] = []
        self._own: dict[fx.Node, Kernel] = {}
        self._sizes: dict[fx.Node, int] = {}
        self._dtypes: dict[fx.Node, torch.dtype] = {}
        self._groups: dict[fx.Node, fx.Node] = {}
        self._stages: dict[fx.Node, int] = {}

    def run_node(self, node: fx.Node) -> Any:
        """Runs a node, and notes what it is.

        Raises:
            UsageError: an operator whose cost is not known.
        """
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        with FlopCounterMode(display=False) as counter:
            result = getattr(self, node.op)(node.target, args, kwargs)
        if node.op == "call_function":
            result = self._noted(node, args, result, counter.get_total_flops())
        if isinstance(result, Tensor):
            self._sizes[node], self._dtypes[node] = result.nbytes, result.dtype
        self._stages[node] = self._stage(node)
        if not self._is_alone(node):
            self._join(node)
        return result

    def _noted(self, node: fx.Node, args: tuple[Any, ...], result: Any, flops: float) -> Any:
        if node.target in _COLLECTIVES:
            kind = _COLLECTIVES[node.target]
            if kind is Kind.ALL_GATHER:
                shape = list(result.shape)
                shape[node.args[1]] *= self.ranks
                result = result.new_empty(shape)
            name = node.args[1] if kind is Kind.ALL_REDUCE else "gather"
            self.exchanges.append((kind, name, result.nbytes))
            return result
        out = result if isinstance(result, Tensor) else next(_tensors(args), None)
        if node.target in KERNELS:
            self._own[node] = kernel_of(node.target, out, args)
        elif flops and isinstance(out, Tensor):
            self._own[node] = kernel_of(node.target, out, args, flops)
        elif getattr(node.target, "namespace", "") == "spd" and node.target is not TAKE:
            raise UsageError(
                "The cost of an operator is not known.",
                where=node.name,
                found=str(node.target),
                needed="an operator with a row in KERNELS (estimate/kernels.py)",
            )
        return result

    def kernels(self) -> Iterator[Kernel]:
        """All kernels: those of their own, and what is fused between them."""
        moved: dict[fx.Node, int] = defaultdict(int)
        for node, size in self._sizes.items():
            if _is_view(node):
                continue  # it moves nothing; who reads it reads what it is a view of
            group = self._group(node)
            readers = {self._group(user) for user in _readers(node)}
            for reader in readers - {group, None}:
                moved[reader] += size
            if group is not None and readers - {group}:
                moved[group] += size
        for node in self.module.graph.nodes:
            if node in self._own:
                yield self._own[node]
            elif moved.get(node):
                yield Kernel(FUSED, 0.0, moved[node], self._dtypes.get(node, torch.float32))

    def _stage(self, node: fx.Node) -> int:
        """How many kernels and collectives lie before it on the longest way there."""
        before = [self._stages[x] + self._is_alone(x) for x in node.all_input_nodes]
        return max(before, default=0)

    def _join(self, node: fx.Node) -> None:
        """Puts fused code into the kernel of what feeds it at the same stage."""
        self._groups[node] = node
        for source in node.all_input_nodes:
            root = self._group(source)
            if root is not None and self._stages[source] == self._stages[node]:
                own = self._group(node)
                assert own is not None, "it is fused"
                self._groups[max(own, root)] = min(own, root)

    def _group(self, node: fx.Node) -> fx.Node | None:
        """The first node of its kernel; None if it is no part of fused code."""
        while node in self._groups and self._groups[node] is not node:
            node = self._groups[node]
        return self._groups.get(node)

    def _is_alone(self, node: fx.Node) -> bool:
        """Whether it is no part of fused code."""
        return node.op != "call_function" or node in self._own or node.target in _COLLECTIVES


def _tensors(args: Any) -> Iterator[Tensor]:
    """All tensors of some arguments, those in lists included."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _tensors(arg)


_SHAPES = ("view", "reshape", "transpose", "permute", "unsqueeze", "expand", "slice", "select")
_VIEWS = frozenset(getattr(_ATEN, name) for name in _SHAPES)


def _is_view(node: fx.Node) -> bool:
    """Whether it moves nothing."""
    return getattr(node.target, "overloadpacket", None) in _VIEWS


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, directly or through views."""
    for user in node.users:
        if _is_view(user):
            yield from _readers(user)
        else:
            yield user
