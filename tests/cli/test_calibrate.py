"""`calibrate` and `group-heads` on the bundled model: what they print and write, and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spdcompile import Plan
from spdcompile.cli.calibrate import METHODS
from spdcompile.runtime.calibrate import Method
from tests.cli.conftest import Command, Outcome

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
TEXT = MODEL / "calibration.txt"
SMALL = ("--tp", "4", "--length", "32", "--count", "4")
NUM_POINTS = 15  # 8 layers of two, without the last


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibrate")


@pytest.fixture(scope="module")
def calibrated(command: Command, directory: Path) -> Outcome:
    files = ("--json", str(directory / "found.json"), "--markdown", str(directory / "found.md"))
    methods = [part for method in METHODS for part in ("--method", method)]
    resume = ("--resume", str(directory / "results"))
    return command("calibrate", str(MODEL), *SMALL, "--text", str(TEXT), *files, *methods, *resume)


@pytest.fixture(scope="module")
def grouped(command: Command, directory: Path) -> Outcome:
    options = ("--text", str(TEXT), "--spd-mask", "3-5", "--layers", "0,3", "--output")
    return command("group-heads", str(MODEL), *SMALL, *options, str(directory / "plan.json"))


def test_methods_are_those_that_there_are() -> None:
    assert tuple(method.value for method in Method) == METHODS


def test_table_has_a_row_for_each_point(calibrated: Outcome) -> None:
    assert (calibrated.code, calibrated.err) == (0, "")
    lines = calibrated.out.splitlines()
    rows = [line.split() for line in lines if line[:1].isdigit() and ": " not in line]
    assert len(rows) == NUM_POINTS and rows[0][0] == "0.attn" and rows[-1][0] == "7.attn"
    assert "7.mlp: it is the last one: no later sync point would sum what is pending" in lines
    assert lines[-2].startswith("Perplexity with nothing dropped")
    # 8 once, 8 + 8 + ... + 2 + 2 + 1 twice less one, 8 + 2 * 7 five times; 30 evaluations and 15.
    assert "Block evaluations 259, where whole" in lines[-1] and lines[-1].endswith("run 360")


def test_json_and_markdown_say_the_same(calibrated: Outcome, directory: Path) -> None:
    found = json.loads((directory / "found.json").read_text(encoding="utf-8"))
    assert (found["tp"], found["chunks"], found["length"]) == (4, 4, 32)
    assert found["model"]["layers"] == 8
    assert [set(row) for row in found["points"]] == [{"point", *METHODS}] * NUM_POINTS
    last = found["points"][-1]
    assert last["cumulative"] == last["leave-one-out"]
    kept = found["undropped"]["perplexity"]
    assert last["cumulative"]["score"] == last["cumulative"]["perplexity"] - kept
    assert last["first-order"]["agreement"] is None and last["first-order"]["kl"] > 0
    table = (directory / "found.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if line.startswith("| 7.attn"))
    assert f"{last['cumulative']['score']:+.3f}" in row
    assert f"{last['cumulative']['score'] / kept:+.1%}" in row
    assert f"{last['cumulative']['kl']:.4f}" in row


def test_results_are_kept_for_the_next_run(
    calibrated: Outcome, command: Command, directory: Path
) -> None:
    options = ("--points", "attn", "--resume", str(directory / "results"), "--method")
    files = ("--text", str(TEXT), "--json", "-")
    again = command("calibrate", str(MODEL), *SMALL, *files, *options, "leave-one-out")
    found = json.loads(again.out)
    assert found["block_evaluations"] == 0 and len(found["points"]) == 8
    before = json.loads((directory / "found.json").read_text(encoding="utf-8"))
    assert found["points"][1]["leave-one-out"] == before["points"][2]["leave-one-out"]


def test_head_groups_are_written_as_a_plan(grouped: Outcome, directory: Path) -> None:
    assert (grouped.code, grouped.err) == (0, "")
    plan = Plan.load(directory / "plan.json")
    assert plan.head_groups.keys() == {0, 3}
    assert plan.dropped == {(3, "attn"), (4, "attn"), (5, "attn")}
    rows = {line.split()[0]: line for line in grouped.out.splitlines() if line[:1].isdigit()}
    for layer, groups in plan.head_groups.items():
        assert " ".join(",".join(map(str, units)) for units in groups) in rows[str(layer)]
    assert [entry["layer"] for entry in plan.measured["head_grouping"]] == [0, 3]
    assert "Found by local search" not in grouped.out


def test_plan_s_head_groups_change_what_is_measured(
    grouped: Outcome, calibrated: Outcome, command: Command, directory: Path
) -> None:
    options = ("--plan", str(directory / "plan.json"), "--points", "attn", "--json", "-")
    outcome = command("calibrate", str(MODEL), *SMALL, "--text", str(TEXT), *options)
    found = json.loads(outcome.out)
    before = json.loads((directory / "found.json").read_text(encoding="utf-8"))
    kept = before["undropped"]["perplexity"]
    assert found["undropped"]["perplexity"] == pytest.approx(kept, rel=1e-6)
    last, other = found["points"][-1], before["points"][-1]
    assert last["cumulative"]["score"] == pytest.approx(other["cumulative"]["score"], rel=1e-3)
    assert abs(found["points"][0]["cumulative"]["kl"] - before["points"][0]["cumulative"]["kl"]) > 0


def test_one_unit_a_rank_is_said(command: Command, tmp_path: Path) -> None:
    options = ("--tp", "8", "--length", "16", "--count", "1", "--layers", "2", "--text", str(TEXT))
    output = ("--output", str(tmp_path / "plan.json"))
    outcome = command("group-heads", str(MODEL), *options, *output)
    assert "nothing to choose; only the matching to MLP shards acts" in outcome.out


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", (), "The text is empty."),
        (b"\xff\xfe", (), "The text is not UTF-8."),
        (b"few words", (), "The text is too short."),
        (b"few words", ("--plan", "nowhere.json"), "The text is too short."),
        (None, (), "There is no such file"),
    ],
)
def test_text_that_cannot_be_used_is_a_message(
    command: Command, tmp_path: Path, content: bytes | None, options: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    outcome = command("calibrate", str(MODEL), *SMALL, "--text", str(path), *options)
    assert outcome.code == 2 and outcome.err.startswith(f"spdcompile: {message}")


def test_plan_for_another_tp_is_a_message(command: Command, tmp_path: Path) -> None:
    Plan(2, 8).save(tmp_path / "plan.json")
    plan = ("--plan", str(tmp_path / "plan.json"))
    outcome = command("calibrate", str(MODEL), *SMALL, "--text", str(TEXT), *plan)
    assert outcome.code == 2
    assert "found  : a plan for tp=2 and 8 layers\n  needed : tp=4 and 8 layers" in outcome.err


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_output_that_cannot_be_written_is_said_before_the_work(
    command: Command, option: str
) -> None:
    outcome = command(
        "calibrate", str(MODEL), *SMALL, "--text", "nowhere", option, "/nowhere/found"
    )
    assert outcome.code == 2 and f"where  : {option} /nowhere/found" in outcome.err
