"""`eval` under torchrun, a rank or a replica a process, against the local executor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed here: make test-harness")

from spdcompile.cli import main
from tests.runtime.launching import TORCHRUN, launched

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = str(EXAMPLES / "models" / "tiny-llama")
PROCESSES = 2
TEXT = ("--text", f"{MODEL}/heldout.txt", "--length", "32", "--count", "5", "--batch-size", "2")
TASKS = ("--tasks", str(EXAMPLES / "tasks"), "--limit", "3")
RUNNING = ("--backend", "eager", "--dtype", "float32")
BOUND = 1e-4  # of a log-likelihood of about 100, in float32

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

Files = tuple[dict[str, Any], dict[str, Any]]


def _command(folder: Path, tp: int) -> list[str]:
    drops = ("--spd-mask", "0-5") if tp > 1 else ("--reference", "none")
    files = ("--json", str(folder / "found.json"), "--samples", str(folder / "samples.json"))
    return ["eval", MODEL, "--tp", str(tp), *drops, *TEXT, *TASKS, *RUNNING, *files]


def _written(folder: Path) -> Files:
    names = ("found.json", "samples.json")
    found, samples = (json.loads((folder / name).read_text("utf-8")) for name in names)
    return found, samples


# With tp 1 each process is a replica of its own, and answers half of the requests.
@pytest.mark.parametrize("tp", [PROCESSES, 1])
def test_processes_find_what_one_finds(
    tp: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("local", "ranks"):
        (tmp_path / name).mkdir()
    assert main(_command(tmp_path / "local", tp)) == 0
    table = capsys.readouterr().out
    worker = ("-m", "spdcompile.cli", *_command(tmp_path / "ranks", tp))
    start = [*TORCHRUN, "--standalone", "--nproc-per-node", str(PROCESSES), *worker]
    with launched(start) as launch:
        ended = launch.wait(280)
    assert ended.code == 0, ended.output
    assert ended.output.count("Reference: ") == table.count("Reference: ") == 1
    (found, samples), (expected, answers) = (_written(tmp_path / n) for n in ("ranks", "local"))
    _assert_same(found, expected)
    assert found["tasks"] and samples
    for task, rows in answers.items():
        for own, other in zip(samples[task], rows, strict=True):
            _assert_same(own, other)


def _assert_same(found: Any, expected: Any) -> None:
    """Equal, but for the rounding of numbers."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            _assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for own, other in zip(found, expected, strict=True):
            _assert_same(own, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=BOUND)
    else:
        assert found == expected
