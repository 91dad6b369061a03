"""Alpha and beta: arithmetic, fits, and links of two levels."""

from __future__ import annotations

import pytest

from spdcompile.estimate.counting import Kind
from spdcompile.estimate.links import Link, Timed, Way, fitted
from spdcompile.estimate.machines import Machines

US = 1e-6
WAY = Way(3 * US, 2 * US, 1e-9)


def test_all_reduce_takes_base_steps_and_bytes() -> None:
    # 4 ranks: 6 steps, each of a quarter of 8,000 bytes at 1 GB/s.
    assert WAY.seconds(Kind.ALL_REDUCE, 8000, 4) == pytest.approx((3 + 6 * (2 + 2)) * US)


def test_all_gather_takes_half_the_steps() -> None:
    assert WAY.seconds(Kind.ALL_GATHER, 8000, 4) == pytest.approx((3 + 3 * (2 + 2)) * US)


def test_single_rank_takes_nothing() -> None:
    assert WAY.seconds(Kind.ALL_REDUCE, 8000, 1) == 0


def test_fastest_way_is_taken_at_each_size() -> None:
    slow_start = Way(100 * US, 0, 1e-10)
    link = Link("both", (WAY, slow_start))
    for size, way in ((1000, WAY), (1_000_000, slow_start)):
        assert link.of(Kind.ALL_REDUCE, size, 2) == way.seconds(Kind.ALL_REDUCE, size, 2)


@pytest.mark.parametrize(("ranks", "within", "across"), [(8, 4, 2), (2, 1, 2), (3, 2, 2)])
def test_two_nodes_take_a_ring_within_and_one_across(ranks: int, within: int, across: int) -> None:
    between = Way(10 * US, 5 * US, 2e-9)
    link = Link("nodes", (WAY,), across=Link("net", (between,)), nodes=2)
    expected = WAY.seconds(Kind.ALL_REDUCE, 8000, within)
    expected += between.seconds(Kind.ALL_REDUCE, 8000, across)
    assert link.of(Kind.ALL_REDUCE, 8000, ranks) == pytest.approx(expected)


def timed(way: Way, *cases: tuple[Kind, int, int]) -> list[Timed]:
    return [Timed(kind, ranks, size, way.seconds(kind, size, ranks)) for kind, ranks, size in cases]


def test_fit_finds_the_constants_that_made_the_times() -> None:
    cases = [(Kind.ALL_REDUCE, 4, 1000), (Kind.ALL_REDUCE, 8, 10**6), (Kind.ALL_GATHER, 8, 10**4)]
    cases.append((Kind.ALL_REDUCE, 2, 10**7))
    found = fitted(timed(WAY, *cases))
    assert (found.base_s, found.hop_s) == pytest.approx((WAY.base_s, WAY.hop_s))
    assert found.s_per_byte == pytest.approx(WAY.s_per_byte)


def test_fit_keeps_the_step_that_is_given() -> None:
    rows = timed(WAY, (Kind.ALL_REDUCE, 8, 1000), (Kind.ALL_REDUCE, 8, 10**6))
    found = fitted(rows, WAY.hop_s)
    assert found.hop_s == WAY.hop_s
    assert found.base_s == pytest.approx(WAY.base_s)


def test_fit_gives_no_negative_constant() -> None:
    rows = [Timed(Kind.ALL_REDUCE, 2, 1000, 1e-5), Timed(Kind.ALL_REDUCE, 2, 10**6, 1e-6)]
    found = fitted(rows)
    assert min(found.base_s, found.hop_s, found.s_per_byte) >= 0


def test_package_links_are_near_what_they_were_fitted_to() -> None:
    machines = Machines.load()
    for name in machines.links:
        link = machines.link(name)
        errors = sorted(
            abs(link.of(row.kind, row.num_bytes, row.ranks) / row.seconds - 1)
            for row in link.measured
        )
        assert not errors or errors[len(errors) // 2] < 0.1, name


def test_slower_links_are_slower() -> None:
    machines = Machines.load()
    names = ("nvlink4", "nvlink3", "two-nodes", "no-p2p", "pcie4")
    times = [machines.link(name).of(Kind.ALL_REDUCE, 2**25, 8) for name in names]
    assert times == sorted(times)
