"""A run of `bench`: its numbers are right and all there. How fast anything is, no test says."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from spdcompile.bench.making import INSTALL
from spdcompile.bench.result import FORMAT, Outcome, Result
from spdcompile.cli import main
from tests.models import tiny

SIZES = {"--tp": "2", "--prompt": "5", "--context": "6", "--batch": "2", "--rounds": "2"}
OPTIONS = ["--quick", *(word for pair in SIZES.items() for word in pair), "--spd-mask", "0"]
STEPS = ("TTFT-5-1", "TPOT-6-2")
PEERS = ("hf-eager", "hf-compiled", "hf-all-cores-eager", "hf-all-cores-compiled")
PEERS += ("hf-tp-eager", "hf-tp-compiled", "dtensor-eager", "dtensor-compiled")
OPTIONAL = ("deepspeed", "vllm")
OWN = ("spd-local", "spd-gloo", "spd-sockets", "spd-shm")
DROPPED = ("spd-local/0", "spd-gloo/0", "spd-sockets/0", "spd-shm/0")
EXACT = 1e-4  # float32, against float32: a hundred times what sums in another order differ by

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run wrote."""

    folder: Path
    printed: str
    result: Result

    def outcome(self, name: str) -> Outcome:
        return next(outcome for outcome in self.result.outcomes if outcome.name == name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("bench")
    tiny("llama", layers=2, hidden=32, heads=4, intermediate=48).save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.extend(map(str, words)))
        assert main(["bench", str(folder / "model"), *OPTIONS, "--out", str(folder / "out")]) == 0
    result = Result.from_json((folder / "out" / "bench.json").read_text(encoding="utf-8"))
    return Run(folder / "out", "\n".join(printed), result)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def test_every_variant_has_a_row(run: Run) -> None:
    names = [outcome.name for outcome in run.result.outcomes]
    assert names == [*PEERS, *OPTIONAL, *OWN, *DROPPED]
    for outcome in run.result.outcomes:
        assert [row.step for row in outcome.rows] == ([] if outcome.reason else list(STEPS))


@pytest.mark.parametrize("name", [*PEERS, *OWN])
def test_exact_variants_agree_with_the_reference(run: Run, name: str) -> None:
    outcome = run.outcome(name)
    if name.startswith("hf-tp") and not installed("accelerate"):
        assert "pip install accelerate" in outcome.reason
        return
    assert outcome.reason == ""
    errors = [row.error for row in outcome.rows]
    assert all(error is not None and error < EXACT for error in errors), errors


@pytest.mark.parametrize("name", DROPPED)
def test_dropped_sync_points_show(run: Run, name: str) -> None:
    errors = [row.error for row in run.outcome(name).rows]
    assert all(error is not None and error > 10 * EXACT for error in errors), errors


@pytest.mark.parametrize("name", OPTIONAL)
def test_missing_peer_is_named_with_its_command(run: Run, name: str) -> None:
    if installed(name):
        pytest.skip(f"{name} is installed")
    assert run.outcome(name).reason == f"not installed: {INSTALL[name]}"
    assert INSTALL[name] in run.printed


def test_numbers_and_conditions_are_written(run: Run) -> None:
    data = json.loads((run.folder / "bench.json").read_text(encoding="utf-8"))
    assert data["format"] == FORMAT
    assert {"machine", "cores", "torch", "transformers", "date", "model"} <= set(data["conditions"])
    assert data["conditions"]["settings"]["threads"] >= 1
    assert all(before and peak and before <= peak for before, peak in run.result.memory)
    for outcome in run.result.outcomes:
        counts = {row.step: len(row.samples) for row in outcome.rows}
        assert outcome.reason or counts == {"TTFT-5-1": 2, "TPOT-6-2": 4}
        for row in outcome.rows:
            assert 0 < min(row.samples) <= row.p10 <= row.median <= row.p90 <= max(row.samples)


def test_tables_have_every_variant_and_step(run: Run) -> None:
    page = (run.folder / "bench.md").read_text(encoding="utf-8")
    assert "## TTFT, prompt of 5 tokens, batch 1" in page
    assert "## TPOT, context of 6 tokens, batch 2" in page
    for outcome in run.result.outcomes:
        assert page.count(f"| {outcome.label} ") == len(STEPS) + 1
    assert "| spdcompile, shared memory, attention dropped: 0 " in page


def test_chart_is_drawn_where_matplotlib_is_installed(run: Run) -> None:
    chart = run.folder / "bench.png"
    assert chart.exists() == installed("matplotlib")
    if chart.exists():
        assert chart.read_bytes().startswith(b"\x89PNG")
