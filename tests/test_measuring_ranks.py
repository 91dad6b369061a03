"""Processes that are started to measure end with what started them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spdcompile.measuring import MeasuringError, run_ranks
from tests.import_rules import ROOT

START = "import signal, sys; from spdcompile.measuring import run_ranks; "
START += "signal.signal(signal.SIGINT, signal.default_int_handler); "  # shells may ignore it
START += "run_ranks('tests.sleeping_rank', sys.argv[1:], ranks=2, timeout=100)"

pytestmark = pytest.mark.distributed


def test_ranks_end_when_their_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where `-m tests` is found
    with pytest.raises(MeasuringError, match="no result after 30 s"):
        run_ranks("tests.sleeping_rank", [str(tmp_path)], ranks=2, timeout=30)
    check_ended(tmp_path)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_ranks_end_with_the_process_that_started_them(tmp_path: Path, sent: signal.Signals) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", START, str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while len([*tmp_path.iterdir()]) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    starter.send_signal(sent)
    try:
        assert starter.wait(timeout=60) != 0
    finally:
        starter.kill()
        starter.wait()
    check_ended(tmp_path)


def check_ended(folder: Path) -> None:
    """That both ranks were there, and neither is."""
    ranks = [Path("/proc") / path.name for path in folder.iterdir()]
    assert len(ranks) == 2
    assert not any(rank.exists() for rank in ranks)
