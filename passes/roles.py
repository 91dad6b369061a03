"""Decides what every projection of a graph becomes: split by rows, by columns, or whole.

A projection can be split by rows if its input features fall into classes that no other reader
needs whole; the projections that those features come from are then split by columns. Three things
can tie all features into one class although a split exists, and are tried where that happened:
a norm over all of them, whose statistic can be summed over the ranks; a channel that many units
read (a K/V head, a rotary key that all heads share), which can be held by several ranks; both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, fx

from spdcompile.passes.base import module_path
from spdcompile.passes.channelflow import Choices, Flow, follow_channels, head_of

# A projection out of a latent dim that widens it by more is not worth a split by rows: the sums
# of its wide output would cost more than the split of its narrow input saves.
_WIDEST = 2


@dataclass(frozen=True, slots=True)
class Roles:
    """What was decided.

    Args:
        rows: projections that are split by rows, in graph order.
        whole: class that some reader needs whole -> why.
    """

    choices: Choices
    flow: Flow
    rows: tuple[fx.Node, ...]
    whole: dict[int, str]

    def num_units(self, node: fx.Node) -> int:
        """Classes of a projection's input features; 1 if they cannot be split."""
        if node not in self.rows:
            return 1
        return len(set(self.flow.class_of(self.flow.consumed[node])))


def decide_roles(
    graph: fx.Graph, params: frozenset[str], tp: int, *, ends_program: bool = False
) -> Roles:
    """The roles that split the graph's projections over as many of `tp` ranks as they can."""
    decider = _Decider(graph, params, tp)
    # Split by rows, a head would be summed over the vocabulary on every rank.
    head = head_of(follow_channels(graph, params, Choices())) if ends_program else None
    roles = decider.settle(Choices(head=head))
    tried: set[fx.Node] = set()
    while (node := decider.starved(roles, tried)) is not None:
        tried.add(node)
        roles = decider.freed(roles, node)
    return decider.without_idle_sums(roles)


class _Decider:
    """Follows one graph under changing choices."""

    def __init__(self, graph: fx.Graph, params: frozenset[str], tp: int) -> None:
        self.graph, self.params, self.tp = graph, params, tp

    def settle(self, choices: Choices) -> Roles:
        """The roles under the given choices; row-split projections fall silent."""
        while True:
            flow = follow_channels(self.graph, self.params, choices)
            rows, whole = _rows(flow)
            silent = choices.silent | set(rows)
            if silent == choices.silent:
                return Roles(choices, flow, rows, whole)
            choices = replace(choices, silent=silent)

    def starved(self, roles: Roles, tried: set[fx.Node]) -> fx.Node | None:
        """The last projection whose input has fewer units than there are ranks, but channels."""
        columns = _columns(roles.flow, roles.rows)
        for node in reversed(list(roles.flow.consumed)):
            ids = roles.flow.consumed[node]
            widens = len(roles.flow.produced[node]) > _WIDEST * len(ids)
            if node in tried or node in columns or widens or bool((ids < 0).any()):
                continue
            others = _needed_whole(roles.flow, columns, but=node)
            classes = set(map(int, roles.flow.class_of(ids)))
            if len(classes) < min(self.tp, len(ids)) and not classes & others.keys():
                return node
        return None

    def freed(self, roles: Roles, node: fx.Node) -> Roles:
        """Better roles for a starved projection, if there are any."""
        best = roles
        for choices in self._remedies(roles, node):
            found = self._without_idle_hubs(self.settle(choices))
            if found.num_units(node) > best.num_units(node) and not _counts_twice(found):
                best = found
            if best.num_units(node) >= self.tp:
                break
        return best

    def _remedies(self, roles: Roles, node: fx.Node) -> Iterator[Choices]:
        flow, choices = roles.flow, roles.choices
        classes = set(map(int, flow.class_of(flow.consumed[node])))
        sums = {n for n, ids in flow.reduced.items() if classes & _classes(flow, ids)}
        sums = {n for n in sums if not n.kwargs}
        hubs = {hub for hub in flow.hubs if int(flow.classes[hub]) in classes}
        summed, shared = choices.summed | sums, choices.shared | hubs
        if sums:
            yield replace(choices, summed=summed)
        if hubs:
            yield replace(choices, shared=shared)
        if sums and hubs:
            yield replace(choices, summed=summed, shared=shared)

    def _without_idle_hubs(self, roles: Roles) -> Roles:
        """The same without sharing channels that meet those of one class alone."""
        flow, choices = roles.flow, roles.choices
        meets: dict[int, set[int]] = {}
        for server, one in flow.classes[flow.served].T.tolist():
            meets.setdefault(server, set()).add(one)
        hubs = {i for i in choices.shared if len(meets.get(int(flow.classes[i]), ())) > 1}
        if hubs == choices.shared:
            return roles
        return self.settle(replace(choices, shared=frozenset(hubs)))

    def without_idle_sums(self, roles: Roles) -> Roles:
        """The same without sums over the ranks of what lies within one unit anyway."""
        flow = roles.flow
        spanning = {
            node for node in roles.choices.summed if len(_classes(flow, flow.reduced[node])) > 1
        }
        return self.settle(replace(roles.choices, summed=frozenset(_across(flow, spanning))))


def _counts_twice(roles: Roles) -> bool:
    """Whether a sum over the ranks would count channels that several ranks hold."""
    reduced = [roles.flow.reduced[node] for node in roles.choices.summed]
    return any(roles.choices.shared & set(ids.reshape(-1).tolist()) for ids in reduced)


def _across(flow: Flow, nodes: set[fx.Node]) -> Iterator[fx.Node]:
    """The reductions that combine channels of different classes in one element."""
    for node in nodes:
        ids = flow.reduced[node]
        dims = node.args[1] if len(node.args) > 1 and node.args[1] else range(ids.dim())
        dims = [dims] if isinstance(dims, int) else dims
        classes = ids.clone().apply_(lambda i: int(flow.classes[i]) if i >= 0 else -1)
        if bool((classes.amax(list(dims)) != classes.amin(list(dims))).any()):
            yield node


def _rows(flow: Flow) -> tuple[tuple[fx.Node, ...], dict[int, str]]:
    """The projections to split by rows, and what must stay whole."""
    rows, whole, columns = _settled(flow, set())
    feeding = _columns(flow, rows)
    if feeding != columns:
        # What only seemed to feed a split may itself be split by rows.
        more = _settled(flow, feeding)
        if set(more[0]) > set(rows):
            rows, whole, _ = more
    return rows, whole


def _settled(
    flow: Flow, columns: set[fx.Node]
) -> tuple[tuple[fx.Node, ...], dict[int, str], set[fx.Node]]:
    """Projections to split by rows, what must stay whole, and what was set aside for columns.

    A projection between two others is split by its output: the later split takes precedence.
    """
    columns = set(columns)
    while True:
        whole = _needed_whole(flow, columns)
        rows: list[fx.Node] = []
        for node in reversed(list(flow.consumed)):
            if node not in columns and _splits(flow, node, whole):
                rows.append(node)
                columns |= _columns(flow, (node,))
        if not columns & flow.consumed.keys() & set(rows):
            found = _needed_whole(flow, columns)
            if found.keys() == whole.keys():
                return tuple(reversed(rows)), whole, columns


def _columns(flow: Flow, rows: tuple[fx.Node, ...]) -> set[fx.Node]:
    """The projections that feed the given ones."""
    classes = {c for node in rows for c in _classes(flow, flow.consumed[node])}
    return {node for node, ids in flow.produced.items() if classes & _classes(flow, ids)}


def _needed_whole(flow: Flow, columns: set[fx.Node], but: fx.Node | None = None) -> dict[int, str]:
    """Classes that some reader, `but` excepted, needs whole -> why."""
    whole = {c: reason for seen, reason in flow.opaque for c in _classes(flow, seen)}
    for ids in flow.outputs:
        if ids is not None:
            whole.update(dict.fromkeys(_classes(flow, ids), "the block's output"))
    before = -1
    while len(whole) != before:
        before = len(whole)
        for node, ids in flow.consumed.items():
            if node is not but and (node in columns or not _splits(flow, node, whole)):
                for c in _classes(flow, ids):
                    whole.setdefault(c, f"{name_of(node)} reads them whole")
    return whole


def _splits(flow: Flow, node: fx.Node, whole: dict[int, str]) -> bool:
    """Whether a projection's input features fall into several classes, all of them free."""
    ids = flow.consumed[node]
    if bool((ids < 0).any()) or flow.shared & set(ids.tolist()):
        return False
    classes = _classes(flow, ids)
    return len(classes) >= 2 and not classes & whole.keys()


def _classes(flow: Flow, ids: Tensor) -> set[int]:
    return set(map(int, flow.class_of(ids.unique())))


def name_of(node: fx.Node) -> str:
    """A projection's module path, its node name if that is unknown."""
    return module_path(node) or node.name
