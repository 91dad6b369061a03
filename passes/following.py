"""Follows tokens through a graph: which dim of a value counts them, and where they are combined.

What the rules of `passes/placement/` carry on without a cut or an exchange, in a program that is
split by tokens, each one a unit of its own, is the same for every token on its own. Operators
without such a rule *mix* tokens. The module that multiplies a mixture of experts sorts its tokens
by expert and puts them back, which is taken as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import fx

from spdcompile.passes.base import Part, Program, module_path
from spdcompile.passes.concrete import call_of
from spdcompile.passes.layout import Layout
from spdcompile.passes.ops import ATTENTION, CALL, GROUPED_MM
from spdcompile.passes.placement import RULES
from spdcompile.passes.placement.movement import Movement
from spdcompile.passes.placement.types import R, Shard

aten = torch.ops.aten
COUNTING = (aten.arange.default, aten.arange.start, aten.arange.start_step)
SHAPE_ONLY = {
    *(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
    *(aten.new_empty.default, aten.zeros_like.default, aten.ones_like.default),
    *(aten.full_like.default, aten.empty_like.default),
}
_BATCH, _LENGTH = 2, 7


def _layout(share: int = 1, batch: int = 1) -> Layout:
    """A dim of the tokens' shares, one after the other, for one sequence after the other."""
    return Layout("tokens", _LENGTH, np.tile(np.repeat(np.arange(_LENGTH), share), batch))


LAYOUT = _layout()


class MixedError(Exception):
    """What keeps a program from running on new tokens alone."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """In place of a placement: a value with two dims of tokens, or none though it is made of them.

    A score of each pair of tokens, or a sum over all.
    """


MIXED = Mixed()


@dataclass(frozen=True, slots=True)
class Lie:
    """How a value lies.

    Args:
        free: it is computed from the attention mask and the number of tokens alone, so that at
            each step it can be had for all tokens.
    """

    placement: Any
    free: bool = False


def follow_program(program: Program) -> dict[str, Follower]:
    """How every value of every distinct graph lies, by key of the graph.

    Raises:
        MixedError: a graph has a form that cannot be followed.
    """
    ids = _input_of(program, program.parts[0], program.inputs[0])
    length = ids.meta["val"].shape[1].node.expr
    values = dict.fromkeys(program.inputs, Lie(Shard(1, LAYOUT)))
    values[program.inputs[1]] = Lie(Shard(1, LAYOUT), free=True)
    known: dict[str, Follower] = {}
    for part in program.parts:
        given = {name: values[value] for name, value in part.inputs.items()}
        if part.graph not in known:
            known[part.graph] = Follower(length, given, _masks(program, part))
            known[part.graph].run(program.graph_of(part).module.graph)
        if known[part.graph].given != given:
            raise MixedError(f"{part.name} is called with its inputs laid out in two ways")
        values |= zip(part.outputs, known[part.graph].results, strict=True)
    if values[program.output].placement != Shard(1, LAYOUT):
        raise MixedError("the logits do not follow the tokens")
    return known


def _input_of(program: Program, part: Part, value: str) -> fx.Node:
    name = next(name for name, given in part.inputs.items() if given == value)
    graph = program.graph_of(part).module.graph
    return next(node for node in graph.find_nodes(op="placeholder") if node.name == name)


def _masks(program: Program, part: Part) -> set[str]:
    return {name for name, value in part.inputs.items() if value == program.inputs[1]}


class Follower:
    """Follows the tokens through one graph.

    Args:
        length: the symbol of the number of tokens.
        given: placeholder -> how what it receives lies.
        masks: placeholders of the attention mask.
    """

    def __init__(self, length: Any, given: Mapping[str, Lie], masks: set[str]) -> None:
        self.length, self.given, self.masks = length, given, masks
        self.placements: dict[fx.Node, Any] = {}
        self.free: set[fx.Node] = set()
        self.mixing: set[fx.Node] = set()  # those whose result has a dim of tokens again
        self.results: list[Lie] = []

    def run(self, graph: fx.Graph) -> None:
        """Follows all nodes in order."""
        experts = {module_path(node) for node in graph.nodes if node.target is GROUPED_MM} - {""}
        for node in graph.nodes:
            if node.op == "placeholder":
                lie = self.given.get(node.name, Lie(R))
                self.placements[node] = lie.placement
                self.free |= {node} if lie.free else set()
            elif node.op == "output":
                self.results = [Lie(self.placements[arg], arg in self.free) for arg in node.args[0]]
            elif isinstance(node.meta["val"], torch.Tensor | list | tuple):
                expert = module_path(node) in experts
                self.placements[node] = self._by_size(node) if expert else self._follow(node)
                if not expert and self._is_free(node):
                    self.free.add(node)

    def _is_free(self, node: fx.Node) -> bool:
        if self.placements[node] in (R, []):
            return False
        if node.target in SHAPE_ONLY:  # which reads no number of its operand
            return True
        args = (arg for arg in node.all_input_nodes if arg in self.placements)
        return all(arg in self.free or self.placements[arg] in (R, []) for arg in args)

    def _follow(self, node: fx.Node) -> Any:
        if node.target is ATTENTION:
            return self._follow_attention(node)
        if self.counts_tokens(node):
            return Shard(0, LAYOUT)
        if node.target in SHAPE_ONLY:
            dims = self.token_dims(node.meta["val"])
            return MIXED if len(dims) > 1 else self._by_size(node)
        call = call_of(node, lambda arg: (self.placements[arg], None), self.size)
        placements = [operand.placement for operand in call.operands()]
        if any(placement is MIXED for placement in placements):
            return self._mix(node)
        if all(placement in (R, []) for placement in placements):
            if any(self.depends(size) for size in numbers(node)):
                return Shard(node.args[1], LAYOUT) if self.takes_columns(node) else self._mix(node)
            return R
        if (found := self._look_up(node)) is not None:
            return found
        rule = RULES.get(call.target)
        sized = not isinstance(rule, Movement) and any(map(self.depends, numbers(node)))
        answer = None if rule is None or sized else rule.place(call)
        if answer is None or answer.cuts or not self._fits(node.meta["val"], answer.out):
            return self._mix(node)
        return answer.out

    def _fits(self, value: Any, placement: Any) -> bool:
        """Whether no other dim is as long as there are tokens."""
        if isinstance(value, list | tuple):
            return all(map(self._fits, value, placement))
        dims = [placement.dim] if isinstance(placement, Shard) else []
        return placement is MIXED or self.token_dims(value) == dims

    def _mix(self, node: fx.Node) -> Any:
        if node.target is CALL:
            self._refuse(node, "holds code that may mix tokens")
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return [MIXED for _ in value]
        dims = self.token_dims(value)
        if len(dims) != 1 or not self.is_length(value.shape[dims[0]]):
            return MIXED
        self.mixing.add(node)
        return Shard(dims[0], LAYOUT)

    def _look_up(self, node: fx.Node) -> Any:
        """Where entries of a table lie that are read at numbers, None if it is no such call."""
        if self.placements.get(node.args[0]) != R:
            return None
        if node.target is aten.embedding.default:
            return self.placements[node.args[1]]
        if node.target is aten.gather.default:
            at = self.placements[node.args[2]]
            ndim = node.meta["val"].dim()
            return at if isinstance(at, Shard) and at.dim == node.args[1] % ndim else None
        if node.target is aten.index_select.default and node.args[1] == 0:
            return self.placements[node.args[2]]
        if node.target is aten.index.Tensor and node.args[1][0] is not None:
            only = all(index is None for index in node.args[1][1:])
            return self.placements[node.args[1][0]] if only else None
        return None

    def _follow_attention(self, node: fx.Node) -> Shard:
        q, k, v, valid, _, _, causal, *_ = node.args
        if any(self.placements[x] != Shard(2, LAYOUT) for x in (q, k, v)):
            self._refuse(node, "takes tokens in another order")
        if valid.name not in self.masks:
            self._refuse(node, "takes a mask of its own")
        if not causal:
            self._refuse(node, "lets a token see those after it")
        return Shard(1, LAYOUT)

    def counts_tokens(self, node: fx.Node) -> bool:
        """Whether it numbers the tokens, from 0 on, which are in the order of their columns."""
        if node.target not in COUNTING:
            return False
        start, stop, step = count_of(node)
        return start == 0 and step == 1 and self.is_length(value_of(stop))

    def takes_columns(self, node: fx.Node) -> bool:
        """Whether it takes the first entries of a table, as many as there are tokens."""
        if node.target is not aten.slice.Tensor or len(node.args) != 4:
            return False
        _, dim, start, stop = node.args
        return dim >= 0 and start in (0, None) and self.is_length(value_of(stop))

    def token_dims(self, value: torch.Tensor) -> list[int]:
        """The dims of a tensor whose size has to do with the number of tokens."""
        return [dim for dim, size in enumerate(value.shape) if self.depends(size)]

    def _by_size(self, node: fx.Node) -> Any:
        """Along the dim whose size depends on the number of tokens; equal shares are a token's."""
        value = node.meta["val"]
        if isinstance(value, list | tuple):
            return [R for _ in value]
        dims = self.token_dims(value)
        if len(dims) != 1:
            return R
        size = value.shape[dims[0]]
        batch = 1 if size.node.expr.free_symbols == {self.length} else _BATCH
        share, rest = divmod(self.size(size), _LENGTH * batch)
        return R if rest else Shard(dims[0], _layout(share, batch))

    def depends(self, size: Any) -> bool:
        """Whether a size has to do with the number of tokens."""
        return isinstance(size, torch.SymInt) and self.length in size.node.expr.free_symbols

    def is_length(self, size: Any) -> bool:
        """Whether a size is the number of tokens."""
        return isinstance(size, torch.SymInt) and size.node.expr == self.length

    def size(self, size: Any) -> int:
        """A size with few sequences of a few tokens."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        values = dict.fromkeys(expression.free_symbols, _BATCH) | {self.length: _LENGTH}
        return int(expression.subs(values))

    @staticmethod
    def _refuse(node: fx.Node, what: str) -> NoReturn:
        raise MixedError(f"{describe(node)} {what}")


def describe(node: fx.Node) -> str:
    """An operator and the module that called it."""
    return f"{node.target} in {module_path(node) or 'no module'}"


def count_of(node: fx.Node) -> tuple[Any, Any, Any]:
    """Start, stop and step of an arange."""
    args = (0, *node.args) if node.target is aten.arange.default else node.args
    return (*args, 1)[:3]


def value_of(arg: Any) -> Any:
    """The value of an argument, whether it is a node or a number."""
    return arg.meta["val"] if isinstance(arg, fx.Node) else arg


def numbers(node: fx.Node) -> Iterable[Any]:
    """The sizes among a call's arguments."""
    found: list[Any] = []
    fx.map_arg((node.args, node.kwargs), lambda arg: found.append(arg.meta["val"]))
    return [value for value in found if not isinstance(value, torch.Tensor | list | tuple)]
