"""What `measure-machine` measures: everything that an estimate reads, by two real ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import spdcompile
from spdcompile.estimate import measuring, measuring_host
from spdcompile.estimate.counting import Kind
from spdcompile.estimate.estimates import estimate_latency
from spdcompile.estimate.links import Timed
from spdcompile.estimate.machines import Machines
from spdcompile.estimate.measuring_host import Known, told_apart
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
        assert {"shared-memory", "sockets"} <= table["links"].keys()
    for link in table["links"]:
        found = estimate_latency(
            tiny("llama"), tp=2, device="here", link=link, prompt=8, context=8, machine=path
        )
        for step in found.steps:
            assert step.plain.compute > device.host_seconds(8 if step.name == "prefill" else 1, 2)
            assert step.plain.exchange > 0


def test_what_is_beside_the_kernels_is_told_apart() -> None:
    """Of tokens that take so much a block, a step and a product, these numbers."""

    def token(layers: int, products: float, block: float, step: float, slowness: float) -> Known:
        rest = 3e-4 * layers
        return Known(1, layers, products, rest, rest + layers * block + step + slowness * products)

    sizes = [(2, 5e-4), (6, 1.4e-3), (2, 2.1e-3), (6, 6e-3)]
    for expected in ((1e-4, 3e-4, 1.2), (0.0, 2e-4, 1.5), (2e-4, 0.0, 1.0), (0.0, 0.0, 1.3)):
        host, slowness = told_apart([token(*size, *expected) for size in sizes])
        assert (*host[1:], slowness) == pytest.approx(expected, abs=1e-9)
    faster = told_apart([token(*size, -1e-4, 0.0, 0.9) for size in sizes])
    assert faster == ((1, 0, 0), 1), "nothing takes less than nothing"


def test_programs_of_several_sizes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Timed(Kind.ALL_REDUCE, 2, size, 1e-6) for size in (2**10, 2**20)]
    device = {"flops": {"float32": 1e9}, "bytes_per_s": 1e12, "kernel_s": 0.0}
    device["products"] = {"float32": [[1, 2**12, 2**16, 1e6]]}
    eager = partial(spdcompile.compile, tp=2, backend="eager", executor="local")
    monkeypatch.setattr(
        measuring_host,
        "random_model",
        lambda layers, width, _: eager(tiny("llama", layers=layers, hidden=width, heads=4)),
    )
    monkeypatch.setattr(measuring_host, "_WIDTHS", (16, 32))
    monkeypatch.setattr(measuring_host, "_LAYERS", (1, 3))
    monkeypatch.setattr(measuring_host, "seconds_together", lambda _: 1e3 * measuring_host._STEPS)
    found = measuring_host.beside_products("float32", device, rows)
    assert [each.host.tokens for each in found] == [1, measuring_host.PROMPT]
    for each in found:
        assert each.host.step_s == pytest.approx(1e3, rel=0.02), "all of them take as long"
        assert each.host.block_s + each.slowness - 1 < 1
