"""Makes a program that runs on new tokens alone: it remembers what it needs of those before.

Each `spd::attention` gets two caches, of its keys and of its values, laid out over the ranks as
they are; where operators mix tokens otherwise, `passes/pieces.py` gives them what they need. Where
keys and values are computed from fewer numbers a token than they have themselves, by operators
that serve nothing else (the latents of MLA), those numbers are remembered, and the keys and values
of all tokens computed from them at each step.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from spdcompile.passes.base import Part, PassResult, Program, add_call
from spdcompile.passes.columns import START, Columns, refuse
from spdcompile.passes.ops import ATTEND, ATTEND_CACHED, ATTENTION
from spdcompile.passes.pieces import Pieces
from spdcompile.passes.tokens import SUBJECT


def remember(program: Program) -> PassResult:
    """Gives the program its caches, and the input `start`.

    Raises:
        RefusalError: the program cannot run on new tokens alone.
    """
    for refusal in program.refusals:
        if refusal.subject == SUBJECT:
            raise refuse(refusal.reason)
    mask, graphs, made = program.inputs[1], {}, {}
    parts = []
    for part in program.parts:
        if part.graph not in made:
            made[part.graph] = columns = _rewritten(program, part)
            graphs[part.graph] = columns.block
        columns = made[part.graph]
        given = {**part.inputs, **dict.fromkeys(columns.masks, mask)}
        given |= dict.fromkeys(columns.starts, START)
        parts.append(replace(part, inputs=given, caches=columns.caches))
    program = replace(
        program,
        graphs=graphs,
        parts=tuple(parts),
        inputs=(*program.inputs, START),
        one_start=any(columns.counts for columns in made.values()),
    )
    return PassResult(program, sum(len(columns.caches) for columns in made.values()))


def _rewritten(program: Program, part: Part) -> Columns:
    masks = [name for name, value in part.inputs.items() if value == program.inputs[1]]
    columns = Columns(program.graph_of(part).copied(), part, masks)
    columns.take_sizes_elsewhere()
    Pieces(columns).run()
    for node in columns.graph.find_nodes(op="call_function", target=ATTENTION):
        _remember_keys(columns, node)
    columns.graph.eliminate_dead_code()
    columns.block.module.recompile()
    return columns


def _remember_keys(columns: Columns, node: fx.Node) -> None:
    q, k, v, valid, sinks, *settings = node.args
    _, _, window, _, chunk = (*settings, 0)[:5]
    tail = (valid, columns.start(), sinks, *settings)
    cut = columns.narrowest([q], (k, v))
    with columns.graph.inserting_before(node):
        if cut is None:
            span = min((size for size in (window, chunk) if size), default=0)
            caches = [columns.cache(x, span) for x in (k, v)]
            out = add_call(columns.graph, ATTEND_CACHED, (q, k, v, *caches, *tail), node.meta)
        else:
            k, v = map(columns.recomputing(cut), (k, v))
            out = add_call(columns.graph, ATTEND, (q, k, v, *tail), node.meta)
    node.replace_all_uses_with(out)
    columns.graph.erase_node(node)
