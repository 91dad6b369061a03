"""Shows what the drop changed in each distinct kind of block."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import fx

from spdcompile.passes.base import BlockGraph, Part, Program, module_path
from spdcompile.passes.printer import graph_lines
from spdcompile.report.blocks import within_block
from spdcompile.report.spans import name_layers

_CONTEXT_LINES = 2


def diff_blocks(before: Program, after: Program) -> list[tuple[str, str]]:
    """Compares the blocks of a program before and after the drop.

    Values that correspond have the same name on both sides, so that only operators show that were
    added, removed or given other inputs.

    Returns: (title, unified diff) for each distinct kind of block that changed.
    """
    kinds: dict[tuple[str, str], list[tuple[Part, Part]]] = {}
    for old, new in zip(before.parts, after.parts, strict=True):
        if old.graph != new.graph:
            kinds.setdefault((old.graph, new.graph), []).append((old, new))
    found = []
    for (old_key, new_key), pairs in kinds.items():
        old_graph = before.graphs[old_key].module.graph
        new_graph = after.graphs[new_key].module.graph
        text = _diff(old_graph, new_graph, after.layers)
        found.append((_title([new for _, new in pairs]), text))
    return found


def _title(parts: list[Part]) -> str:
    layers = [part.layer for part in parts if part.layer is not None]
    names = name_layers(layers) if layers else parts[0].name
    dropped = ", ".join(parts[0].dropped)
    return f"{names}: {dropped} dropped" if dropped else f"{names}: sums pending from before"


def _diff(old: fx.Graph, new: fx.Graph, layers: str) -> str:
    names = _aligned_names(old, new)
    before = _lines(old, {node: node.name for node in old.nodes}, layers)
    after = _lines(new, names, layers)
    found = difflib.unified_diff(
        before, after, "before the drop", "after the drop", lineterm="", n=_CONTEXT_LINES
    )
    return "\n".join(found)


def _aligned_names(old: fx.Graph, new: fx.Graph) -> dict[fx.Node, str]:
    """Names for the new nodes: those of the old ones they correspond to, else names not taken."""
    olds, news = list(old.nodes), list(new.nodes)
    matcher = difflib.SequenceMatcher(
        None, [_form(node) for node in olds], [_form(node) for node in news], autojunk=False
    )
    names = {}
    for i, j, size in matcher.get_matching_blocks():
        names |= {b: a.name for a, b in zip(olds[i : i + size], news[j : j + size], strict=True)}
    taken = {node.name for node in olds}
    for node in news:
        if node not in names:
            names[node] = _free_name(node.name, taken)
            taken.add(names[node])
    return names


def _form(node: fx.Node) -> tuple[Any, ...]:
    """What a node and its counterpart have in common, whatever they read."""
    constants = [str(arg) for arg in node.args if not isinstance(arg, fx.Node | list | tuple)]
    name = node.name if node.op == "placeholder" else ""
    return node.op, str(node.target), module_path(node), name, *constants


def _free_name(name: str, taken: set[str]) -> str:
    number, base = 1, name.rstrip("0123456789").rstrip("_")
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    return name


def _lines(graph: fx.Graph, names: Mapping[fx.Node, str], layers: str) -> list[str]:
    """The printed graph under other names, without placements and shapes."""
    renamed = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        target = names[node] if node.op == "placeholder" else node.target
        env[node] = renamed.create_node(node.op, target, args, kwargs, names[node])
        env[node].meta = {"val": None, "nn_module_stack": node.meta.get("nn_module_stack")}
    block = BlockGraph(fx.GraphModule({}, renamed))
    return [within_block(line, layers) for line in graph_lines(block, {})]
