"""The operator for products of few rows against float64, whatever it is given."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from spdcompile.passes import pipeline
from spdcompile.runtime import cpu_operators, native, rank
from spdcompile.runtime.cpu_operators import use_cpu_operators
from spdcompile.runtime.executor import Backend
from spdcompile.runtime.replay import ReplayExecutor
from tests.compare import rel_err
from tests.models import tiny
from tests.runtime.test_compiled_operators import Counting

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-14}
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17)
SIZES = (1, 15, 33, 100, 1000)  # none of which is a multiple of a vector's
COUNT = 29

pytestmark = pytest.mark.usefixtures("reproducible", "library")


@pytest.fixture(scope="module")
def library() -> None:
    native.load_library()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.spd_cpu.linear(x, weight, bias)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x.double(), weight.double(), None if bias is None else bias.double())


def linear_and_relu() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    operands = [graph.placeholder(name) for name in ("x", "weight")]
    made = graph.call_function(torch.ops.aten.linear.default, tuple(operands))
    graph.output(graph.call_function(torch.ops.aten.relu.default, (made,)))
    return torch.fx.GraphModule({}, graph)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("has_bias", (False, True))
def test_product_is_exact_up_to_one_rounding(dtype: torch.dtype, has_bias: bool) -> None:
    for rows in ROWS:
        for size in SIZES:
            x, weight = torch.randn(rows, size).to(dtype), torch.randn(COUNT, size).to(dtype)
            bias = torch.randn(COUNT).to(dtype) if has_bias else None
            found = product(x, weight, bias)
            assert found.dtype == dtype and found.is_contiguous()
            assert rel_err(found.double(), exact(x, weight, bias)) < BOUNDS[dtype], (rows, size)


@pytest.mark.parametrize("rows", [63, 64, 130])
@pytest.mark.parametrize("shape", [(29, 100), (300, 1030), (1, 7), (2, 600_000), (5, 300_000)])
def test_widened_product_is_exact_up_to_one_rounding(rows: int, shape: tuple[int, int]) -> None:
    count, size = shape
    x, weight = (torch.randn(n, size).bfloat16() for n in (rows, count))
    for bias in (None, torch.randn(count).bfloat16()):
        found = torch.ops.spd_cpu.linear(x.view(1, rows, size), weight, bias, widens=True)
        assert found.dtype == torch.bfloat16 and found.shape == (1, rows, count)
        assert rel_err(found[0].double(), exact(x, weight, bias)) < BOUNDS[torch.bfloat16]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_many_rows_are_one_dnns() -> None:
    with torch.profiler.profile() as profile:
        product(torch.randn(17, 100), torch.randn(COUNT, 100))
    assert "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_widened_products_are_one_dnns_in_float32() -> None:
    x, weight = torch.randn(64, 100).bfloat16(), torch.randn(COUNT, 100).bfloat16()
    for widens, name in ((True, "mkldnn::_linear_pointwise"), (False, "aten::linear")):
        with torch.profiler.profile() as profile:
            torch.ops.spd_cpu.linear(x, weight, None, widens)
        assert name in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(("narrow", "wide", "pays"), [(9e-3, 1e-3, True), (1e-3, 9e-3, False)])
def test_widening_pays_where_it_is_measured_to(
    narrow: float, wide: float, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleeping(*, widens: bool) -> Callable[..., None]:
        return lambda x, weight: time.sleep(wide if widens else narrow)

    monkeypatch.setattr(cpu_operators, "linear_on_cpu", sleeping)
    assert cpu_operators.widening_pays.__wrapped__() is pays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pays", [True, False])
def test_ranks_widen_bfloat16_where_it_pays(
    dtype: torch.dtype, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "widening_pays", lambda _: pays)
    model = tiny("llama", layers=1, hidden=32, heads=4, intermediate=48).to(dtype)
    lowering = pipeline.advance(pipeline.start(model), pipeline.preserving(2, {}))
    device = torch.device("cpu")
    executor = ReplayExecutor(lowering.program, backend=Backend.EAGER, device=device)
    codes = [built.function.code for built in executor._built.values()]
    wanted = pays and dtype is torch.bfloat16
    assert any("spd_cpu.linear" in code for code in codes)
    assert any("widens = True" in code for code in codes) == wanted


def test_threads_do_not_change_a_bit() -> None:
    x, weight = torch.randn(1, 512), torch.randn(900, 512)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(product(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("shape", [(100,), (1, 100), (2, 1, 100), (1, 2, 2, 100), (0, 100)])
def test_product_keeps_leading_dims(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(COUNT, 100)
    found = product(x, weight)
    assert found.shape == (*shape[:-1], COUNT)
    assert torch.allclose(found.double(), exact(x, weight), atol=1e-4)


def test_product_reads_any_strides() -> None:
    x, weight, bias = torch.randn(100, 3), torch.randn(100, COUNT), torch.randn(2 * COUNT)
    for operands in (
        (x.T, torch.randn(COUNT, 100), None),
        (torch.randn(3, 100), weight.T, None),
        (torch.randn(3, 100), torch.randn(COUNT, 100), bias[::2]),
    ):
        assert rel_err(product(*operands).double(), exact(*operands)) < 1e-6


def test_product_has_the_gradient_of_linear() -> None:
    operands = [torch.randn(2, 40), torch.randn(COUNT, 40), torch.randn(COUNT)]
    found, expected = (
        torch.autograd.grad(function(*leaves).square().sum(), leaves)
        for function in (product, linear)
        for leaves in [[x.clone().requires_grad_() for x in operands]]
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert rel_err(ours, theirs) < 1e-6


def test_one_graph_serves_every_number_of_rows() -> None:
    module = linear_and_relu()
    use_cpu_operators(module)
    assert "spd_cpu" in module.code
    backend, weight = Counting(), torch.nn.Parameter(torch.randn(COUNT, 40), requires_grad=False)
    compiled = torch.compile(module, backend=backend, dynamic=True)
    for rows in (7, 2, 5, 80, 3):
        x = torch.randn(rows, 40)
        assert rel_err(compiled(x, weight).double(), exact(x, weight).relu()) < 1e-6
    assert backend.count == 1
