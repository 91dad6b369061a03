"""`eval` on the bundled model: what it prints and writes, and refuses. Tasks: tests/harness."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from spdcompile import Evaluation, Plan, Quality
from spdcompile.cli.scoring import Measured, render
from spdcompile.errors import UsageError
from spdcompile.harness import Missing
from tests.cli.conftest import Command, Outcome

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
SMALL = ("--tp", "4", "--length", "64", "--count", "3", "--backend", "eager", "--dtype", "float32")
TEXTS = tuple(str(MODEL / name) for name in ("heldout.txt", "calibration.txt"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def evaluated(command: Command, directory: Path) -> Outcome:
    files = ("--json", str(directory / "found.json"), "--markdown", str(directory / "found.md"))
    drops = ("--spd-mask", "all", "--drop", "0-3.mlp")
    return command("eval", str(MODEL), *SMALL, *drops, "--text", *TEXTS, *files)


def test_each_text_has_a_row_beside_the_reference(evaluated: Outcome, directory: Path) -> None:
    assert (evaluated.code, evaluated.err) == (0, "")
    found = json.loads((directory / "found.json").read_text(encoding="utf-8"))
    table = (directory / "found.md").read_text(encoding="utf-8")
    assert [row["text"] for row in found["texts"]] == list(TEXTS)
    for row in found["texts"]:
        assert row["perplexity"] > row["reference_perplexity"] > 1
        assert row["kl"] > 0 and 0 < row["agreement"] < 1
        assert (row["chunks"], row["length"]) == (3, 64)
        cells = [row["text"], "3 x 64", f"{row['perplexity']:.3f}", f"{row['kl']:.5f}"]
        for output in (evaluated.out, table):
            assert any(all(cell in line for cell in cells) for line in output.splitlines())
    assert len(found["plan"]["dropped"]) == 12
    assert f"Reference: {MODEL}, unsharded, run by transformers" in evaluated.out
    assert "tp 4, 12 sync points dropped" in evaluated.out


def test_plan_and_its_options_say_the_same(
    evaluated: Outcome, command: Command, directory: Path
) -> None:
    drops = {(layer, "attn") for layer in range(8)} | {(layer, "mlp") for layer in range(4)}
    Plan(4, 8, frozenset(drops)).save(directory / "plan.json")
    options = ("--plan", str(directory / "plan.json"), "--reference", "program", "--json", "-")
    outcome = command("eval", str(MODEL), *SMALL[2:], *options, "--text", TEXTS[0])
    found = json.loads(outcome.out)
    before = json.loads((directory / "found.json").read_text(encoding="utf-8"))
    row, other = found["texts"][0], before["texts"][0]
    assert row["perplexity"] == other["perplexity"]
    assert row["kl"] == pytest.approx(other["kl"], rel=1e-4)
    assert found["reference"] == "this program with nothing dropped"


def test_table_without_a_reference_compares_nothing() -> None:
    found = Evaluation(Quality(12.5), None, None, 3, 64)
    table = render(Measured(Plan(2, 8), {"a.txt": found}, num_cut=7), None, "simple")
    assert "12.500" in table and "Reference: none" in table and "KL" not in table
    assert table.endswith("Cut from the left to the model's length: 7 requests")


@pytest.mark.parametrize(
    ("options", "message", "part"),
    [
        ((), "There is nothing to evaluate on.", "--text FILE or --tasks LIST"),
        (("--text", "nowhere.txt"), "There is no such file", "nowhere.txt"),
        (("--text", TEXTS[0], "--length", "1025"), "Chunks of this length", "2 to 1024 tokens"),
        (("--text", TEXTS[0], "--json", "-", "--samples", "-"), "Only one of them", "--samples"),
        (("--text", TEXTS[0], "--markdown", "/nowhere/x"), "The report cannot be", "/nowhere/x"),
        (("--text", TEXTS[0], "--reference", "/nowhere"), "/nowhere is not a directory", "local"),
    ],
)
def test_options_that_cannot_be_met_are_a_message(
    command: Command, options: tuple[str, ...], message: str, part: str
) -> None:
    outcome = command("eval", str(MODEL), *SMALL[:2], *SMALL[6:], *options)
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err.startswith(f"spdcompile: {message}") and part in outcome.err


def test_text_without_tokens_is_a_message(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "short.txt").write_text("a", encoding="utf-8")
    for name, message in [("empty", "The text is empty."), ("short", "Chunks of this length")]:
        text = str(tmp_path / f"{name}.txt")
        outcome = command("eval", str(MODEL), "--tp", "2", "--text", text)
        assert outcome.code == 2 and outcome.err.startswith(f"spdcompile: {message}")


def test_plan_for_another_model_is_a_message(command: Command, tmp_path: Path) -> None:
    Plan(4, 8, model="opt-0123456789ab").save(tmp_path / "plan.json")
    options = ("--plan", str(tmp_path / "plan.json"), "--text", TEXTS[0])
    outcome = command("eval", str(MODEL), *options)
    assert outcome.code == 2 and "found  : a plan for a model opt-0123456789ab" in outcome.err


def test_model_without_tokenizer_is_a_message(command: Command, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(MODEL / name, tmp_path / name)
    outcome = command("eval", str(tmp_path), "--tp", "2", "--text", TEXTS[0])
    assert outcome.code == 2
    assert outcome.err.startswith("spdcompile: The tokenizer cannot be read.")


def test_tasks_without_the_harness_say_what_to_install(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    outcome = command("eval", str(MODEL), "--tp", "2", "--tasks", "arc_easy")
    assert outcome.code == 2
    assert "fix    : pip install 'spdcompile[eval]'" in outcome.err
    with pytest.raises(UsageError, match="lm-evaluation-harness is not installed"):
        Missing("as the base class of HarnessLM")
