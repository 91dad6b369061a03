"""Products that read the same value, such as q, k and v, as one: their weights lie in one tensor.

torch.compile cannot do it, since it does not decide where parameters are stored.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, fx

from spdcompile.passes.base import Part, Program
from spdcompile.runtime import pages

_ATEN = torch.ops.aten
_LINEAR = _ATEN.linear.default


@dataclass(frozen=True, slots=True)
class Pack:
    """Weights [n_i, k] of products with one left operand, or their biases [n_i].

    Args:
        name: of the placeholder that takes all of them, one below the other.
        members: placeholders that it stands for.
        sizes: n_i, on every rank.
    """

    name: str
    members: tuple[str, ...]
    sizes: tuple[int, ...]


def packs_of(program: Program, part: Part) -> tuple[Pack, ...]:
    """What can be packed in a part: products of the same value, each with parameters of its own."""
    module = program.graph_of(part).module
    products: dict[object, list[fx.Node]] = defaultdict(list)
    for node in module.graph.find_nodes(op="call_function", target=_LINEAR):
        x, *params = _operands(node)
        if all(param.name in part.params and len(param.users) == 1 for param in params):
            dtypes = tuple(part.params[param.name].dtype for param in params)
            products[x, dtypes].append(node)
    packs = []
    for nodes in products.values():
        if len(nodes) > 1:
            for params in zip(*(_operands(node)[1:] for node in nodes), strict=True):
                names = tuple(param.name for param in params)
                sizes = tuple(_rows(part, name) for name in names)
                packs.append(Pack(f"{names[0]}_and_{len(names) - 1}_more", names, sizes))
    return tuple(packs)


def _operands(node: fx.Node) -> list[fx.Node]:
    """Of a product: its left operand, its weight, its bias if it has one."""
    return [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node)]


def _rows(part: Part, name: str) -> int:
    """The size of a parameter's first dim on a rank."""
    spec = part.shards.get(name)
    return spec.index.shape[1] if spec and spec.dim == 0 else part.params[name].shape[0]


def packed(params: Iterable[tuple[str, Tensor]], packs: tuple[Pack, ...]) -> dict[str, Tensor]:
    """The parameters of a part with packs in place of their members.

    Args:
        params: each is copied before the next one is asked for, so that a part that is read from
            files is never in memory twice.
    """
    rows: dict[str, tuple[Pack, int, int]] = {}
    for pack in packs:
        starts = accumulate(pack.sizes[:-1], initial=0)
        for member, start, size in zip(pack.members, starts, pack.sizes, strict=True):
            rows[member] = (pack, start, size)
    made: dict[str, Tensor] = {}
    for name, tensor in params:
        if name not in rows:
            made[name] = tensor
            continue
        pack, start, size = rows[name]
        if pack.name not in made:
            whole = pages.empty((sum(pack.sizes), *tensor.shape[1:]), tensor.dtype, tensor.device)
            made[pack.name] = torch.nn.Parameter(whole, requires_grad=False)
        made[pack.name].narrow(0, start, size).copy_(tensor)
    return made


def pack_products(module: fx.GraphModule, packs: tuple[Pack, ...]) -> None:
    """Rewrites a graph for packed parameters.

    Where the products of a pack read one value, one product takes their place; where a dropped
    sync point has parted them, each reads its rows.
    """
    graph = module.graph
    placed = {node.name: node for node in graph.find_nodes(op="placeholder")}
    products: dict[tuple[fx.Node, ...], dict[Pack, fx.Node]] = defaultdict(dict)
    for pack in packs:
        members = [placed[name] for name in pack.members]
        with graph.inserting_before(members[0]):
            whole = graph.placeholder(pack.name)
        products[tuple(_user(member) for member in members)][pack] = whole
    for nodes, params in products.items():
        if len({node.args[0] for node in nodes}) == 1:
            _fuse(graph, nodes, params)
        else:
            _part(graph, placed, params)
    for pack in packs:
        for name in pack.members:
            graph.erase_node(placed[name])
    for node in graph.find_nodes(op="call_function", target=_ATEN.view.default):
        node.target = _ATEN.reshape.default  # a piece has the strides of the whole
    graph.lint()
    module.recompile()


def _user(placeholder: fx.Node) -> fx.Node:
    (user,) = placeholder.users
    return user


def _fuse(graph: fx.Graph, nodes: tuple[fx.Node, ...], params: Mapping[Pack, fx.Node]) -> None:
    """Puts one product in the place of several."""
    sizes = next(iter(params)).sizes
    with graph.inserting_before(nodes[0]):
        whole = graph.call_function(_LINEAR, (nodes[0].args[0], *params.values()))
        pieces = graph.call_function(_ATEN.split_with_sizes.default, (whole, list(sizes), -1))
        each = [graph.call_function(operator.getitem, (pieces, i)) for i in range(len(nodes))]
    for node, piece in zip(nodes, each, strict=True):
        node.replace_all_uses_with(piece)
        graph.erase_node(node)


def _part(graph: fx.Graph, placed: Mapping[str, fx.Node], params: Mapping[Pack, fx.Node]) -> None:
    """Gives each product its rows of the packed parameters."""
    for pack, whole in params.items():
        starts = accumulate(pack.sizes[:-1], initial=0)
        for name, start, size in zip(pack.members, starts, pack.sizes, strict=True):
            with graph.inserting_before(_user(placed[name])):
                rows = graph.call_function(_ATEN.narrow.default, (whole, 0, start, size))
            placed[name].replace_all_uses_with(rows)
