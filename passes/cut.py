"""The fewest numbers a token from which the keys and values of an attention can be made again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import networkx as nx
from torch import fx

from spdcompile.passes.spans import SPANS
from spdcompile.passes.tokens import TOKENS


def narrowest_cut(
    queries: Iterable[fx.Node], wanted: tuple[fx.Node, ...], size: Callable[[fx.Node], float]
) -> tuple[fx.Node, ...] | None:
    """The values to remember in place of `wanted`; None if nothing is narrower than they are.

    A minimum cut between what the keys and values are made of and themselves, through values that
    serve nothing else: what the queries are made of too, such as the input of the block or the
    rotary angles of the new tokens, is not there for the tokens before.

    Args:
        queries: what is computed of new tokens alone.
        wanted: keys and values.
        size: numbers a token of a value; infinite where it cannot be remembered.
    """
    own = _sources(wanted) - _sources(queries)
    if not all(node in own for node in wanted):
        return None
    net = nx.DiGraph()
    for node in wanted:
        net.add_edge((node, "made"), "wanted", capacity=math.inf)
    for node in own:
        net.add_edge((node, "needed"), (node, "made"), capacity=size(node))
        for arg in _token_inputs(node):
            begin = (arg, "made") if arg in own else "given"
            net.add_edge(begin, (node, "needed"), capacity=math.inf)
    if "given" not in net:
        return None
    try:
        # Of several cuts, networkx gives the one nearest to the end.
        total, (before, _) = nx.minimum_cut(net, "given", "wanted")
    except nx.NetworkXUnbounded:
        return None
    if total >= sum(map(size, wanted)):
        return None
    return tuple(n for n in own if (n, "needed") in before and (n, "made") not in before)


def _sources(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all calls behind them that make something of new tokens, token by token."""
    found: set[fx.Node] = set()
    pending = [node for node in nodes if _is_call(node)]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [arg for arg in _token_inputs(node) if _is_call(arg)]
    return found


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function" and SPANS not in node.meta


def _token_inputs(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.all_input_nodes if TOKENS in arg.meta or SPANS in arg.meta]
