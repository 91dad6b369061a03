"""A rank by itself: sizes of its weights, number of its collectives, how long it waits."""

from __future__ import annotations

import time

import pytest
import torch

from spdcompile.estimate.links import Link, Way
from spdcompile.estimate.replays import replay, table_of
from spdcompile.estimate.structure import Structure
from spdcompile.estimate.work import Step
from spdcompile.plan import Plan
from spdcompile.runtime.executor import Backend
from spdcompile.runtime.replay import Replayed, ReplayExecutor, with_delays, without_delays
from tests.models import tiny

CPU, LAYERS, TP = torch.device("cpu"), 2, 2
DROPPED = frozenset({(0, "attn"), (1, "attn")})


@pytest.fixture(scope="module", params=["llama_gqa", "opt"])
def structure(request: pytest.FixtureRequest) -> Structure:
    return Structure(tiny(request.param).config)  # no weights


def executor(structure: Structure, *dropped: tuple[int, str]) -> ReplayExecutor:
    program = structure.remembering(Plan(TP, LAYERS, frozenset(dropped)))
    return ReplayExecutor(program, backend=Backend.EAGER, device=CPU)


def test_weights_are_a_ranks_own(structure: Structure) -> None:
    own = executor(structure)
    held = sum(x.nbytes for params in own.params.values() for x in params.values())
    assert held == structure.work(Plan(TP, LAYERS), Step(1, 4)).weight_bytes
    assert all(x.isfinite().all() for params in own.params.values() for x in params.values())


@pytest.mark.parametrize("step", [{"batch": 2, "new": 5}, {"batch": 2, "new": 1, "context": 5}])
@pytest.mark.parametrize("dropped", [(), tuple(DROPPED)])
def test_collectives_are_those_that_the_plan_keeps(
    structure: Structure, step: dict[str, int], dropped: tuple[tuple[int, str], ...]
) -> None:
    replayed = Replayed(executor(structure, *dropped), **step)
    counted = without_delays()
    replayed()
    assert counted.count == 2 * LAYERS - len(dropped) + 1  # and the gather of logits


def test_step_takes_its_compute_and_its_delays(structure: Structure) -> None:
    replayed = Replayed(executor(structure), batch=1, new=4)
    without_delays()
    compute = min(_seconds(replayed) for _ in range(5))
    counted = with_delays(lambda size: 0.004, lambda size: 0.008)
    total = min(_seconds(replayed) for _ in range(5))
    each = 0.004 * 2 * LAYERS + 0.008
    assert counted.waited == pytest.approx(5 * each)
    assert total >= each + compute / 2  # what a collective copies is part of its time


def test_delays_are_told_the_bytes_of_the_result(structure: Structure) -> None:
    sizes: list[int] = []
    with_delays(lambda size: float(sizes.append(size) or 0), lambda size: 0.0)
    Replayed(executor(structure), batch=2, new=3)()
    assert sizes == [2 * 3 * 64 * 4] * (2 * LAYERS)


def test_compiled_program_waits_too() -> None:
    structure = Structure(tiny("llama").config)
    program = structure.remembering(Plan(TP, LAYERS))
    replayed = Replayed(
        ReplayExecutor(program, backend=Backend.INDUCTOR, device=CPU), batch=1, new=4
    )
    without_delays()
    replayed()
    with_delays(lambda size: 0.004, lambda size: 0.008)
    assert _seconds(replayed) >= 0.004 * 2 * LAYERS + 0.008


def test_rows_show_measured_and_modelled(structure: Structure) -> None:
    links = [Link("slow", (Way(2e-3, 0, 0),)), Link("slower", (Way(4e-3, 0, 0),))]
    plans = [Plan(TP, LAYERS), Plan(TP, LAYERS, DROPPED)]
    settings = {"device": CPU, "backend": Backend.EAGER, "rounds": 2}
    rows = list(replay(structure, plans, links, [Step(1, 4), Step(1, 1, 3)], **settings))
    found = {(row.step, row.link, row.dropped): row for row in rows}
    assert len(found) == len(rows) == 8
    for (_, link, dropped), row in found.items():
        count = 2 * LAYERS - dropped + 1
        assert row.collectives == count
        assert row.communication == pytest.approx(count * (2e-3 if link == "slow" else 4e-3))
        assert row.total >= row.communication
        assert row.compute > 0
    assert "communication ms, modelled" in table_of(rows)


def _seconds(replayed: Replayed) -> float:
    began = time.perf_counter()
    replayed()
    return time.perf_counter() - began
