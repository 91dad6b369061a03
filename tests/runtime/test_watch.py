"""What the reports of ranks show, and the small parts beside it: no process is started."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from spdcompile.errors import SaveError, UsageError
from spdcompile.files import write_whole
from spdcompile.plan import Plan
from spdcompile.runtime.connections import in_a_line, is_broken_connection
from spdcompile.runtime.faults import PATIENCE_S, Fault, Report, Seen, find_fault
from spdcompile.runtime.fingerprint import fingerprint
from spdcompile.runtime.job import TIMEOUT_S, chosen_timeout
from spdcompile.runtime.processes import Identity

TIMEOUT = 10.0
WAITING = Report(started={"tp": 5}, call=2, runs="program a", at="in block 1")
IDLE = Report(started={"tp": 4}, call=1)


def seen(*reports: Report, at: float = 0.0) -> dict[int, Seen]:
    """Ranks whose latest reports came, and began to hold, at a time."""
    return {rank: Seen(report, at, at) for rank, report in enumerate(reports)}


def fault_after(ranks: dict[int, Seen], seconds: float, *, alive: bool = True) -> Fault | None:
    """What is found after a time in which nobody moved."""
    assert find_fault(ranks, TIMEOUT, 0.0, by=0) is None
    for other in ranks.values():
        other.beat_at = seconds if alive else other.beat_at
    return find_fault(ranks, TIMEOUT, seconds, by=0)


def with_(report: Report, **changes: object) -> Report:
    return Report(**{**{name: getattr(report, name) for name in Report.__slots__}, **changes})


def test_rank_that_others_wait_for_is_named() -> None:
    found = fault_after(seen(WAITING, IDLE, WAITING), TIMEOUT + 1)
    assert found is not None and found.ranks == (1,) and found.hanging
    assert str(found) == "Rank 1 stalled: the others have waited 10 s; it is between two calls"
    assert fault_after(seen(WAITING, IDLE, WAITING), TIMEOUT - 1) is None


def test_last_of_several_late_ranks_is_named() -> None:
    earlier = with_(IDLE, started={"tp": 3})
    found = fault_after(seen(WAITING, IDLE, earlier, earlier), TIMEOUT + 1)
    assert found is not None and found.ranks == (2, 3)
    assert str(found).startswith("Ranks 2, 3 stalled")


def test_ranks_that_wait_for_nobody_are_left_alone() -> None:
    assert fault_after(seen(IDLE, IDLE), 100 * TIMEOUT) is None
    assert fault_after(seen(IDLE, IDLE), 100 * TIMEOUT, alive=False) is None
    assert fault_after(seen(WAITING, WAITING), 100 * TIMEOUT) is None  # they compute


def test_rank_that_compiles_is_given_more_time() -> None:
    compiling = with_(IDLE, patient=True)
    assert fault_after(seen(WAITING, compiling), 10 * TIMEOUT) is None
    assert fault_after(seen(WAITING, compiling), 10 * TIMEOUT, alive=False) is None
    assert fault_after(seen(WAITING, compiling), PATIENCE_S + 1) is not None


def test_progress_ends_being_behind() -> None:
    ranks = seen(WAITING, IDLE)
    assert find_fault(ranks, TIMEOUT, 0.0, by=0) is None
    ranks[1].update(with_(WAITING, beat=1), TIMEOUT - 1)
    ranks[0].update(with_(WAITING, beat=1, started={"tp": 6}), TIMEOUT - 1)
    assert find_fault(ranks, TIMEOUT, TIMEOUT + 1, by=0) is None


def test_silent_rank_in_the_same_collective_is_named() -> None:
    ranks = seen(WAITING, WAITING)
    ranks[0].beat_at = TIMEOUT + 1
    found = find_fault(ranks, TIMEOUT, TIMEOUT + 1, by=0)
    assert found is not None and found.ranks == (1,)
    assert "has not been heard of for 10 s; it was in call 2 in block 1" in str(found)


def test_rank_that_ended_is_named_only_if_needed() -> None:
    ended = "exited while others wait for it"
    assert fault_after(seen(WAITING, with_(WAITING, ended=ended)), 1.0) is None
    ranks = seen(WAITING, with_(IDLE, ended=ended))
    assert str(find_fault(ranks, TIMEOUT, 0.0, by=0)) == f"Rank 1 {ended}"
    failed = seen(IDLE, with_(IDLE, ended="failed: ValueError: no"))
    assert str(find_fault(failed, TIMEOUT, 0.0, by=0)) == "Rank 1 failed: ValueError: no"


def test_rank_whose_process_is_gone_is_named_once_a_connection_breaks() -> None:
    ranks = seen(WAITING, WAITING)
    ranks[1].gone = True
    assert find_fault(ranks, TIMEOUT, 0.0, by=0) is None
    found = find_fault(ranks, TIMEOUT, 0.0, by=0, broken=True)
    assert str(found) == "Rank 1 was killed, or exited, in call 2 in block 1"


def test_ranks_in_different_programs_of_one_call_are_named() -> None:
    ranks = seen(WAITING, with_(WAITING, runs="program b"))
    found = fault_after(ranks, TIMEOUT + 1)
    assert found is not None and found.ranks == (0, 1)
    assert "rank 0: program a; rank 1: program b" in str(found)


def test_reports_and_faults_survive_the_store() -> None:
    fault = Fault((1, 2), "stalled", by=0, hanging=True)
    assert Fault.from_json(fault.to_json()) == fault
    assert Report.from_json(WAITING.to_json()) == WAITING


def test_identity_knows_a_process_that_has_ended() -> None:
    own = Identity.own()
    assert own.is_local and not own.is_gone
    assert Identity(own.host, own.place, own.pid, "0").is_gone  # the number was used again
    assert not Identity(own.host, "elsewhere", own.pid, "0").is_gone
    Identity(own.host, own.place, own.pid, "0").kill()  # not this process, so nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_fingerprint_tells_values_names_and_types_apart(dtype: torch.dtype) -> None:
    weight = torch.arange(3000).view(30, 100).to(dtype)
    own = fingerprint({"a": weight, "empty": weight[:0], "scalar": weight[0, 0]})
    assert own == fingerprint({"scalar": weight[0, 0], "a": weight.clone(), "empty": weight[:0]})
    others = [
        {"a": weight + 1},
        {"b": weight},
        {"a": weight.view(100, 30)},
        {"a": weight.double()},
    ]
    assert len({fingerprint({"a": weight}), *map(fingerprint, others)}) == 5
    assert fingerprint({"a": weight.t()}) == fingerprint({"a": weight.t().contiguous()})


def test_timeout_comes_from_the_environment_first() -> None:
    assert chosen_timeout(None, {}) == TIMEOUT_S
    assert chosen_timeout(30, {}) == 30.0
    assert chosen_timeout(30, {"SPD_TIMEOUT": "7.5"}) == 7.5


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), True, "soon"])
def test_wrong_timeout_is_refused(wrong: float) -> None:
    with pytest.raises(UsageError, match="no number of seconds"):
        chosen_timeout(wrong, {})


def test_wrong_timeout_in_the_environment_is_refused() -> None:
    with pytest.raises(UsageError, match="SPD_TIMEOUT"):
        chosen_timeout(30, {"SPD_TIMEOUT": ""})


def test_connection_errors_are_told_from_others() -> None:
    assert is_broken_connection(RuntimeError("[gloo/pair.cc] Connection closed by peer"))
    assert not is_broken_connection(RuntimeError("shapes cannot be multiplied"))
    assert not is_broken_connection(ValueError("connection"))
    assert in_a_line(SaveError("No.", found="room")) == "SaveError: No.: room"


def test_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    Plan(tp=2, num_layers=1).save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="No space left on device"):
        Plan(tp=4, num_layers=1).save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]


def test_file_is_written_through_links_and_to_what_is_no_file(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    write_whole(link, "text")
    assert link.is_symlink() and (tmp_path / "target").read_text() == "text"
    write_whole("/dev/null", "text")
