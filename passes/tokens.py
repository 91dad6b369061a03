"""Finds which dim of a value counts tokens, and proves that attention alone mixes them.

A program whose operators treat every token by itself can be run on new tokens alone, if attention
remembers the keys and values of those before. The proof is the placement of a program that is split
by tokens, each one a unit of its own: what the rules of `passes/placement/` carry from input ids to
logits without a cut or an exchange is the same for every token on its own. Attention is the one
operator that may look at others; the module that multiplies a mixture of experts sorts its tokens
by expert and puts them back, which is taken as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import fx

from spdcompile.passes.base import Part, PassResult, Program, Refusal, module_path
from spdcompile.passes.concrete import call_of
from spdcompile.passes.layout import Layout
from spdcompile.passes.ops import ATTENTION, GROUPED_MM
from spdcompile.passes.placement import RULES
from spdcompile.passes.placement.movement import Movement
from spdcompile.passes.placement.types import R, Shard

aten = torch.ops.aten
# Keys of a node's meta: the dim that counts tokens, and whether it holds their columns.
TOKENS, COLUMNS = "tokens", "columns"
_BATCH, _LENGTH = 2, 7
_SHAPE_ONLY = {
    *(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
    *(aten.new_empty.default, aten.zeros_like.default, aten.ones_like.default),
    *(aten.full_like.default, aten.empty_like.default),
}
COUNTING = (aten.arange.default, aten.arange.start, aten.arange.start_step)
SUBJECT = "KV cache"


def _layout(share: int = 1, batch: int = 1) -> Layout:
    """A dim of the tokens' shares, one after the other, for one sequence after the other."""
    return Layout("tokens", _LENGTH, np.tile(np.repeat(np.arange(_LENGTH), share), batch))


_LAYOUT = _layout()


class _MixedError(Exception):
    """An operator that combines tokens, or numbers them by the length."""


def follow_tokens(program: Program) -> PassResult:
    """Writes `meta["tokens"]` on every value that has a dim of tokens.

    Where that cannot be had, the program is left as it is, with the reason as a refusal.
    """
    given, program = program, program.map_graphs(lambda _, block: block.copied())
    try:
        marks = _marks(program)
    except _MixedError as why:
        refusal = Refusal(SUBJECT, str(why))
        refused = replace(given, refusals=(*given.refusals, refusal))
        return PassResult(refused, 0, (refusal,))
    for node, dim in marks.items():
        node.meta[TOKENS] = dim
    return PassResult(program, len(marks))


def _marks(program: Program) -> dict[fx.Node, Any]:
    for refusal in program.refusals:
        raise _MixedError(f"{refusal.subject}: {refusal.reason}")
    if program.min_length > 1:
        raise _MixedError(f"its graph holds for {program.min_length} tokens and more")
    ids = _input_of(program, program.parts[0], program.inputs[0])
    length = ids.meta["val"].shape[1].node.expr
    values: dict[str, Any] = dict.fromkeys(program.inputs, Shard(1, _LAYOUT))
    known: dict[str, tuple[dict[str, Any], _Follower]] = {}
    for part in program.parts:
        given = {name: values[value] for name, value in part.inputs.items()}
        if part.graph not in known:
            follower = _Follower(length, given, _masks(program, part))
            follower.run(program.graph_of(part).module.graph)
            known[part.graph] = given, follower
        before, follower = known[part.graph]
        if before != given:
            raise _MixedError(f"{part.name} is called with its inputs laid out in two ways")
        values |= zip(part.outputs, follower.results, strict=True)
    if values[program.output] != Shard(1, _LAYOUT):
        raise _MixedError("the logits do not follow the tokens")
    found = [follower.placements.items() for _, follower in known.values()]
    return {node: _dims(p) for items in found for node, p in items if p not in (R, [])}


def _input_of(program: Program, part: Part, value: str) -> fx.Node:
    name = next(name for name, given in part.inputs.items() if given == value)
    graph = program.graph_of(part).module.graph
    return next(node for node in graph.find_nodes(op="placeholder") if node.name == name)


def _masks(program: Program, part: Part) -> set[str]:
    return {name for name, value in part.inputs.items() if value == program.inputs[1]}


class _Follower:
    """Follows the tokens through one graph.

    Args:
        length: the symbol of the number of tokens.
        given: placeholder -> how what it receives lies.
        masks: placeholders of the attention mask, which only attention may read.
    """

    def __init__(self, length: Any, given: Mapping[str, Any], masks: set[str]) -> None:
        self.length, self.given, self.masks = length, given, masks
        self.placements: dict[fx.Node, Any] = {}
        self.results: list[Any] = []

    def run(self, graph: fx.Graph) -> None:
        experts = {module_path(node) for node in graph.nodes if node.target is GROUPED_MM} - {""}
        for node in graph.nodes:
            if node.op == "placeholder":
                self.placements[node] = self.given.get(node.name, R)
            elif node.op == "output":
                self.results = [self.placements[arg] for arg in node.args[0]]
            elif isinstance(node.meta["val"], torch.Tensor | list | tuple):
                expert = module_path(node) in experts
                self.placements[node] = self._by_size(node) if expert else self._follow(node)

    def _follow(self, node: fx.Node) -> Any:
        if any(arg.name in self.masks for arg in node.all_input_nodes):
            self._check_mask(node)
        if node.target is ATTENTION:
            return self._follow_attention(node)
        if self._counts_tokens(node):
            node.meta[COLUMNS] = True
            return Shard(0, _LAYOUT)
        if node.target in _SHAPE_ONLY:
            return self._by_size(node)
        call = call_of(node, lambda arg: (self.placements[arg], None), self._size)
        if all(operand.placement in (R, []) for operand in call.operands()):
            if any(self._depends(size) for size in _numbers(node)):
                self._refuse(node, "depends on the number of tokens")
            return R
        if node.target is aten.embedding.default:
            return self.placements[node.args[1]]
        rule = RULES.get(call.target)
        if not isinstance(rule, Movement) and any(map(self._depends, _numbers(node))):
            self._refuse(node, "computes with the number of tokens")
        answer = None if rule is None else rule.place(call)
        if answer is None or answer.cuts:
            self._refuse(node, "mixes tokens")
        return answer.out

    def _check_mask(self, node: fx.Node) -> None:
        readers = [arg for arg in node.args if isinstance(arg, fx.Node) and arg.name in self.masks]
        if node.target is not ATTENTION or node.args[3] not in readers or len(readers) > 1:
            self._refuse(node, "reads the attention mask")

    def _follow_attention(self, node: fx.Node) -> Shard:
        q, k, v, valid, _, _, causal, *_ = node.args
        if any(self.placements[x] != Shard(2, _LAYOUT) for x in (q, k, v)):
            self._refuse(node, "takes tokens in another order")
        if valid.name not in self.masks:
            self._refuse(node, "takes a mask of its own")
        if not causal:
            self._refuse(node, "lets a token see those after it")
        return Shard(1, _LAYOUT)

    def _counts_tokens(self, node: fx.Node) -> bool:
        """Whether it numbers the tokens, from 0 on, which are in the order of their columns."""
        if node.target not in COUNTING:
            return False
        start, stop, step = count_of(node)
        stop = stop.meta["val"] if isinstance(stop, fx.Node) else stop
        return start == 0 and step == 1 and self._depends(stop) and stop.node.expr == self.length

    def _by_size(self, node: fx.Node) -> Any:
        """Along the dim whose size depends on the number of tokens; equal shares are a token's."""
        value = node.meta["val"]
        if isinstance(value, list | tuple):
            return [R for _ in value]
        dims = [dim for dim, size in enumerate(value.shape) if self._depends(size)]
        if len(dims) != 1:
            return R
        size = value.shape[dims[0]]
        batch = 1 if size.node.expr.free_symbols == {self.length} else _BATCH
        share, rest = divmod(self._size(size), _LENGTH * batch)
        return R if rest else Shard(dims[0], _layout(share, batch))

    def _depends(self, size: Any) -> bool:
        return isinstance(size, torch.SymInt) and self.length in size.node.expr.free_symbols

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        values = dict.fromkeys(expression.free_symbols, _BATCH) | {self.length: _LENGTH}
        return int(expression.subs(values))

    @staticmethod
    def _refuse(node: fx.Node, what: str) -> NoReturn:
        raise _MixedError(f"{node.target} {what} ({module_path(node) or 'no module'})")


def count_of(node: fx.Node) -> tuple[Any, Any, Any]:
    """Start, stop and step of an arange."""
    args = (0, *node.args) if node.target is aten.arange.default else node.args
    return (*args, 1)[:3]


def _dims(placement: Any) -> Any:
    if isinstance(placement, list | tuple):
        return [_dims(item) for item in placement]
    return placement.dim if isinstance(placement, Shard) else None


def _numbers(node: fx.Node) -> Iterable[Any]:
    """The sizes among a call's arguments."""
    found: list[Any] = []
    fx.map_arg((node.args, node.kwargs), lambda arg: found.append(arg.meta["val"]))
    return [value for value in found if not isinstance(value, torch.Tensor)]
