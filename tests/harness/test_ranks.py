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
SPLIT = ("--tp", str(PROCESSES), "--spd-mask", "0-5")
TEXT = ("--text", f"{MODEL}/heldout.txt", "--length", "32", "--count", "5", "--batch-size", "2")
TASKS = ("--tasks", str(EXAMPLES / "tasks"), "--limit", "3")
RUNNING = ("--backend", "eager", "--dtype", "float32")
BOUND = 1e-4  # of a log-likelihood of about 100, in float32

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

Files = tuple[dict[str, Any], dict[str, Any]]


def _command(folder: Path, *options: str) -> list[str]:
    files = ("--json", str(folder / "found.json"), "--samples", str(folder / "samples.json"))
    return ["eval", MODEL, *options, *TEXT, *TASKS, *RUNNING, *files]


def _read(folder: Path) -> Files:
    names = ("found.json", "samples.json")
    found, samples = (json.loads((folder / name).read_text("utf-8")) for name in names)
    return found, samples


def _run_processes(folder: Path, *options: str) -> Files:
    """What the processes of one launch write, of which one prints."""
    start = [*TORCHRUN, "--standalone", "--nproc-per-node", str(PROCESSES), "-m", "spdcompile.cli"]
    with launched([*start, *_command(folder, *options)]) as launch:
        ended = launch.wait(280)
    assert ended.code == 0, ended.output
    assert ended.output.count("Reference: ") == 1
    return _read(folder)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """What one process writes that runs both ranks."""
    folder = tmp_path_factory.mktemp("local")
    assert main(_command(folder, *SPLIT)) == 0
    return _read(folder)


def test_ranks_find_what_one_process_finds(local: Files, tmp_path: Path) -> None:
    found, samples = _run_processes(tmp_path, *SPLIT)
    _assert_same(found, local[0])
    _assert_same(samples, local[1])
    assert found["tasks"] and samples


def test_replicas_share_requests_and_find_the_same(local: Files, tmp_path: Path) -> None:
    """With tp 1 each process is a replica, and nothing is dropped: the reference of the others."""
    found, _ = _run_processes(tmp_path, "--tp", "1", "--reference", "none")
    for own, other in zip(found["texts"], local[0]["texts"], strict=True):
        _assert_same(own["perplexity"], other["reference_perplexity"])
    for own, other in zip(found["tasks"], local[0]["tasks"], strict=True):
        assert (own["task"], own["metric"]) == (other["task"], other["metric"])
        _assert_same(own["value"], other["reference"])


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
