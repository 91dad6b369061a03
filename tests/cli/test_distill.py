"""`distill` on the bundled model: a checkpoint, the plan beside it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import spdcompile
from spdcompile import Plan
from tests.cli.conftest import Command, Outcome

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
TEXT = ("--text", str(MODEL / "calibration.txt"), "--length", "32", "--count", "8")
SMALL = (*TEXT, "--tp", "4", "--steps", "4", "--learning-rate", "1e-3")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distill") / "out"


@pytest.fixture(scope="module")
def distilled(command: Command, directory: Path) -> Outcome:
    options = ("--spd-mask", "6", "--drop", "3.mlp", "--logit-steps", "2")
    return command("distill", str(MODEL), *SMALL, *options, "--output", str(directory))


def test_each_segment_has_a_row(distilled: Outcome, directory: Path) -> None:
    assert (distilled.code, distilled.err) == (0, "")
    rows = [line.split() for line in distilled.out.splitlines()]
    assert [row[0] for row in rows if row[-1:] in (["4"], ["2"])] == ["3-4", "6", "3-7"]
    assert distilled.out.endswith(f"Written to {directory}\n")


def test_checkpoint_holds_the_new_weights_and_the_plan(distilled: Outcome, directory: Path) -> None:
    plan = Plan.load(directory)
    assert plan.dropped == {(6, "attn"), (3, "mlp")}
    kinds = [(entry["layers"], entry["loss"]) for entry in plan.measured["distillation"]]
    assert kinds == [([3, 4], "mse"), ([6], "mse"), ([3, 4, 5, 6, 7], "kl")]
    own = AutoModelForCausalLM.from_pretrained(MODEL).state_dict()
    new = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    changed = {name.split(".")[2] for name in own if not torch.equal(own[name], new[name])}
    assert changed <= set("34567") and changed & set("34")
    compiled = spdcompile.compile(directory, tp=4, spd_mask=plan, backend="eager")
    assert torch.isfinite(compiled(torch.arange(8)[None]).logits).all()


def test_sampled_text_is_trained_on(command: Command, tmp_path: Path) -> None:
    # One epoch of batches of four chunks: eight of the text, and four more.
    options = (*TEXT, "--tp", "2", "--spd-mask", "7", "--epochs", "1", "--sampled", "4")
    outcome = command("distill", str(MODEL), *options, "--output", str(tmp_path / "out"))
    assert outcome.code == 0
    assert outcome.out.splitlines()[2].split()[-1] == "3"


def test_papers_settings_take_epochs(command: Command, tmp_path: Path) -> None:
    options = (*TEXT, "--tp", "2", "--spd-mask", "7", "--paper", "5e-5", "--epochs", "1")
    outcome = command("distill", str(MODEL), *options, "--output", str(tmp_path / "out"))
    assert outcome.code == 0
    assert outcome.out.splitlines()[2].split()[-1] == "2"  # batches of 4 chunks


@pytest.mark.parametrize(
    "options, message",
    (
        ((), "Nothing is dropped"),
        (("--drop", "7.mlp"), "it is the last one"),
        (("--spd-mask", "9"), "9"),
    ),
)
def test_what_cannot_be_dropped_is_a_message(
    command: Command, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    outcome = command("distill", str(MODEL), *SMALL, *options, "--output", str(tmp_path / "out"))
    assert outcome.code != 0 and message in outcome.err and "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_directory_in_use_is_refused_before_the_work(command: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    outcome = command("distill", str(MODEL), *SMALL, "--output", str(tmp_path))
    assert outcome.code == 2 and "not empty" in outcome.err
