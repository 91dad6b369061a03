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

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from spdcompile.passes.base import Program
from spdcompile.passes.following import Follower, MixedError, describe
from spdcompile.passes.ops import ATTENTION, GROUPED_MM
from spdcompile.passes.placement.types import Shard
from spdcompile.passes.trial import BATCH, Sources, Trial, Value, draw

aten = torch.ops.aten
# Tokens that there are, and how many of them come first.
_PREFIXES = ((8, (1, 3, 6)), (41, (17, 40)))
_BOUND = 2e-5  # of the largest number; they are float32 at least
_COMMON = 1e3  # numbers of this size and more are those of masks


class _Stable(NamedTuple):
    """Which tokens' values stay when tokens are added: real ones, and all of them."""

    real: bool
    every: bool


def check_prefixes(program: Program, followers: Mapping[str, Follower]) -> None:
    """Raises MixedError unless each token depends on those before it and itself alone."""
    checker = _Checker(Sources(program, followers))
    found: list[tuple[fx.Node, _Stable]] = []
    for part in program.parts:
        for node in followers[part.graph].mixing:
            stable = checker.stable(Value(part, node))
            found.append((node, stable))
            if not any(stable):
                raise MixedError(f"{describe(node)} mixes tokens")
    operators = {node.target for f in followers.values() for node in f.placements}
    padding = next((node for node, stable in found if not stable.real), None)
    every = all(stable.every for _, stable in found) and ATTENTION not in operators
    if padding is not None and not every:
        raise MixedError(f"{describe(padding)} lets real tokens see padding")


class _Checker:
    """Tests the results of mixing operators, once for all that are computed alike."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.known: dict[Any, _Stable] = {}

    def stable(self, result: Value) -> _Stable:
        """Which tokens of a result do not depend on later ones."""
        stable = self._try(Trial(self.sources, result))
        return stable if stable.real else self._try(Trial(self.sources, result, deep=True))

    def _try(self, trial: Trial) -> _Stable:
        changing = tuple(
            trial.begins_with(value) and not self._is_settled(value) for value in trial.order
        )
        key = trial.key, trial.deep, changing
        if key not in self.known:
            self.known[key] = self._compare(trial, changing)
        return self.known[key]

    def _compare(self, trial: Trial, changing: tuple[bool, ...]) -> _Stable:
        """Compares what the first tokens get with all tokens there and alone."""
        dim = self.sources.placement(trial.result).dim
        longest = self.sources.program.max_length or math.inf
        cases = [(total, firsts) for total, firsts in _PREFIXES if total <= longest]
        real = every = bool(cases)
        for total, firsts in cases:
            for mask in _masks(total):
                whole = trial.run(mask, total)
                for first in firsts:
                    expected = whole.narrow(dim, 0, first)
                    seen = self.sources.spread(mask[:, :first], trial.result, expected)
                    same = trial.run(mask, first)
                    every = every and _equal(same, expected, torch.ones_like(seen))
                    other = trial.run(mask, first, changing)
                    real = real and _equal(other, expected, seen)
        return _Stable(real, every)

    def _is_settled(self, value: Value) -> bool:
        """Whether it is the same at each step for padding too: made from ids, or nothing there."""
        pending, seen = [value], set()
        while pending:
            other = pending.pop()
            if other.node.target in (ATTENTION, GROUPED_MM) or self.sources.is_mixing(other):
                return False
            sources = self.sources.of(other)
            factors = sources if other.node.target is aten.mul.Tensor else []
            if other.key not in seen and not any(map(self._is_nothing_at_padding, factors)):
                seen.add(other.key)
                pending += sources
        return True

    def _is_nothing_at_padding(self, value: Value) -> bool:
        """Whether it is the attention mask, in any shape, or as good as that."""
        if not self.sources.is_free(value):
            return False
        if not isinstance(self.sources.placement(value), Shard):
            return False
        trial, zero = Trial(self.sources, value), True
        for mask in _masks(_PREFIXES[0][0]):
            found = trial.run(mask, mask.shape[1])
            seen = self.sources.spread(mask, value, found).expand(found.shape)
            zero = zero and not bool(found[~seen].any())
        return zero


def _masks(total: int) -> Iterator[Tensor]:
    """No padding, padding on the left, and padding anywhere; int64 [B, total]."""
    yield torch.ones(BATCH, total, dtype=torch.long)
    pads = torch.tensor([0, 2, total // 2 + 1])
    yield (torch.arange(total) >= pads[:, None]).long()
    yield draw((BATCH, total), torch.bool, 5).long()


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
