"""What `measure-machine` measures: everything that an estimate reads, by two real ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import spdcompile
from spdcompile.estimate import measuring, measuring_rank
from spdcompile.estimate.counting import Kind
from spdcompile.estimate.estimates import estimate_latency
from spdcompile.estimate.links import Timed
from spdcompile.estimate.machines import Machines
from spdcompile.measuring import run_ranks
from tests.import_rules import ROOT
from tests.models import tiny


@pytest.mark.slow
@pytest.mark.distributed
def test_measured_machine_serves_estimates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_fewer(module: str, arguments: Sequence[str], **settings: Any) -> None:
        assert module == "spdcompile.estimate.measuring_rank"
        run_ranks("tests.estimate.measuring_worker", arguments, **settings)

    monkeypatch.chdir(ROOT)  # where `-m tests` is found
    monkeypatch.setattr(measuring, "run_ranks", run_fewer)
    table: dict[str, Any] = measuring.measure_machine(ranks=2, name="here", timeout=250)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(table))
    device = Machines.load(path).device("here")
    assert device.kernel_s > 0
    assert len(table["devices"]["here"]["products"]["float32"]) == 2
    assert "gloo" in table["links"]
    if sys.platform == "linux":
        assert "shared-memory" in table["links"]
    for link in table["links"]:
        found = estimate_latency(
            tiny("llama"), tp=2, device="here", link=link, prompt=8, context=8, machine=path
        )
        for step in found.steps:
            assert step.plain.compute > device.block_s * 2
            assert step.plain.exchange > 0


def test_products_are_as_much_slower_as_a_step_is_longer_than_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = spdcompile.compile(tiny("llama"), tp=2, backend="eager")
    rows = [Timed(Kind.ALL_REDUCE, 2, size, 1e-6) for size in (2**10, 2**20)]

    def slowness(step: float, rate: float) -> float:
        monkeypatch.setattr(measuring_rank, "_seconds", lambda _: step * measuring_rank._STEPS)
        device = {"flops": {"float32": 1e9}, "bytes_per_s": 1e12, "kernel_s": 0.0}
        device["products"] = {"float32": [[1, 2**12, 2**16, rate]]}
        return measuring_rank._slowness_of_products(model, device, rows)

    slow = slowness(1e3, 1e6)
    assert slow > 100
    assert slowness(2e3, 1e6) == pytest.approx(2 * slow, rel=1e-3)
    assert slowness(1e3, 1e5) == pytest.approx(slow / 10, rel=1e-3)
    assert slowness(1e-9, 1e6) == 1
