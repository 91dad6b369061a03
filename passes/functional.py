"""Puts operators that write in place into functional form, where it is plain what they change.

torch.export's own way traces the whole graph anew, which costs more than the export did. A write
is plain if nothing but the written tensor itself is read afterwards, or the tensor of which it is a
slice. Other writes are left to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from spdcompile.passes._torch import OpOverload
from spdcompile.passes.base import add_call

aten = torch.ops.aten


class _NotPlainError(Exception):
    """A write that may change more than this pass follows."""


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node's operator changes one of its operands."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def made_functional(graph: fx.Graph) -> fx.Graph | None:
    """A copy of the graph in which no operator writes in place; None if that is not plain."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    places = {node: place for place, node in enumerate(copy.nodes)}
    try:
        for node in list(copy.nodes):
            if writes_in_place(node):
                _replace(node, places)
    except _NotPlainError:
        return None
    return copy


def _replace(node: fx.Node, places: dict[fx.Node, Any]) -> None:
    """The functional operator in the place of one that writes its first operand."""
    written = node.args[0]
    if _functional_form(node.target) is None or not _keeps_dtype(node):
        raise _NotPlainError
    chain = _chain(written)
    base = chain[-1]
    family = _family(base)
    if base.op != "call_function":
        raise _NotPlainError
    later = _later(node, family, places)
    spreads = bool(later - {written})
    if spreads and (later - set(chain) or not all(_is_slice(view) for view in chain[:-1])):
        raise _NotPlainError
    if spreads and _written_again(node, chain, places):
        raise _NotPlainError
    with node.graph.inserting_before(node):
        new = _call(node, _functional_form(node.target), node.args, written, places, node.kwargs)
        results = {written: new}
        if spreads:
            for view in chain[:-1]:
                _, dim, *bounds = view.args
                source = view.args[0]
                target = _SCATTERS[view.target]
                args = (source, results[view], dim, *bounds)
                results[source] = _call(node, target, args, source, places)
    for old, instead in results.items():
        for user in list(old.users):
            if places[user] > places[node] and user is not node:
                user.replace_input_with(old, instead)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _call(
    node: fx.Node,
    target: Any,
    args: tuple[Any, ...],
    like: fx.Node,
    places: dict[fx.Node, Any],
    kwargs: Any = None,
) -> fx.Node:
    """A call in the place of `node` whose result has the type of `like`."""
    new = add_call(node.graph, target, args, {**node.meta, "val": like.meta["val"]}, kwargs)
    places[new] = places[node]
    return new


def _functional_form(target: OpOverload) -> OpOverload | None:
    """`aten.mul` of `aten.mul_`, with the same overload; None for what is no aten operator."""
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten" or not name.endswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, target._overloadname, None)


def _chain(node: fx.Node) -> list[fx.Node]:
    """The node, what it is a view of, and so on to the tensor that owns the memory."""
    chain = [node]
    while (source := _viewed(chain[-1])) is not None:
        chain.append(source)
    return chain


def _viewed(node: fx.Node) -> fx.Node | None:
    """What a node may be a view of."""
    target = node.target
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if not isinstance(target, OpOverload):  # one of several results, or a size
        return node.args[0] if isinstance(node.meta.get("val"), torch.Tensor) else None
    aliases = any(result.alias_info is not None for result in target._schema.returns)
    return node.args[0] if aliases or target is aten.dropout.default else None


def _family(base: fx.Node) -> set[fx.Node]:
    """All that may share a tensor's memory."""
    found, open_ends = {base}, [base]
    while open_ends:
        for user in open_ends.pop().users:
            if user not in found and user.args and _viewed(user) in found:
                found.add(user)
                open_ends.append(user)
    return found


def _later(node: fx.Node, family: set[fx.Node], places: dict[fx.Node, Any]) -> set[fx.Node]:
    """Those of a family that were there before the write and are read after it."""
    return {
        one
        for one in family
        if places[one] < places[node]
        and any(places[user] > places[node] for user in one.users if user is not node)
    }


def _written_again(node: fx.Node, chain: list[fx.Node], places: dict[fx.Node, Any]) -> bool:
    """Whether a slice is written once more by a name that it has had before."""
    known = {node, *chain[:-1]}
    aliases = known | {alias for one in known for alias in _family(one)}
    return any(
        writes_in_place(user) and places[user] > places[node]
        for alias in aliases
        for user in alias.users
        if user.args and user.args[0] is alias
    )


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether the functional operator gives the dtype of the tensor that was to be written."""
    written, *others = node.all_input_nodes
    if written is not node.args[0] or node.target is aten.copy_.default:
        return written is node.args[0]
    dtype = written.meta["val"].dtype
    values = [other.meta.get("val") for other in others]
    return all(
        value.dtype == dtype or (dtype.is_floating_point and not value.dtype.is_floating_point)
        for value in values
        if isinstance(value, torch.Tensor)
    )


def _is_slice(view: fx.Node) -> bool:
    return view.target in _SCATTERS and not view.kwargs and len(view.args) > 1


_SCATTERS = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
