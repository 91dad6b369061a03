"""What of a compiled program is split and what stays whole, read off its graphs.

*Mixers* are the operators that combine tokens; *weights* are the parameters that an operator
contracts with. A whole weight is no loss in three cases:

- small: one of its sides is below 8, as in a gate or a router with few experts;
- router: what it makes chooses (topk and the like) before it meets another weight;
- shared: split operators are the first to read what it makes, and every rank needs all of it, as
  of a latent or of the one K/V head of all query heads. Where a rank takes a share that is smaller
  than what the weight makes, the weight could have been split, and it counts as whole.

Module paths serve to group and to name here; the compiler itself does not go by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import fx

from spdcompile.passes.base import ParamRef, Part, Program, module_path
from spdcompile.passes.concrete import shape_at_one
from spdcompile.passes.ops import ATTENTION, TAKE
from spdcompile.passes.placement.types import Partial, Shard

SMALL = 8

_CONTRACTIONS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "_grouped_mm"}
_CUSTOM = {"spd", "transformers"}  # namespaces of operators that may contract with a weight too
_MOVES = {
    *("transpose", "t", "numpy_T", "permute", "view", "reshape", "slice", "select", "unsqueeze"),
    *("squeeze", "to", "_to_copy", "clone", "contiguous", "chunk", "split", "split_with_sizes"),
    *("getitem", "take"),
}
_CHOICES = {"topk", "sort", "argsort", "argmax", "max"}
_SOFTMAX = {"softmax", "_softmax"}
_CONVOLUTIONS = {"conv1d", "convolution"}
_SCANS = {"cumsum", "cumprod", "logcumsumexp"}
_CUSTOM_MIXERS = ("scan", "recur", "delta", "conv")


class Kind(StrEnum):
    """What a weight or a mixer belongs to."""

    ATTENTION = "attention"
    RECURRENT = "recurrent"
    MLP = "mlp"
    EXPERTS = "experts"
    OUTSIDE = "outside the blocks"


class State(StrEnum):
    """How a weight lies on the ranks."""

    SPLIT = "split"
    SMALL = "small"
    ROUTER = "router"
    SHARED = "shared"
    WHOLE = "whole"


EXEMPT = frozenset({State.SMALL, State.ROUTER, State.SHARED})


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of one part of the program.

    Args:
        layer: of the block that it is in; None outside the blocks.
        path: its name, relative to the block.
    """

    layer: int | None
    path: str
    kind: Kind
    state: State


@dataclass(frozen=True, slots=True)
class Mixer:
    """An operator of one part that combines tokens; `path` is that of its module."""

    layer: int | None
    path: str
    kind: Kind
    state: State


def survey(program: Program) -> tuple[list[Mixer], list[Weight]]:
    """The mixers and weights of all parts of a program."""
    parts = [_Survey(program, part) for part in program.parts]
    mixers = [mixer for part in parts for mixer in part.mixers()]
    return mixers, [weight for part in parts for weight in part.weights()]


class _Survey:
    """One part of a program."""

    def __init__(self, program: Program, part: Part) -> None:
        self.part, self.tp = part, program.tp
        self.graph = program.graph_of(part).module.graph
        # A graph that several blocks share carries the module paths of the first of them.
        self.origin = next(p.module for p in program.parts if p.graph == part.graph)
        self.weight_of = {
            node: part.params[node.name]
            for node in self.graph.find_nodes(op="placeholder")
            if node.name in part.params and not part.params[node.name].constant
        }
        self.readers = {node: list(self._readers(node)) for node in self.weight_of}
        self.contractions = {node for nodes in self.readers.values() for node in nodes}
        self.mixing = {node: kind for node in self.graph.nodes if (kind := _mixes(node))}
        self.homes: dict[str, Kind] = {}
        for node, kind in self.mixing.items():
            home = self._home(node)
            known = self.homes.get(home, kind)
            self.homes[home] = Kind.ATTENTION if Kind.ATTENTION in (kind, known) else kind
        self.mixed_into = {
            reader: self.homes[self._home(node)]
            for node in self.mixing
            for reader in _reached([node], self.contractions)
            if reader in self.contractions
        }

    def mixers(self) -> Iterator[Mixer]:
        for node in self.mixing:
            home = self._home(node)
            state = State.SPLIT if _is_split(node) else State.WHOLE
            yield Mixer(self.part.layer, home, self.homes[home], state)

    def weights(self) -> Iterator[Weight]:
        for node, ref in self.weight_of.items():
            if self.readers[node]:
                path, kind = self._relative(ref.fqn), self._kind(node, ref)
                yield Weight(self.part.layer, path, kind, self._state(node, ref))

    def _relative(self, path: str) -> str:
        return path.removeprefix(f"{self.part.module}.") if self.part.module else path

    def _home(self, node: fx.Node) -> str:
        """Path of the module that a mixer is in, relative to the block; not that of a leaf."""
        path = module_path(node).removeprefix(self.origin).removeprefix(".")
        children = {self._relative(ref.fqn).rpartition(".")[0] for ref in self.weight_of.values()}
        is_leaf = path in children and not any(c.startswith(f"{path}.") for c in children)
        return path.rpartition(".")[0] if is_leaf else path

    def _readers(self, weight: fx.Node) -> Iterator[fx.Node]:
        """The operators that contract with a parameter, after moving its data or at once."""
        if len(self.weight_of[weight].shape) < 2:
            return
        seen, stack = {weight}, [weight]
        while stack:
            for user in stack.pop().users:
                if user not in seen and user.op == "call_function":
                    seen.add(user)
                    if _name(user) in _MOVES:
                        stack.append(user)
                    elif _name(user) in _CONTRACTIONS or _namespace(user) in _CUSTOM:
                        yield user

    def _kind(self, weight: fx.Node, ref: ParamRef) -> Kind:
        path = self._relative(ref.fqn)
        homes = [home for home in self.homes if home and path.startswith(f"{home}.")]
        if homes:
            return self.homes[max(homes, key=len)]
        after = [self.mixed_into[r] for r in self.readers[weight] if r in self.mixed_into]
        if after:
            return Kind.ATTENTION if Kind.ATTENTION in after else Kind.RECURRENT
        if self.part.layer is None:
            return Kind.OUTSIDE
        seen_as = [_operand_of(reader, weight).meta["val"] for reader in self.readers[weight]]
        return Kind.EXPERTS if any(value.dim() > 2 for value in seen_as) else Kind.MLP

    def _state(self, weight: fx.Node, ref: ParamRef) -> State:
        readers = self.readers[weight]
        # A rank that takes its share of a whole parameter computes no more than its share.
        operands = [_operand_of(reader, weight) for reader in readers]
        if all(isinstance(operand.meta["placement"], Shard) for operand in operands):
            return State.SPLIT
        if min(ref.shape[-2:]) < SMALL:
            return State.SMALL
        if any(_name(node) in _CHOICES for node in _reached(readers, self.contractions)):
            return State.ROUTER
        return State.SHARED if all(map(self._is_needed_whole, readers)) else State.WHOLE

    def _is_needed_whole(self, maker: fx.Node) -> bool:
        """Whether split operators are the first to read what a node makes, each all of it."""
        made = math.prod(shape_at_one(maker.meta["val"]))
        seen, stack = {maker}, [maker]
        while stack:
            for user in stack.pop().users:
                if user in seen:
                    continue
                seen.add(user)
                if user.op == "output":
                    return False
                if user.target is TAKE:
                    if math.prod(shape_at_one(user.meta["val"])) // self.tp < made:
                        return False
                elif not _is_split(user):
                    stack.append(user)
        return True


def _mixes(node: fx.Node) -> Kind | None:
    """Whether a node combines tokens, and how."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor):
        return None
    name = _name(node)
    if node.target is ATTENTION or "scaled_dot_product" in name:
        return Kind.ATTENTION
    if not value.is_floating_point():
        return None
    if name in _SOFTMAX and _is_length(node.args[0], node.args[1]):
        return Kind.ATTENTION
    if name in {"matmul", "bmm"} and _is_length(node.args[0], -1):
        return Kind.RECURRENT
    if name in _SCANS and _is_length(node.args[0], node.args[1]):
        return Kind.RECURRENT
    custom = _namespace(node) == "spd" and any(word in name for word in _CUSTOM_MIXERS)
    return Kind.RECURRENT if custom or name in _CONVOLUTIONS else None


def _reached(starts: Iterable[fx.Node], until: set[fx.Node]) -> Iterator[fx.Node]:
    """The nodes that values reach, up to and with the first ones in `until`."""
    stack = list(starts)
    seen = set(stack)
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                yield user
                if user not in until:
                    stack.append(user)


def _operand_of(reader: fx.Node, weight: fx.Node) -> fx.Node:
    """The operand through which a node reads a parameter."""
    for operand in reader.all_input_nodes:
        source = operand
        while source is not weight and source.op == "call_function" and _name(source) in _MOVES:
            source = source.all_input_nodes[0]
        if source is weight:
            return operand
    raise AssertionError(f"{reader} does not read {weight}")


def _is_length(value: fx.Node, dim: int) -> bool:
    """Whether the size of a dim depends on the inputs."""
    return not isinstance(value.meta["val"].shape[dim], int)


def _is_split(node: fx.Node) -> bool:
    """Whether a rank computes a share of a node's value, or a part of the sum."""
    near = (node, *node.all_input_nodes)
    return any(isinstance(n.meta.get("placement"), Shard | Partial) for n in near)


def _namespace(node: fx.Node) -> str:
    return getattr(node.target, "namespace", "")


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0]
