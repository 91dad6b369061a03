"""Two replicas of two ranks: requests are split over the replicas, results are in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spdcompile
from spdcompile.errors import UsageError
from spdcompile.runtime.launch import check_world_size
from tests.compare import rel_err
from tests.runtime.launching import TORCHRUN, launched
from tests.runtime.replica_worker import WRONG_TP, model, requests

TP, REPLICAS = 2, 2
F32_BOUND = 1e-5

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process wrote, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = ("-m", "tests.runtime.replica_worker", str(folder), str(TP))
    number = str(TP * REPLICAS)
    with launched([*TORCHRUN, "--standalone", "--nproc-per-node", number, *worker]) as launch:
        ended = launch.wait(280)
    assert ended.code == 0, ended.output
    assert not ended.messages
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(4)]


def test_every_process_has_the_results_of_all_requests(ranks: list[dict[str, Any]]) -> None:
    local = spdcompile.compile(model(), tp=TP, executor="local", backend="eager")
    expected = local.over_replicas(lambda ids: local(ids).logits, requests())
    assert (local.replica, local.num_replicas) == (0, 1)
    for found in ranks:
        assert len(found["logits"]) == len(requests())
        for logits, wanted in zip(found["logits"], expected, strict=True):
            assert rel_err(logits, wanted) < F32_BOUND


def test_each_replica_runs_its_share_alone(ranks: list[dict[str, Any]]) -> None:
    lengths = [ids.shape[1] for ids in requests()]
    assert [found["replica"] for found in ranks] == [[0, 2], [0, 2], [1, 2], [1, 2]]
    for found in ranks:
        assert found["lengths seen"] == lengths[found["replica"][0] :: REPLICAS]


def test_number_of_processes_that_is_no_multiple_of_tp_is_refused(
    ranks: list[dict[str, Any]],
) -> None:
    for found in ranks:
        assert found["wrong tp"].startswith(f"WORLD_SIZE=4 but tp={WRONG_TP}.")
    check_world_size(2, 6)
    for tp, size in [(4, 6), (2, 1), (8, 4)]:
        with pytest.raises(UsageError, match="or a multiple of it, for replicas"):
            check_world_size(tp, size)
