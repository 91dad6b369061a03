"""Attention of new tokens to a cache, against attention of the whole sequence at once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import spdcompile.runtime.cached_attention  # noqa: F401  (gives the operators their kernels)
from spdcompile.passes.ops import APPEND, ATTEND, ATTEND_CACHED, ATTENTION
from tests.compare import rel_err

BOUND = 1e-12
WIDTH, VALUE_WIDTH, BATCH = 4, 3, 3


@dataclass(frozen=True)
class Case:
    """A sequence in pieces, and how attention looks at it."""

    pieces: tuple[int, ...]
    groups: int
    repeats: int
    window: int
    chunk: int
    softcap: float
    sinks: bool
    pads: tuple[int, ...]

    @property
    def length(self) -> int:
        return sum(self.pieces)

    @property
    def slots(self) -> int:
        return min([size for size in (self.window, self.chunk) if size] or [self.length + 2])

    def tail(self, scale: float = 0.5) -> tuple[object, ...]:
        return (scale, True, self.window, self.softcap, self.chunk)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pieces = tuple(draw(st.lists(st.sampled_from([1, 1, 2, 3, 5, 8]), min_size=1, max_size=6)))
    limit = draw(st.sampled_from(["none", "window", "chunk"]))
    size = draw(st.integers(1, 9))
    most = min(3, sum(pieces) - 1)
    return Case(
        pieces,
        groups=draw(st.sampled_from([1, 2])),
        repeats=draw(st.sampled_from([1, 3])),
        window=size if limit == "window" else 0,
        chunk=size if limit == "chunk" else 0,
        softcap=draw(st.sampled_from([0.0, 2.0])),
        sinks=draw(st.booleans()),
        pads=tuple(draw(st.integers(0, most)) for _ in range(BATCH)),
    )


def _tensors(case: Case, ranks: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v, valid and sinks of the whole sequence; with ranks in front if there are any."""
    front = (ranks,) if ranks else ()
    heads = case.groups * case.repeats
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*front, *shape, dtype=torch.float64, generator=random)

    q = draw(BATCH, heads, case.length, WIDTH)
    k = draw(BATCH, case.groups, case.length, WIDTH)
    v = draw(BATCH, case.groups, case.length, VALUE_WIDTH)
    valid = (torch.arange(case.length) >= torch.tensor(case.pads)[:, None]).long()
    return q, k, v, valid, draw(heads) if case.sinks else None


def _caches(case: Case, k: Tensor, v: Tensor) -> list[Tensor]:
    # What lies in a slot that was not written must not matter.
    return [x.new_full((*x.shape[:-2], case.slots, x.shape[-1]), 1e3) for x in (k, v)]


def _in_pieces(case: Case, tensors: tuple[Tensor, ...], attend: object = ATTEND_CACHED) -> Tensor:
    q, k, v, valid, sinks = tensors
    caches, outs, first = _caches(case, k, v), [], 0
    for size in case.pieces:
        last = first + size
        new = (x[..., first:last, :] for x in (q, k, v))
        start = torch.full((BATCH,), first)
        outs.append(attend(*new, *caches, valid[:, :last], start, sinks, *case.tail()))
        first = last
    return torch.cat(outs, -3)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_pieces_equal_the_whole(case: Case) -> None:
    q, k, v, valid, sinks = tensors = _tensors(case)
    expected = ATTENTION(q, k, v, valid, sinks, *case.tail())
    assert rel_err(_in_pieces(case, tensors), expected, real=valid) < BOUND


@given(cases())
@settings(max_examples=60, deadline=None)
def test_ranks_equal_each_rank_alone(case: Case) -> None:
    q, k, v, valid, sinks = tensors = _tensors(case, ranks=2)

    def mapped(*args: object) -> Tensor:
        dims = tuple(0 if index < 5 or (index == 7 and case.sinks) else None for index in range(13))
        return torch.vmap(ATTEND_CACHED, dims)(*args)

    found = _in_pieces(case, tensors, mapped)
    for rank in range(2):
        own = (q[rank], k[rank], v[rank], valid, None if sinks is None else sinks[rank])
        assert rel_err(found[rank], _in_pieces(case, own)) < BOUND


@pytest.mark.parametrize("computed_per_rank", [False, True])
def test_ranks_share_one_cache_of_keys_that_are_the_same(computed_per_rank: bool) -> None:
    case = Case((4, 1, 2), 1, 2, 0, 0, 0.0, sinks=True, pads=(0, 1, 2))
    q, _, _, valid, sinks = _tensors(case, ranks=2)
    _, k, v, _, _ = _tensors(case)
    assert sinks is not None
    expected = [ATTENTION(q[r], k, v, valid, sinks[r], *case.tail()) for r in range(2)]
    key_dim = 0 if computed_per_rank else None
    dims = (0, key_dim, key_dim, None, None, None, None, 0, *[None] * 5)
    caches, outs, first = _caches(case, k, v), [], 0
    for last in (4, 5, 7):
        new = [x[..., first:last, :] for x in (k, v)]
        if computed_per_rank:
            new = [x.expand(2, *x.shape) for x in new]
        args = (q[..., first:last, :], *new, *caches, valid[:, :last], torch.full((BATCH,), first))
        outs.append(torch.vmap(ATTEND_CACHED, dims)(*args, sinks, *case.tail()))
        first = last
    found = torch.cat(outs, -3)
    assert all(rel_err(found[r], expected[r], real=valid) < BOUND for r in range(2))
    assert rel_err(caches[0][:, :, : case.length], k) == 0


def test_sequences_go_on_at_columns_of_their_own() -> None:
    case = Case((7,), 2, 2, 0, 0, 0.0, sinks=False, pads=(0, 0, 0))
    q, k, v, valid, _ = _tensors(case)
    lengths = torch.tensor([3, 5, 6])  # of the prompts, padded on the right to 6
    caches = _caches(case, k, v)
    prompt = (torch.arange(6) < lengths[:, None]).long()
    other = [torch.where(prompt[:, None, :, None] == 1, x[:, :, :6], 7.0) for x in (q, k, v)]
    zeros = torch.zeros(BATCH, dtype=torch.long)
    ATTEND_CACHED(*other, *caches, prompt, zeros, None, *case.tail())
    new = [torch.stack([x[b, :, n] for b, n in enumerate(lengths)])[:, :, None] for x in (q, k, v)]
    out = ATTEND_CACHED(*new, *caches, valid[:, :7], lengths, None, *case.tail())
    for b, n in enumerate(lengths.tolist()):
        own = [x[b : b + 1, :, : n + 1] for x in (q, k, v)]
        expected = ATTENTION(*own, valid[:1, : n + 1], None, *case.tail())[:, -1]
        assert rel_err(out[b], expected) < BOUND


@given(cases())
@settings(max_examples=60, deadline=None)
def test_given_keys_of_all_tokens_equal_the_whole(case: Case) -> None:
    q, k, v, valid, sinks = _tensors(case)
    expected = ATTENTION(q, k, v, valid, sinks, *case.tail())
    first = case.length - case.pieces[-1]
    start = torch.full((BATCH,), first)
    out = ATTEND(q[:, :, first:], k, v, valid, start, sinks, *case.tail())
    assert rel_err(out, expected[:, first:], real=valid[:, first:]) < BOUND


@pytest.mark.parametrize("dim", [1, 2])
def test_append_writes_from_each_start_on(dim: int) -> None:
    cache, new = torch.zeros(2, 6, 6, 3), torch.ones(2, 6, 6, 3).narrow(dim, 0, 2)
    APPEND(new, cache, torch.tensor([1, 3]), dim)
    written = cache.movedim(dim, 1)[..., 0, 0]
    assert written.tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]
