"""`tune` on a tiny model: what it prints and writes, its exit codes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from spdcompile import Plan
from spdcompile.cli.tune import UNMET, share
from spdcompile.tuning.latency import Latencies
from tests.cli.conftest import Command, Outcome
from tests.models import tiny

BUNDLED = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
TEXTS = ("--text", str(BUNDLED / "calibration.txt"), "--validation", str(BUNDLED / "heldout.txt"))
SMALL = ("--tp", "2", "--length", "16", "--count", "6", "--steps", "4", "--search-steps", "2")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def model(directory: Path) -> str:
    """A tiny model with the bundled one's tokenizer."""
    saved = tiny("llama", layers=2, hidden=32, heads=4, intermediate=48, vocab=4096)
    saved.save_pretrained(directory / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / name, directory / "model" / name)
    return str(directory / "model")


@pytest.fixture(scope="module")
def tuned(command: Command, model: str, directory: Path) -> Outcome:
    targets = ("--output", str(directory / "out"), "--json", str(directory / "found.json"))
    budget = ("--max-loss", "900%", "--min-saved", "50%")
    options = ("--points", "attn", "--no-groups", "--plan-only", str(directory / "plan.json"))
    return command("tune", model, *SMALL, *TEXTS, *budget, *options, *targets)


def test_decisions_and_verdict_are_printed(tuned: Outcome) -> None:
    assert (tuned.code, tuned.err) == (0, "")
    lines = tuned.out.splitlines()
    rows = [line.split() for line in lines if line[:1].isdigit()]
    assert sorted(row[0] for row in rows) == ["0.attn", "1.attn"]
    assert all("ISB" in row and "zero-shot" in row for row in rows)
    assert "All-reduces: 2 of 4 gone (50.0%)" in lines
    budget = "at most 900 % perplexity, at least 50 % of the all-reduces gone"
    assert f"Budget ({budget}): met" in lines


def test_checkpoint_and_plan_are_written(tuned: Outcome, directory: Path) -> None:
    out = directory / "out"
    plan = Plan.load(out)
    assert plan.dropped == {(0, "attn"), (1, "attn")}
    assert plan == Plan.load(directory / "plan.json")
    assert plan.to_dict() == json.loads((directory / "found.json").read_text(encoding="utf-8"))
    assert plan.measured["tuning"]["met"]
    AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    AutoTokenizer.from_pretrained(out, local_files_only=True)


def test_plan_is_taken_by_other_commands(tuned: Outcome, command: Command, directory: Path) -> None:
    outcome = command("trace-and-report", str(directory / "out"), "--plan", str(directory / "out"))
    assert outcome.code == 0 and "dropped" in outcome.out


def test_budget_that_is_not_met_has_an_exit_code(
    command: Command, model: str, directory: Path
) -> None:
    (directory / "table.json").write_text(
        json.dumps(Latencies(2, 16, 1.0, 0.1).to_dict()), encoding="utf-8"
    )
    table = ("--min-faster", "90%", "--latencies", str(directory / "table.json"))
    options = ("--points", "attn", "--no-groups", "--plan-only", str(directory / "unmet.json"))
    outcome = command("tune", model, *SMALL, *TEXTS[:2], *table, *options, "--sampled", "2")
    assert (outcome.code, outcome.err) == (UNMET, "")
    assert "lower latency): NOT MET; this is the best plan found" in outcome.out
    assert "Latency: 20.0% gone by the table" in outcome.out
    plan = Plan.load(directory / "unmet.json")
    assert len(plan.dropped) == 2 and not plan.measured["tuning"]["met"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plan-only", "p.json"), "The budget is empty."),
        (("--max-loss", "1%"), "There is nowhere to write the plan."),
        (("--max-loss", "1%", "--output", str(BUNDLED)), "The directory is not empty."),
        (("--max-loss", "1%", "--plan-only", "/nowhere/p"), "The report cannot be written."),
        (("--min-saved", "101%", "--plan-only", "p.json"), "The budget cannot be kept."),
        (
            ("--min-faster", "1%", "--plan-only", "p.json", "--latencies", "nowhere"),
            "The latencies cannot be read.",
        ),
    ],
)
def test_mistake_is_a_message_before_the_work(
    command: Command, options: tuple[str, ...], message: str
) -> None:
    outcome = command("tune", "nowhere", "--tp", "2", "--text", "nowhere", *options)
    assert outcome.code == 2 and outcome.err.startswith(f"spdcompile: {message}")


def test_shares_are_read_either_way() -> None:
    assert share("1%") == share("0.01") == 0.01
    assert share("12.5%") == 0.125
