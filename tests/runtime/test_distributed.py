"""Two processes under torchrun: the same logits on every rank, and those of the local executor.

One launch runs all cases of distributed_worker.py, because starting processes costs more than they
do. Bounds are those of tests/numerics/test_lossless.py.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import spdcompile
from spdcompile.runtime.cpu_operators import linear_on_cpu
from tests.compare import rel_err
from tests.models import left_padded, tiny, token_ids
from tests.runtime.distributed_worker import CASES, DRAWN, NOTHING, TP, case_inputs

ROOT = Path(__file__).parents[2]
F32_BOUND = 1e-5
VISIBLE = 1e-3
LAUNCH_TIMEOUT_S = 540  # far beyond what it takes, and short of the limit of a test

Results = list[dict[str, list[Tensor] | str]]
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank wrote, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(TP), "-m", "tests.runtime.distributed_worker", str(folder)),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LAUNCH_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(TP)]


@cache
def _local(name: str) -> list[Tensor]:
    return CASES[name]._replace(backend="eager").run("local")


@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_the_same_bits(results: Results, name: str) -> None:
    first, second = (rank[name] for rank in results)
    assert len(first) == len(CASES[name].lengths)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_distributed_equals_local(results: Results, name: str) -> None:
    for logits, expected, length in zip(
        results[0][name], _local(name), CASES[name].lengths, strict=True
    ):
        _, mask = case_inputs(length)
        assert rel_err(logits, expected, real=mask) < F32_BOUND


@pytest.mark.parametrize("name", CASES)
def test_distributed_equals_hugging_face_if_nothing_is_dropped(results: Results, name: str) -> None:
    case, (ids, mask) = CASES[name], case_inputs(CASES[name].lengths[0])
    with torch.no_grad():
        expected = case.model()(input_ids=ids, attention_mask=mask).logits
    error = rel_err(results[0][name][0], expected, real=mask)
    assert error < F32_BOUND if case.dropped == NOTHING else error > VISIBLE


def test_ranks_with_different_plans_do_not_start(results: Results) -> None:
    for rank, found in enumerate(results):
        text = found["different plans"]
        assert text.startswith("PlanError: The ranks do not run the same plan.")
        assert f"where  : rank {rank}" in text
        assert "rank 0: " in text and "rank 1: " in text


def test_ranks_with_different_graphs_do_not_start(results: Results) -> None:
    for found in results:
        text = found["different graphs"]
        assert text.startswith("PlanError: The ranks do not run the same ")
        assert "rank 0: 1" in text and "rank 1: 2" in text


def test_sockets_that_one_rank_cannot_have_are_refused_on_all(results: Results) -> None:
    for found in results:
        assert found["unconnected"].startswith("UsageError: The ranks cannot use sockets.")
        assert "rank 1 has no address: OSError('no network')" in found["unconnected"]


def test_ranks_use_their_process_group_where_nothing_else_is_to_be_had(results: Results) -> None:
    assert all(bool(found["far and unconnected"][0]) for found in results)


def test_tp_that_is_not_the_number_of_processes_is_refused(results: Results) -> None:
    for found in results:
        assert found["wrong tp"].startswith("UsageError: WORLD_SIZE=2 but tp=4.")


def test_world_size_chooses_the_distributed_executor(results: Results) -> None:
    for found in results:
        (logits,), (expected,) = found["chosen by WORLD_SIZE"], found["llama, nothing dropped"]
        assert torch.equal(logits, expected)


def test_ranks_with_other_seeds_draw_the_tokens_of_rank_0(results: Results) -> None:
    (tokens, after), (others, after_others) = (
        rank["generated from other seeds"] for rank in results
    )
    assert torch.equal(tokens, others)
    ids, mask = case_inputs(9)
    torch.manual_seed(0)
    expected = CASES["llama, nothing dropped"].model().generate(ids, attention_mask=mask, **DRAWN)
    assert torch.equal(tokens, expected)
    assert torch.equal(after, torch.rand(1)), "rank 0 has drawn as the model itself does"
    torch.manual_seed(1)
    assert torch.equal(after_others, torch.rand(1)), "the other has its own state back"


def test_ranks_generate_in_bfloat16(results: Results) -> None:
    """Within the bound of tests/runtime/test_half_precision.py from the same weights in float32."""
    (tokens, logits), (others, other_logits) = (rank["generated in bfloat16"] for rank in results)
    assert torch.equal(logits, logits.bfloat16().float()), "transformers keeps them in float32"
    assert torch.equal(tokens, others) and torch.equal(logits, other_logits)
    assert torch.equal(tokens[:, 9:], logits.argmax(-1))
    model = CASES["llama, nothing dropped"].model().to(torch.bfloat16)
    _, mask = case_inputs(9)
    seen = torch.cat([mask, mask.new_ones(tokens.shape[0], tokens.shape[1] - 9)], 1)
    own, truth = (
        each(input_ids=tokens, attention_mask=seen).logits[:, 8:-1].detach().float()
        for each in (copy.deepcopy(model), model.float())
    )
    assert rel_err(logits, truth) < max(2e-2, 2 * rel_err(own, truth))


def test_inductor_runs_two_lengths_of_the_local_executor() -> None:
    model = tiny("llama", layers=1, hidden=32, heads=4, intermediate=50)
    compiled, eager = (
        spdcompile.compile(model, tp=TP, spd_mask=[True], executor="local", backend=backend)
        for backend in ("inductor", "eager")
    )
    for length in (9, 5):
        ids, valid = left_padded(token_ids(length=length))
        expected = eager(ids, valid).logits
        assert rel_err(compiled(ids, valid).logits, expected, real=valid) < F32_BOUND


def test_parts_gathered_and_added_are_the_sum_over_the_group(results: Results) -> None:
    parts = [torch.randn(3, 5, generator=torch.Generator().manual_seed(rank)) for rank in range(TP)]
    for found in results:
        assert all(torch.equal(total, parts[0] + parts[1]) for total in found["both sums"])


def test_first_rank_decides_how_products_are_taken(results: Results) -> None:
    can_widen = linear_on_cpu() is not torch.nn.functional.linear  # with a compiler
    for found in results:
        assert [bool(decided) for decided in found["whether to widen"]] == [can_widen, False]
