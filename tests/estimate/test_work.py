"""Counted work is what the model's sizes say."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import fx

from spdcompile.errors import UsageError
from spdcompile.estimate.counting import Counting, Kind
from spdcompile.estimate.kernels import FUSED, KERNELS
from spdcompile.estimate.structure import Structure
from spdcompile.estimate.work import Step, Work, work_of
from spdcompile.passes.ops import ATTEND_CACHED, CALL
from spdcompile.plan import Plan
from tests.models import tiny

HIDDEN, INNER, LAYERS, HEADS, VOCAB, TP = 64, 128, 2, 8, 96, 2
OWN, OWN_INNER, OWN_VOCAB, OWN_HEADS = HIDDEN // TP, INNER // TP, VOCAB // TP, HEADS // TP
WIDTH = HIDDEN // HEADS
PREFILL, DECODE = Step(3, 12), Step(3, 1, 20)


@cache
def structure(family: str) -> Structure:
    return Structure(tiny(family))


def work(family: str, step: Step, *dropped: tuple[int, str]) -> Work:
    return structure(family).work(Plan(TP, LAYERS, frozenset(dropped)), step)


def products(family: str) -> int:
    """Weights of a layer's matrices on a rank."""
    return {
        "llama": 4 * HIDDEN * OWN + 3 * HIDDEN * OWN_INNER,
        "opt": 4 * HIDDEN * OWN + 2 * HIDDEN * OWN_INNER,
    }[family]


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("step", [PREFILL, DECODE])
def test_flops_are_those_of_products_and_attention(family: str, step: Step) -> None:
    tokens, total = step.batch * step.new, step.context + step.new
    attention = 2 * step.batch * OWN_HEADS * step.new * total * 2 * WIDTH
    head = 2 * step.batch * HIDDEN * OWN_VOCAB  # the last token's logits alone
    expected = LAYERS * (2 * tokens * products(family) + attention) + head
    assert work(family, step).flops == expected


def test_weight_bytes_of_llama() -> None:
    norms, frequencies = (2 * LAYERS + 1) * HIDDEN, WIDTH // 2
    tables = VOCAB * HIDDEN + OWN_VOCAB * HIDDEN
    count = LAYERS * products("llama") + norms + frequencies + tables
    assert work("llama", DECODE).weight_bytes == 4 * count


def test_weight_bytes_of_opt() -> None:
    biases = 3 * OWN + HIDDEN + OWN_INNER + HIDDEN
    norms = (2 * LAYERS + 1) * 2 * HIDDEN
    tables = VOCAB * HIDDEN + (128 + 2) * HIDDEN + OWN_VOCAB * HIDDEN
    count = LAYERS * (products("opt") + biases) + norms + tables
    assert work("opt", DECODE).weight_bytes == 4 * count


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("step", [PREFILL, DECODE])
def test_exchanges_are_two_a_layer_and_a_gather(family: str, step: Step) -> None:
    found = work(family, step).exchanges
    points = [f"layers.{layer}.{name}" for layer in range(LAYERS) for name in ("attn", "mlp")]
    assert [each.point for each in found] == [*points, "postlude.gather"]
    *reduced, gathered = found
    assert {each.kind for each in reduced} == {Kind.ALL_REDUCE}
    assert {each.num_bytes for each in reduced} == {4 * step.batch * step.new * HIDDEN}
    assert (gathered.kind, gathered.num_bytes) == (Kind.ALL_GATHER, 4 * step.batch * VOCAB)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_dropping_removes_those_exchanges_and_no_others(family: str) -> None:
    plain, dropped = work(family, DECODE), work(family, DECODE, (0, "attn"), (1, "attn"))
    gone = {each.point for each in plain.exchanges} - {each.point for each in dropped.exchanges}
    assert gone == {"layers.0.attn", "layers.1.attn"}
    assert set(dropped.exchanges) <= set(plain.exchanges)
    assert dropped.flops == plain.flops


def test_decode_reads_each_matrix_and_cache_once() -> None:
    found = work("llama", DECODE)
    matrices = 4 * (LAYERS * products("llama") + OWN_VOCAB * HIDDEN)
    caches = LAYERS * 2 * 4 * DECODE.batch * OWN_HEADS * (DECODE.context + 1) * WIDTH
    assert matrices + caches < found.state_bytes < 1.2 * (matrices + caches)


def test_fused_operators_are_one_kernel() -> None:
    def f(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten.relu.default(torch.ops.aten.add.Tensor(x, 1))
        y = torch.ops.aten.linear.default(torch.ops.aten.mul.Tensor(y, x), weight)
        return torch.ops.aten.tanh.default(y)

    counting = Counting(fx.symbolic_trace(f), ranks=2)
    counting.run(torch.empty(4, 8, device="meta"), torch.empty(16, 8, device="meta"))
    kernels = list(counting.kernels())
    assert [kernel.name for kernel in kernels] == [FUSED, "linear", FUSED]
    assert [kernel.num_bytes for kernel in kernels] == [
        4 * (32 + 32),
        4 * (32 + 128 + 64),
        4 * (64 + 64),
    ]


def test_product_without_a_row_is_counted_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = work("llama", PREFILL).flops
    monkeypatch.delitem(KERNELS, torch.ops.aten.linear.default)  # pyright: ignore
    program = structure("llama").remembering(Plan(TP, LAYERS))
    assert work_of(program, PREFILL).flops == expected


def test_own_operator_without_a_row_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KERNELS, ATTEND_CACHED)  # pyright: ignore
    program = structure("llama").remembering(Plan(TP, LAYERS))
    with pytest.raises(UsageError, match="cost of an operator is not known"):
        work_of(program, DECODE)


def test_opaque_code_is_an_error() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return CALL([x], "code", [0, 0], torch.float32)

    with pytest.raises(UsageError, match=r"spd\.call"):
        Counting(fx.symbolic_trace(f), ranks=2).run(torch.empty(4, device="meta"))
