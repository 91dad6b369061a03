"""Tests that no token sees a later one, or how many there are, through operators that mix tokens.

The operators between what is followed token by token and the next such value are run on random
numbers: on all tokens, and on the first of them alone. What they give for the first must be the
same both times. Real tokens must not see padding either, whose values differ from step to step (a
token that may attend to none gets a mean over all there are); where they do see it, padding has to
be the same both times too.

A wrong answer is a difference of numbers, so no form of attention has to be known. What lies
between holds small weights at most, and those of the test are random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from spdcompile.passes.base import Part, Program
from spdcompile.passes.ops import ATTENTION
from spdcompile.passes.placement.types import Shard
from spdcompile.passes.following import LAYOUT, Follower, MixedError, describe

_BATCH = 3
# Tokens that there are, and how many of them come first.
_PREFIXES = ((8, (1, 3, 6)), (41, (17, 40)))
_LARGEST = 1 << 26  # numbers of a random weight
_BOUND = 2e-5  # of the largest number; they are float32 at least
_COMMON = 1e3  # numbers of this size and more are those of masks
_NARROW = (torch.bfloat16, torch.float16)


class _Stable(NamedTuple):
    """Which tokens' values stay when tokens are added: real ones, and all of them."""

    real: bool
    every: bool


class _Value(NamedTuple):
    """A node as one part runs it."""

    part: Part
    node: fx.Node

    @property
    def key(self) -> tuple[str, fx.Node]:
        return self.part.name, self.node


def check_prefixes(program: Program, followers: Mapping[str, Follower]) -> None:
    """Raises MixedError unless each token depends on those before it and itself alone."""
    known: dict[Any, _Stable] = {}
    found: list[tuple[fx.Node, _Stable]] = []
    for part in program.parts:
        for node in followers[part.graph].mixing:
            test = _Test(program, followers, _Value(part, node))
            if test.key not in known:
                known[test.key] = test.run()
            found.append((node, known[test.key]))
            if not any(known[test.key]):
                raise MixedError(f"{describe(node)} mixes tokens")
    operators = {node.target for f in followers.values() for node in f.placements}
    padding = next((node for node, stable in found if not stable.real), None)
    every = all(stable.every for _, stable in found) and ATTENTION not in operators
    if padding is not None and not every:
        raise MixedError(f"{describe(padding)} lets real tokens see padding")


class _Test:
    """What lies behind the result of a mixing operator, and its test."""

    def __init__(
        self, program: Program, followers: Mapping[str, Follower], result: _Value
    ) -> None:
        self.program, self.followers, self.result = program, followers, result
        self.maker = {
            name: _Value(part, node)
            for part in program.parts
            for name, node in zip(part.outputs, _outputs(program, part), strict=True)
        }
        self.order = self._behind()
        self.dim = self._placement(result).dim

    @property
    def key(self) -> Any:
        """Equal for results that are computed alike, as those of equal blocks are."""
        here = self.result.part.name
        constants = tuple(
            (node.name, hash(self._constant(part, node).numpy().tobytes()))
            for part, node in self.order
            if node.name in part.params and part.params[node.name].constant
        )
        others = tuple((part.name, node) for part, node in self.order if part.name != here)
        return self.result.node, others, constants

    def run(self) -> _Stable:
        """Compares what the first tokens get with all tokens there and alone."""
        real, every = True, True
        for total, firsts in _PREFIXES:
            for mask in _masks(total):
                whole = self._values(mask, total)
                for first in firsts:
                    expected = whole.narrow(self.dim, 0, first)
                    seen = self._spread(mask[:, :first], self.result, expected)
                    same = self._values(mask, first)
                    every = every and _equal(same, expected, torch.ones_like(seen))
                    other = self._values(mask, first, padding=_BATCH)
                    real = real and _equal(other, expected, seen)
        return _Stable(real, every)

    def _behind(self) -> list[_Value]:
        """All values that the result is computed from, in an order in which they can be."""
        order: dict[tuple[str, fx.Node], _Value] = {}
        pending = [(self.result, False)]
        while pending:
            value, ready = pending.pop()
            if value.key in order:
                continue
            if ready:
                order[value.key] = value
                continue
            pending.append((value, True))
            pending += [(source, False) for source in self._sources(value)]
        return list(order.values())

    def _sources(self, value: _Value) -> list[_Value]:
        part, node = value
        if self._is_given(value):
            return []
        if node.op == "placeholder":
            name = part.inputs.get(node.name)
            return [self.maker[name]] if name in self.maker else []
        tensors = [arg for arg in node.all_input_nodes if _is_tensor(arg)]
        return [_Value(part, arg) for arg in tensors]

    def _is_given(self, value: _Value) -> bool:
        """Whether it is followed token by token, so that any numbers will do for it."""
        follower = self.followers[value.part.graph]
        is_result = value.key == self.result.key
        shard = isinstance(follower.placements[value.node], Shard)
        return shard and value.node not in follower.free and not is_result

    def _placement(self, value: _Value) -> Any:
        return self.followers[value.part.graph].placements[value.node]

    def _values(self, mask: Tensor, length: int, padding: int = 0) -> Tensor:
        """The result for the first tokens.

        Args:
            padding: a seed for other values of the tokens that are padding; 0 for the same.
        """
        env: dict[tuple[str, fx.Node], Any] = {}
        for number, value in enumerate(self.order):
            part, node = value
            if self._is_given(value):
                env[value.key] = self._random(value, number, mask, length, padding)
            elif node.op != "placeholder":
                env[value.key] = self._call(value, env, length)
            elif node.name in part.params:
                env[value.key] = self._constant(part, node)
            elif part.inputs[node.name] in self.maker:
                env[value.key] = env[self.maker[part.inputs[node.name]].key]
            else:
                env[value.key] = mask[:, :length]
        return env[self.result.key]

    def _random(
        self, value: _Value, seed: int, mask: Tensor, length: int, padding: int
    ) -> Tensor:
        placement = self._placement(value)
        if placement.layout != LAYOUT:
            raise MixedError(f"{describe(self.result.node)} takes tokens of all sequences as one")
        like = value.node.meta["val"]
        shape = [self._size(value, size, mask.shape[1]) for size in like.shape]
        tensor = _draw(shape, like.dtype, seed)
        if padding:
            seen = self._spread(mask, value, tensor)
            tensor = torch.where(seen, tensor, _draw(shape, like.dtype, seed + 1000 * padding, 3))
        return tensor.narrow(placement.dim, 0, length)

    def _spread(self, mask: Tensor, value: _Value, tensor: Tensor) -> Tensor:
        """Which of a value's numbers are of real tokens, in a shape that broadcasts to its own."""
        shape, seen = [1] * tensor.dim(), mask.bool()
        dim = self._placement(value).dim
        shape[dim] = tensor.shape[dim]
        symbolic = value.node.meta["val"].shape
        batches = [d for d, size in enumerate(symbolic) if d != dim and not isinstance(size, int)]
        if not batches:
            return seen.all(0).reshape(shape)
        # Heads are folded behind the batch; if it were otherwise, the test would fail.
        shape[batches[0]] = tensor.shape[batches[0]]
        seen = seen.repeat_interleave(shape[batches[0]] // len(mask), 0)
        return (seen if batches[0] < dim else seen.T).reshape(shape)

    def _constant(self, part: Part, node: fx.Node) -> Tensor:
        ref = part.params[node.name]
        shape = node.meta["val"].shape
        if not ref.constant and shape.numel() > _LARGEST:
            raise MixedError(f"{describe(self.result.node)} mixes tokens by way of {ref.fqn}")
        value = self.program.constants[ref.fqn] if ref.constant else _draw(shape, ref.dtype, 7)
        return _widened(value.cpu())

    def _call(self, value: _Value, env: Mapping[Any, Any], length: int) -> Any:
        part, node = value

        def number(arg: fx.Node) -> Any:
            if _is_tensor(arg):
                return env[part.name, arg]
            return self._size(value, arg.meta["val"], length)

        args, kwargs = fx.map_arg((node.args, node.kwargs), number)
        args, kwargs = fx.node.map_aggregate((args, kwargs), _plain)
        try:
            return node.target(*args, **kwargs)
        except (RuntimeError, IndexError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise MixedError(f"{describe(node)} mixes tokens, untested: {reason}") from error

    def _size(self, value: _Value, size: Any, length: int) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        symbol, expression = self.followers[value.part.graph].length, size.node.expr
        sizes = dict.fromkeys(expression.free_symbols, _BATCH) | {symbol: length}
        return int(expression.subs(sizes))


def _outputs(program: Program, part: Part) -> tuple[fx.Node, ...]:
    return program.graph_of(part).module.graph.output_node().args[0]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor | list | tuple)


def _masks(total: int) -> Iterator[Tensor]:
    """No padding, padding on the left, and padding anywhere; int64 [B, total]."""
    yield torch.ones(_BATCH, total, dtype=torch.long)
    pads = torch.tensor([0, 2, total // 2 + 1])
    yield (torch.arange(total) >= pads[:, None]).long()
    yield _draw((_BATCH, total), torch.bool, 5).long()


def _draw(shape: Any, dtype: torch.dtype, seed: int, scale: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.float32 if dtype in _NARROW else dtype
        return scale * torch.randn(shape, dtype=wide, generator=random)
    return torch.randint(0, 2 if dtype == torch.bool else 7, shape, generator=random).to(dtype)


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.dtype in _NARROW else value


def _plain(arg: Any) -> Any:
    """An argument with which the test runs: on a CPU, and no number narrower than float32."""
    if isinstance(arg, torch.device):
        return torch.device("cpu")
    return torch.float32 if arg in _NARROW and isinstance(arg, torch.dtype) else arg


def _equal(found: Tensor, expected: Tensor, where: Tensor) -> bool:
    """Whether two values are the same, up to rounding, at the given places."""
    where = where.expand(expected.shape)
    found, expected = found[where], expected[where]
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    # What a mask is made of is no measure for the rest, and is never rounded.
    common = expected.abs() < _COMMON
    if not torch.equal(found[~common].nan_to_num(), expected[~common].nan_to_num()):
        return False
    found, expected = found[common], expected[common]
    bound = _BOUND * float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=0.0, atol=bound)
