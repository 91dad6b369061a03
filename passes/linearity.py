"""Which operators let a pending sum, R + P, pass through them: those that are linear in it."""

from __future__ import annotations

import torch
from torch import fx

from spdcompile.passes.concrete import call_of
from spdcompile.passes.placement import RULES
from spdcompile.passes.placement.types import P, R

aten = torch.ops.aten


def carries(
    node: fx.Node, pending: frozenset[fx.Node], unsteady: frozenset[fx.Node] | set[fx.Node]
) -> bool:
    """Whether an operator is linear in its pending operands, taken together.

    Read off the rule table: the operator has a row with P at those operands and R elsewhere. Of
    the operators with several tensor operands, addition carries whatever the other operand is, and
    multiplication only a factor that is the same on every rank for certain.

    Args:
        unsteady: values that may differ from rank to rank.
    """
    tensors = tensor_args(node)
    if len(tensors) > 1 and node.target is aten.add.Tensor:
        shape = node.meta["val"].shape
        same = all(arg.meta["val"].shape == shape for arg in pending)
        return same and not node.kwargs and _lets_partials_through(node, frozenset(tensors))
    if len(pending) > 1 or len(tensors) != len(set(tensors)):
        return False
    steady = all(_is_whole(arg) for arg in tensors if arg not in pending)
    return (
        steady and not unsteady & set(tensors) - pending and _lets_partials_through(node, pending)
    )


def _is_whole(node: fx.Node) -> bool:
    placement = node.meta.get("placement")  # before placements are known, inputs are whole
    return placement == R or (placement is None and node.op == "placeholder")


def is_size(node: fx.Node) -> bool:
    """Whether a node's value is a size and not a tensor or a list of them."""
    return not isinstance(node.meta["val"], torch.Tensor | list | tuple)


def tensor_args(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a node in the order of `Call.operands`, repetitions included."""
    found: list[fx.Node] = []

    def visit(arg: fx.Node) -> fx.Node:
        if not is_size(arg):
            found.append(arg)
        return arg

    fx.map_arg((node.args, dict(node.kwargs)), visit)
    return found


def _lets_partials_through(node: fx.Node, partial: frozenset[fx.Node]) -> bool:
    """Whether the operator's rule gives P for P at the given operands."""
    rule = RULES.get(node.target)
    if rule is None:
        return False
    call = call_of(node, lambda arg: (P if arg in partial else R, None))
    answer = rule.place(call)
    return answer is not None and answer.out == P and not answer.cuts
