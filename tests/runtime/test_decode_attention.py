"""Our attention of one new token against the operator that it takes the place of."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import spdcompile.runtime.cached_attention  # noqa: F401  (gives the operators their kernels)
from spdcompile.passes.ops import ATTEND_CACHED
from spdcompile.runtime import native

SLOTS = 37
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    native.load_library()


class Case(NamedTuple):
    """New tokens of some sequences, and how they look at the cache."""

    dtype: torch.dtype = torch.float32
    batch: int = 2
    groups: int = 2
    repeats: int = 2
    width: int = 20
    value_width: int = 17
    new: int = 1
    starts: tuple[int, ...] = (5, 9)
    pads: tuple[int, ...] = (0, 3)
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    chunk: int = 0
    sinks: bool = False

    def operands(self) -> list[Tensor | None]:
        random = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(self.dtype)

        heads, total = self.groups * self.repeats, max(self.starts) + self.new
        # As a block gives them: transposed views of what its projections wrote.
        q = draw(self.batch, self.new, heads, self.width).transpose(1, 2)
        k = draw(self.batch, self.new, self.groups, self.width).transpose(1, 2)
        v = draw(self.batch, self.new, self.groups, self.value_width).transpose(1, 2)
        caches = [draw(self.batch, self.groups, SLOTS, w) for w in (self.width, self.value_width)]
        valid = (torch.arange(total) >= torch.tensor(self.pads)[:, None]).long()
        sinks = draw(heads) if self.sinks else None
        return [q, k, v, *caches, valid, torch.tensor(self.starts), sinks]

    def both(self) -> tuple[list[Tensor], list[Tensor]]:
        """The result and the caches of either operator."""
        found = []
        for operator in (torch.ops.spd_cpu.attend_cached, ATTEND_CACHED):
            operands = self.operands()
            settings = (0.3, self.causal, self.window, self.softcap, self.chunk)
            found.append([operator(*operands, *settings), *operands[3:5]])
        return found[0], found[1]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch = draw(st.integers(1, 3))
    starts = tuple(draw(st.integers(0, SLOTS - 1)) for _ in range(batch))
    return Case(
        draw(st.sampled_from(list(BOUNDS))),
        batch,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        starts=starts,
        pads=tuple(draw(st.integers(0, start)) for start in starts),
        causal=draw(st.booleans()),
    )


@settings(max_examples=80, deadline=None)
@given(cases())
def test_one_token_attends_as_before(case: Case) -> None:
    (out, *caches), (expected, *others) = case.both()
    assert out.shape == expected.shape and out.dtype == case.dtype
    # A result is a mean of values, and may be far smaller than they are.
    largest = max(float(values.abs().max()) for values in (case.operands()[2], case.operands()[4]))
    assert float((out.double() - expected.double()).abs().max()) < BOUNDS[case.dtype] * largest
    assert all(torch.equal(a, b) for a, b in zip(caches, others, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        Case(new=3, starts=(5, 9)),
        Case(window=4),
        Case(chunk=4),
        Case(softcap=2.0),
        Case(sinks=True),
        Case(dtype=torch.float64),
        Case(dtype=torch.float16),
        Case(starts=(SLOTS, SLOTS + 3), window=SLOTS),  # the cache is a window, and goes round
    ],
    ids=str,
)
def test_everything_else_is_left_to_the_operator(case: Case) -> None:
    found, expected = case.both()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_no_limit_reaches_is_no_limit() -> None:
    plain, _ = Case().both()
    limited, _ = Case(window=SLOTS, chunk=SLOTS).both()
    assert all(torch.equal(a, b) for a, b in zip(plain, limited, strict=True))


def test_threads_do_not_change_a_bit() -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(Case(groups=5, batch=2).both()[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
