"""What becomes of variants that fail, and how figures are made of what was timed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spdcompile.bench.hugging_face import load_parallelized
from spdcompile.bench.meeting import Meeting
from spdcompile.bench.result import Result
from spdcompile.bench.settings import BenchSettings, Kind, Step
from spdcompile.bench.subject import NotMeasuredError, Subject
from spdcompile.bench.tables import markdown
from spdcompile.bench.timing import Course, Entrant, Timed
from spdcompile.bench.variants import BASELINE, variants_of
from tests.models import tiny

SETTINGS = BenchSettings(2, prompts=(3,), contexts=(4,), new_tokens=2, rounds=5)
VOCABULARY = 7


class Counting(Subject):
    """Gives the same logits at each call, and fails from some call on."""

    def __init__(self, value: float, calls: int = 1000) -> None:
        self.value, self.left = value, calls

    def new_cache(self, text: Tensor, prompt: int) -> Any:
        return None

    def run(self, input_ids: Tensor, cache: Any) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise ValueError("no more\nof this")
        return torch.full((input_ids.shape[0], VOCABULARY), self.value)


@pytest.fixture
def meeting(tmp_path: Path) -> Iterator[Meeting]:
    """One rank that meets itself."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield Meeting(60)
    dist.destroy_process_group()


def entrant(subject: Subject) -> Entrant:
    alone = next(variant for variant in variants_of(SETTINGS) if variant.name == "hf-eager")
    return Entrant(alone, subject, {step.name: Timed() for step in SETTINGS.steps})


def course(meeting: Meeting, steps: list[Step]) -> Course:
    reference = {step.name: torch.full((max(step.new, 1), 1, VOCABULARY), 2.0) for step in steps}
    return Course(meeting, steps, VOCABULARY, reference)


def test_failing_variant_leaves_the_others(meeting: Meeting) -> None:
    good, late, never = (entrant(Counting(2.0)), entrant(Counting(3.0, 9)), entrant(Counting(2, 0)))
    run = course(meeting, SETTINGS.steps)
    for each in (good, late, never):
        run.get_ready(each)
    assert never.reason == "ValueError: no more"
    assert late.reason == ""
    rounds: list[int] = []
    run.rounds([good, late], SETTINGS.rounds, rounds.append)
    assert rounds == [1, 2, 3, 4, 5]
    assert late.reason == "ValueError: no more"
    counts = {name: len(timed.samples) for name, timed in good.timed.items()}
    assert counts == {"TTFT-3-1": 5, "TPOT-4-1": 10}
    assert {timed.error for timed in good.timed.values()} == {0.0}
    assert late.timed["TTFT-3-1"].error == 0.5


def test_logits_that_are_not_finite_are_no_measurement(meeting: Meeting) -> None:
    each = entrant(Counting(float("nan")))
    course(meeting, SETTINGS.steps).get_ready(each)
    assert each.reason == "its logits are not finite"


def test_model_of_other_names_has_no_plan(tmp_path: Path) -> None:
    tiny("gpt2", layers=1).save_pretrained(tmp_path)
    with pytest.raises(NotMeasuredError, match="no plan for gpt2"):
        load_parallelized(tmp_path, torch.float32, 2)


def collected(name: str, milliseconds: list[float], reason: str = "") -> dict[str, Any]:
    samples = [one / 1000 for one in milliseconds]
    timed = {"samples": samples, "error": 1e-7, "first": 3.0, "second": 1.0}
    steps = {step.name: timed for step in SETTINGS.steps}
    return {"name": name, "label": name.upper(), "load": 2.0, "reason": reason, "steps": steps}


def test_figures_are_those_of_the_samples() -> None:
    times = [float(number) for number in range(11)]
    given = [
        collected(BASELINE, [10 * time + 10 for time in times]),
        collected("faster", [time + 1 for time in times]),
        collected("failed", [], "why not"),
    ]
    result = Result.of(SETTINGS, given, [[1, 2]])
    assert Result.from_json(result.to_json()) == result
    assert result.steps == SETTINGS.steps
    _, faster, failed = result.outcomes
    row, further = faster.row("TTFT-3-1"), faster.row("TPOT-4-1")
    assert row is not None and further is not None and failed.row("TTFT-3-1") is None
    assert (row.p10, row.median, row.p90) == pytest.approx((2, 6, 10))
    assert row.ratio == pytest.approx(0.1)
    assert row.compile == 2 and faster.compile == 4
    assert row.tokens_per_second == pytest.approx(3 / 0.006)
    assert further.tokens_per_second == pytest.approx(1 / 0.006)


def test_ratio_needs_the_baseline() -> None:
    for others in ([], [collected(BASELINE, [], "not here")]):
        result = Result.of(SETTINGS, [*others, collected("alone", [1.0])], [])
        assert {row.ratio for row in result.outcomes[-1].rows} == {None}


def test_page_says_why_a_variant_is_missing() -> None:
    given = [collected(BASELINE, [1.0, 2.0]), collected("failed", [], "why not")]
    result = Result.of(SETTINGS, given, [])
    page = markdown(
        Result({**result.conditions, "model": "llama"}, [], result.outcomes), title="title"
    )
    assert "why not" in page and page.startswith("# title\n")


def test_steps_are_prompts_and_all_pairs_of_contexts_and_batches() -> None:
    settings = BenchSettings(2, prompts=(1, 2), contexts=(3, 4), batches=(1, 5), new_tokens=6)
    first = [Step(Kind.TTFT, 1, 1), Step(Kind.TTFT, 2, 1)]
    further = [Step(Kind.TPOT, tokens, batch, 6) for tokens in (3, 4) for batch in (1, 5)]
    assert settings.steps == first + further
    assert BenchSettings.from_json(settings.to_json()) == settings
    assert tuple(further[1].input_ids(VOCABULARY).shape) == (5, 9)
