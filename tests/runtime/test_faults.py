"""Each fault of a rank ends all ranks, in time, with one message that names the rank and why."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.runtime.launching import TORCHRUN, Ended, Launch, launched

TIMEOUT_S = 5
ALLOWED_S = TIMEOUT_S + 10
START_S = 200  # of torch and transformers, several times, on a busy machine

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]


class Expected(NamedTuple):
    """How the one message begins, and what else stands in the output."""

    message: str
    further: str = ""


FAULTS = {
    "raises": Expected("Rank 1 failed: ValueError: no such token."),
    "killed": Expected("Rank 1 was killed, or exited, between two calls."),
    "killed at a socket": Expected("Rank 1 was killed, or exited, between two calls."),
    "killed outside": Expected("Rank 1 was killed, or exited, between two calls."),
    "killed idle": Expected("Rank 1 was killed, or exited, between two calls."),
    "exits": Expected("Rank 1 exited while others wait for it."),
    "exits at once": Expected("Rank 1 was killed, or exited, between two calls."),
    "stalls": Expected("Rank 1 stalled: the others have waited 5 s; it is between two calls."),
    "stopped": Expected("Rank 1 has not been heard of for 5 s; it was between two calls."),
    "stopped at a socket": Expected("Rank 1 has not been heard of for 5 s; it was between two"),
    "does not come": Expected("Rank 1 did not come."),
    "other call": Expected("Ranks 0, 1 run different things: rank 0: program "),
    "other plan": Expected("The ranks do not run the same plan.", "rank 1: "),
    "other torch": Expected("The ranks do not run the same torch.", "rank 1: 2.0.0"),
    "other weights": Expected("The ranks do not run the same weights.", "rank 1: "),
}


def command(fault: str, folder: Path) -> list[str]:
    """torchrun with two ranks of fault_worker.py."""
    worker = ("-m", "tests.runtime.fault_worker", fault, str(folder))
    return [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *worker]


@contextmanager
def started(fault: str, folder: Path, *before: str) -> Iterator[Launch]:
    """The launch of a fault.

    Args:
        before: what starts torchrun, if it is not started directly.
    """
    with launched([*before, *command(fault, folder)], {"SPD_TIMEOUT": str(TIMEOUT_S)}) as launch:
        yield launch


def check_clean(launch: Launch, ended: Ended, folder: Path) -> None:
    """In time, not successful, no half-written file, no segment."""
    assert ended.code != 0
    seconds = ended.at - float((folder / "began").read_text())
    print(f"all gone after {seconds:.1f} s")
    crowd = os.getloadavg()[0] / (os.cpu_count() or 1)  # where others run, all takes longer
    assert seconds < ALLOWED_S * max(1.0, crowd)
    assert not list(folder.rglob("*.tmp"))
    assert not launch.segments()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_rank_ends_all_with_one_message(fault: str, tmp_path: Path) -> None:
    with started(fault, tmp_path) as launch:
        ended = launch.wait(START_S)
        check_clean(launch, ended, tmp_path)
    assert len(ended.messages) == 1, ended.output
    assert ended.messages[0].startswith(FAULTS[fault].message), ended.output
    assert FAULTS[fault].further in ended.output


def test_killing_torchrun_ends_its_ranks(tmp_path: Path) -> None:
    with started("torchrun killed", tmp_path) as launch:
        deadline = time.time() + START_S
        while not (tmp_path / "began").exists() and time.time() < deadline:
            time.sleep(0.1)
        assert len(launch.processes()) >= 3
        (tmp_path / "began").write_text(str(time.time()))
        launch.torchrun.kill()
        ended = launch.wait(START_S)
        check_clean(launch, ended, tmp_path)
    (message,) = ended.messages
    assert message.startswith(f"torchrun, process {launch.torchrun.pid} of "), ended.output


def test_full_disk_while_saving_names_the_rank_and_leaves_no_file(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(full)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system needs the right to mount")
    try:
        with started("full disk", tmp_path) as launch:
            ended = launch.wait(START_S)
            check_clean(launch, ended, tmp_path)
        assert not list(full.iterdir())
    finally:
        subprocess.run(["umount", str(full)], check=True)
    (message,) = ended.messages
    assert message.startswith("Rank 1 failed: SaveError: The plan cannot be written.")
    assert "No space left on device" in message


def test_slow_compilation_is_no_fault_and_full_shared_memory_neither(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    fill = (
        "mount -t tmpfs -o size=64k tmpfs /dev/shm && ! head -c 1m /dev/zero >/dev/shm/full "
        '&& exec "$@"'
    )
    before = [unshare, "--mount", "sh", "-c", fill, "sh"] if unshare and os.getuid() == 0 else []
    with started("compiles long", tmp_path, *before) as launch:  # elsewhere without the filling
        ended = launch.wait(START_S)
    assert ended.code == 0, ended.output
    assert not ended.messages
