"""`export-hf`, and `--plan`, which reads what it writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import spdcompile
from spdcompile.plan import PLAN_FILE, Plan
from tests.cli.conftest import NUM_LAYERS, Command
from tests.models import tiny

POINTS = frozenset({(0, "attn"), (1, "mlp")})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny("llama", layers=NUM_LAYERS).save_pretrained(folder)
    Plan(2, NUM_LAYERS, POINTS).save(folder / "plan.json")
    return folder


@pytest.fixture(scope="module")
def artefact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact")
    plan = Plan.load(source / "plan.json")
    spdcompile.compile(source, tp=2, spd_mask=plan, backend="eager").save(folder)
    return folder


def test_model_and_plan_become_a_checkpoint(command: Command, source: Path, tmp_path: Path) -> None:
    plan = str(source / "plan.json")
    outcome = command("export-hf", str(source), str(tmp_path / "out"), "--plan", plan)
    assert (outcome.code, outcome.err) == (0, "")
    assert "2 sync points dropped at tp 2" in outcome.out
    assert Plan.load(tmp_path / "out" / PLAN_FILE).dropped == POINTS
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_artefact_becomes_a_checkpoint(command: Command, artefact: Path, tmp_path: Path) -> None:
    outcome = command("export-hf", str(artefact), str(tmp_path / "out"))
    assert (outcome.code, outcome.err) == (0, "")
    assert Plan.load(tmp_path / "out").dropped == POINTS
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_missing_or_second_plan_is_a_message(
    command: Command, source: Path, artefact: Path, tmp_path: Path
) -> None:
    target = str(tmp_path / "out")
    missing = command("export-hf", str(source), target)
    assert missing.code == 2 and "A plan is missing." in missing.err
    second = command("export-hf", str(artefact), target, "--plan", str(source / "plan.json"))
    assert second.code == 2 and "brings its own plan" in second.err


def test_plan_file_says_what_the_options_say(command: Command, source: Path) -> None:
    by_file = command("trace-and-report", str(source), "--plan", str(source / "plan.json"))
    by_options = command(
        "trace-and-report", str(source), "--tp", "2", "--spd-mask", "0", "--drop", "1.mlp"
    )
    assert by_file.code == 0
    assert _without_seconds(by_file.out) == _without_seconds(by_options.out)


def _without_seconds(report: str) -> str:
    return re.sub(r"\d+\.\d{3}", "", report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "The number of ranks is missing."),
        (("--plan", "plan.json", "--drop", "0.mlp"), "A plan says itself what is dropped."),
        (("--plan", "plan.json", "--tp", "3"), "The plan was made for something else."),
        (("--plan", "none.json"), "Cannot read the plan."),
        (("--plan", "config.json"), "This is not a plan."),
    ],
)
def test_options_that_make_no_plan_are_a_message(
    command: Command, source: Path, options: tuple[str, ...], message: str
) -> None:
    given = [str(source / text) if text.endswith(".json") else text for text in options]
    outcome = command("trace-and-report", str(source), *given)
    assert outcome.code == 2
    assert outcome.err.startswith(f"spdcompile: {message}")
