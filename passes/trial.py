"""Runs what lies behind a value on random numbers, for as many tokens as one likes.

Where the run begins lie values that are followed token by token, for which any numbers will do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from spdcompile.passes.base import Part, Program
from spdcompile.passes.following import LAYOUT, Follower, MixedError, describe
from spdcompile.passes.placement.types import Shard

BATCH = 3
_LARGEST = 1 << 26  # numbers of a random weight
_NARROW = (torch.bfloat16, torch.float16)


class Value(NamedTuple):
    """A node as one part runs it."""

    part: Part
    node: fx.Node

    @property
    def key(self) -> tuple[str, fx.Node]:
        """Tells it from all others."""
        return self.part.name, self.node


class Sources:
    """What the values of a program are computed from."""

    def __init__(self, program: Program, followers: Mapping[str, Follower]) -> None:
        self.program, self.followers = program, followers
        self.maker = {
            name: Value(part, node)
            for part in program.parts
            for name, node in zip(part.outputs, _outputs(program, part), strict=True)
        }

    def of(self, value: Value) -> list[Value]:
        """The values that an operator takes, or what another part hands on."""
        part, node = value
        if node.op == "placeholder":
            name = part.inputs.get(node.name)
            return [self.maker[name]] if name in self.maker else []
        return [Value(part, arg) for arg in node.all_input_nodes if is_tensor(arg)]

    def placement(self, value: Value) -> Any:
        """How it lies."""
        return self.followers[value.part.graph].placements[value.node]

    def is_free(self, value: Value) -> bool:
        """Whether the mask and the number of tokens make it."""
        return value.node in self.followers[value.part.graph].free

    def is_mixing(self, value: Value) -> bool:
        """Whether an operator made it that mixes tokens."""
        return value.node in self.followers[value.part.graph].mixing

    def spread(self, mask: Tensor, value: Value, tensor: Tensor) -> Tensor:
        """Which of a value's numbers are of real tokens, in a shape that broadcasts to its own."""
        shape, seen = [1] * tensor.dim(), mask.bool()
        dim = self.placement(value).dim
        shape[dim] = tensor.shape[dim]
        symbolic = value.node.meta["val"].shape
        batches = [d for d, size in enumerate(symbolic) if d != dim and not isinstance(size, int)]
        if not batches:
            return seen.all(0).reshape(shape)
        # Heads are folded behind the batch; if it were otherwise, the test would fail.
        shape[batches[0]] = tensor.shape[batches[0]]
        seen = seen.repeat_interleave(shape[batches[0]] // len(mask), 0)
        return (seen if batches[0] < dim else seen.T).reshape(shape)


class Trial:
    """Runs of the operators behind one value.

    Args:
        deep: begin behind the results of other mixing operators, and with no whole numbers, which
            may be places of tokens that not any numbers will do for.
    """

    def __init__(self, sources: Sources, result: Value, *, deep: bool = False) -> None:
        self.sources, self.result, self.deep = sources, result, deep
        self.order = self._behind()

    @property
    def key(self) -> Any:
        """Equal for values that are computed alike, as those of equal blocks are."""
        here = self.result.part.name
        constants = tuple(
            (node.name, hash(self._weight(part, node).numpy().tobytes()))
            for part, node in self.order
            if node.name in part.params and part.params[node.name].constant
        )
        others = tuple((part.name, node) for part, node in self.order if part.name != here)
        return self.result.node, others, constants

    def run(self, mask: Tensor, length: int, padding: Sequence[bool] | None = None) -> Tensor:
        """The result for the first tokens.

        Args:
            mask: int64 [B, T]; the numbers that the run begins with are those of T tokens.
            padding: for each value in order, whether it is another for tokens that are padding.
        """
        env: dict[tuple[str, fx.Node], Any] = {}
        for number, value in enumerate(self.order):
            part, node = value
            if self.begins_with(value):
                other = padding is not None and padding[number]
                env[value.key] = self._random(value, number, mask, length, padding=other)
            elif node.op != "placeholder":
                env[value.key] = self._call(value, env, length)
            elif node.name in part.params:
                env[value.key] = self._weight(part, node)
            elif part.inputs[node.name] in self.sources.maker:
                env[value.key] = env[self.sources.maker[part.inputs[node.name]].key]
            else:
                env[value.key] = mask[:, :length]
        return env[self.result.key]

    def begins_with(self, value: Value) -> bool:
        """Whether it is followed token by token, so that any numbers will do for it."""
        shard = isinstance(self.sources.placement(value), Shard)
        if not shard or self.sources.is_free(value) or value.key == self.result.key:
            return False
        if not self.deep or not self.sources.of(value):
            return True
        return not self.sources.is_mixing(value) and value.node.meta["val"].is_floating_point()

    def _behind(self) -> list[Value]:
        """All values that the result is computed from, in an order in which they can be."""
        order: dict[tuple[str, fx.Node], Value] = {}
        pending = [(self.result, False)]
        while pending:
            value, ready = pending.pop()
            if value.key in order:
                continue
            if ready:
                order[value.key] = value
                continue
            pending.append((value, True))
            if not self.begins_with(value):
                pending += [(source, False) for source in self.sources.of(value)]
        return list(order.values())

    def _random(
        self, value: Value, seed: int, mask: Tensor, length: int, *, padding: bool
    ) -> Tensor:
        placement = self.sources.placement(value)
        if placement.layout != LAYOUT:
            raise MixedError(f"{describe(self.result.node)} takes tokens of all sequences as one")
        like = value.node.meta["val"]
        shape = [self._size(value, size, mask.shape[1]) for size in like.shape]
        tensor = draw(shape, like.dtype, seed)
        if padding:
            seen = self.sources.spread(mask, value, tensor)
            tensor = torch.where(seen, tensor, draw(shape, like.dtype, seed + 1000, scale=3))
        return tensor.narrow(placement.dim, 0, length)

    def _weight(self, part: Part, node: fx.Node) -> Tensor:
        ref = part.params[node.name]
        if ref.constant:
            value = self.sources.program.constants[ref.fqn].cpu()
            return value.float() if value.dtype in _NARROW else value
        shape = node.meta["val"].shape
        if shape.numel() > _LARGEST:
            raise MixedError(f"{describe(self.result.node)} mixes tokens by way of {ref.fqn}")
        return draw(shape, ref.dtype, 7)

    def _call(self, value: Value, env: Mapping[Any, Any], length: int) -> Any:
        part, node = value

        def number(arg: fx.Node) -> Any:
            if is_tensor(arg):
                return env[part.name, arg]
            return self._size(value, arg.meta["val"], length)

        args, kwargs = fx.map_arg((node.args, node.kwargs), number)
        args, kwargs = fx.node.map_aggregate((args, kwargs), _plain)
        try:
            return node.target(*args, **kwargs)
        except (RuntimeError, IndexError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise MixedError(f"{describe(node)} mixes tokens, untested: {reason}") from error

    def _size(self, value: Value, size: Any, length: int) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        symbol, expression = self.sources.followers[value.part.graph].length, size.node.expr
        sizes = dict.fromkeys(expression.free_symbols, BATCH) | {symbol: length}
        return int(expression.subs(sizes))


def _outputs(program: Program, part: Part) -> tuple[fx.Node, ...]:
    return program.graph_of(part).module.graph.output_node().args[0]


def is_tensor(node: fx.Node) -> bool:
    """Whether a node is no size."""
    return isinstance(node.meta["val"], torch.Tensor | list | tuple)


def draw(shape: Any, dtype: torch.dtype, seed: int, *, scale: int = 1) -> Tensor:
    """Random numbers, float32 at least."""
    random = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.float32 if dtype in _NARROW else dtype
        return scale * torch.randn(shape, dtype=wide, generator=random)
    return torch.randint(0, 2 if dtype == torch.bool else 7, shape, generator=random).to(dtype)


def _plain(arg: Any) -> Any:
    """An argument with which the test runs: on a CPU, and no number narrower than float32."""
    if isinstance(arg, torch.device):
        return torch.device("cpu")
    return torch.float32 if isinstance(arg, torch.dtype) and arg in _NARROW else arg
