"""Sample calls of operators, as a rule sees them and with real tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spdcompile.passes._torch import pytree
from spdcompile.passes.placement.types import Call, Operand

BATCH, LENGTH = 2, 5


@dataclass(frozen=True, eq=False)
class Sample:
    """A call of an operator with real tensors.

    Args:
        make: (batch, length) -> the arguments, tensors among them.
        runs: sizes of the runs of a fused dim, tried where a dim has just their sum.
        kernel: computes the operator, if it has no kernel itself.
        out_shape: result's shape at batch and length 1, where running there gives another one.
    """

    target: Any
    make: Callable[[int, int], tuple[Any, ...]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    runs: tuple[int, ...] = ()
    kernel: Callable[..., Any] | None = None
    out_shape: tuple[int, ...] | None = None

    def __str__(self) -> str:
        args = (_describe(leaf) for leaf in self._arguments(BATCH, LENGTH))
        return f"{self.target}({', '.join(args)})"

    @cached_property
    def seen(self) -> Call:
        """The call as a rule sees it, everything replicated."""
        return self._call(1, 1)

    @cached_property
    def real(self) -> Call:
        """The call that is simulated."""
        return self._call(BATCH, LENGTH)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Tensors of `real`, in the order of its operands."""
        args = self._arguments(BATCH, LENGTH)
        return [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]

    @cached_property
    def parts(self) -> list[tuple[Tensor, Tensor] | None]:
        """Each floating tensor as an uneven sum, with noise that cancels."""
        generator = torch.Generator().manual_seed(1)
        parts: list[tuple[Tensor, Tensor] | None] = []
        for whole in self.tensors:
            noise = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
            noise = noise.to(whole.dtype)
            floating = whole.is_floating_point()
            parts.append((0.6 * whole + noise, 0.4 * whole - noise) if floating else None)
        return parts

    @cached_property
    def whole(self) -> list[Tensor]:
        """The result on whole tensors, always as a list."""
        return self.run(self.real, self.tensors)

    def run(self, call: Call, tensors: list[Tensor]) -> list[Tensor]:
        """Runs `call` on tensors; always a list of results."""
        out = replace(call, target=self.kernel or self.target).run(tensors)
        return list(out) if isinstance(out, list | tuple) else [out]

    def small(self) -> list[Tensor]:
        """Tensors for `seen`."""
        args = self._arguments(1, 1)
        return [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]

    def _arguments(self, batch: int, length: int) -> tuple[Any, ...]:
        torch.manual_seed(0)
        return self.make(batch, length)

    def _call(self, batch: int, length: int) -> Call:
        args = self._arguments(batch, length)
        described = pytree.tree_map(
            lambda leaf: Operand(tuple(leaf.shape)) if isinstance(leaf, Tensor) else leaf, args
        )
        call = Call(self.target, described, self.kwargs, ())
        leaves = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        out = self.run(call, leaves)
        shape = tuple(out[0].shape) if len(out) == 1 else ()
        if (batch, length) == (1, 1) and self.out_shape is not None:
            shape = self.out_shape
        return replace(call, out_shape=shape)


def _describe(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return "x".join(map(str, leaf.shape)) or "scalar"
    return f"[{', '.join(map(_describe, leaf))}]" if isinstance(leaf, list) else str(leaf)
