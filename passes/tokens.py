"""Finds how a program can run on new tokens alone.

Of most values the new tokens are computed from the new tokens. Two kinds of operators look at
other tokens: `spd::attention`, which remembers keys and values, and those that mix tokens in
another way. Of these, `passes/prefixes.py` tests that no token sees a later one through them, and
`passes/spans.py` finds what has to be there of all tokens for them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from spdcompile.passes.base import PassResult, Program, Refusal
from spdcompile.passes.following import MIXED, Follower, MixedError, follow_program
from spdcompile.passes.placement.types import R, Shard
from spdcompile.passes.prefixes import check_prefixes
from spdcompile.passes.spans import SPANS, find_spans

# Key of a node's meta: the dim that counts tokens.
TOKENS = "tokens"
SUBJECT = "KV cache"


def follow_tokens(program: Program) -> PassResult:
    """Writes `meta["tokens"]` on every value that is followed token by token.

    On those that are computed for as many tokens as are needed, it writes `meta["spans"]`. Where
    that cannot be had, the program is left as it is, with the reason as a refusal.
    """
    given, program = program, program.map_graphs(lambda _, block: block.copied())
    try:
        followers = _followed(program)
    except MixedError as why:
        refusal = Refusal(SUBJECT, str(why))
        refused = replace(given, refusals=(*given.refusals, refusal))
        return PassResult(refused, 0, (refusal,))
    marks = _dims(followers)
    for node, dim in marks.items():
        node.meta[TOKENS] = dim
    for node, spans in find_spans(program, followers).items():
        node.meta[SPANS] = spans
    return PassResult(program, len(marks))


def _followed(program: Program) -> dict[str, Follower]:
    if program.min_length > 1:
        raise MixedError(f"its graph holds for {program.min_length} tokens and more")
    followers = follow_program(program)
    check_prefixes(program, followers)
    return followers


def _dims(followers: dict[str, Follower]) -> dict[fx.Node, Any]:
    return {
        node: _dim_of(placement)
        for follower in followers.values()
        for node, placement in follower.placements.items()
        if placement not in (R, []) and placement is not MIXED and node not in follower.free
    }


def _dim_of(placement: Any) -> Any:
    if isinstance(placement, list | tuple):
        return [_dim_of(item) for item in placement]
    return placement.dim if isinstance(placement, Shard) else None
