"""vLLM's row, with a stand-in for vLLM: what is asked of it, and what becomes of its failures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spdcompile.bench.settings import BenchSettings
from spdcompile.bench.subject import NotMeasuredError
from spdcompile.bench.vllm_subject import Vllm
from tests.bench import stand_in_vllm
from tests.bench.stand_in_vllm import SECONDS, VOCABULARY, logits_of

SETTINGS = BenchSettings(1, prompts=(3,), contexts=(4,), new_tokens=2)
THREADS = 5
BATCH, PROMPT, LENGTH = 3, 4, 7

pytestmark = pytest.mark.distributed


@pytest.fixture
def subject() -> Iterator[Vllm]:
    made = Vllm(Path("model"), SETTINGS, THREADS)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as the only rank of a torchrun, which finds the stand-in as vLLM."""
    package = tmp_path / "vllm"
    (package / "v1" / "sample").mkdir(parents=True)
    text = Path(str(stand_in_vllm.__file__)).read_text(encoding="utf-8")
    (package / "__init__.py").write_text(text, encoding="utf-8")
    imported = "from vllm import AdapterLogitsProcessor\n"
    (package / "v1" / "sample" / "logits_processor.py").write_text(imported, encoding="utf-8")
    for name, value in {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()]),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "RANK": "0",
        "WORLD_SIZE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def expected(text: Tensor, tokens: int) -> Tensor:
    return torch.stack([logits_of(row[:tokens]) for row in text.tolist()])


def test_the_given_tokens_are_decoded_whatever_is_likeliest(subject: Vllm) -> None:
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=generator)
        cache = subject.new_cache(text, PROMPT)
        assert torch.equal(subject.run(text[:, :PROMPT], cache), expected(text, PROMPT))
        for place in range(PROMPT, LENGTH):
            logits, seconds = subject.timed(text[:, place : place + 1], cache)
            assert torch.equal(logits, expected(text, place + 1))
            assert seconds >= SECONDS


def test_text_that_was_left_out_of_a_step_is_no_measurement(subject: Vllm) -> None:
    cache = subject.new_cache(torch.ones(BATCH, 1, dtype=torch.long), 1)
    subject.run(torch.ones(BATCH, 1), cache)
    with pytest.raises(NotMeasuredError, match=r"^RuntimeError: vLLM took 0 of 3 texts"):
        subject.run(torch.ones(BATCH, 1), cache)


def test_it_is_stopped_between_steps(subject: Vllm) -> None:
    (process,) = subject.processes
    for _ in range(2):
        _, status = os.waitpid(process, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        text = torch.ones(1, 1, dtype=torch.long)
        subject.run(text, subject.new_cache(text, 1))


@pytest.mark.parametrize(
    ("model", "reason"),
    [("refused", "ValueError: no such"), ("deadly", "vLLM's process ended, with code 3")],
)
def test_failure_is_the_reason(model: str, reason: str) -> None:
    with pytest.raises(NotMeasuredError) as raised:
        Vllm(Path(model), SETTINGS, THREADS)
    assert str(raised.value) == reason
