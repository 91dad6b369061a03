"""Grouped matrix products against a loop over rows, under every transform.

Shapes: R ranks, N rows, E experts, K and J features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from spdcompile.passes.ops import GROUPED_MM
from spdcompile.runtime.grouped import GROUPED_OUTER
from tests.compare import rel_err
from tests.runtime.operator_cases import BOUNDS, R, gradients, over_ranks
from tests.runtime.test_compiled_operators import Counting

pytestmark = pytest.mark.usefixtures("reproducible")

N, E, K, J = 11, 4, 6, 5
# The ends of four groups of rows: some are empty, and some rows belong to no group.
ENDS = {
    "all": (3, 4, 9, 11),
    "empty": (0, 0, 11, 11),
    "one": (11, 11, 11, 11),
    "rows-left": (2, 2, 5, 8),
    "none": (0, 0, 0, 0),
}
# Which operands each rank has for itself: rows, weight, ends.
DIMS = [(0, 0, None), (None, 0, None), (0, None, None), (1, 2, None), (0, 0, 0), (None, None, 0)]


def multiply_plainly(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Row by row, with the matrix of the first group that ends after the row."""
    results = []
    for number, row in enumerate(rows):
        after = (ends > number).nonzero().flatten().tolist()
        results.append(row @ weight[after[0]] if after else row @ weight[0] * 0)
    return torch.stack(results)


def ends_of(case: str) -> Tensor:
    return torch.tensor(ENDS[case], dtype=torch.int32)


def operands(dims: Sequence[int | None], case: str = "all") -> list[Tensor]:
    """Rows, weight and ends, per rank where `dims` says so."""
    ends = ends_of(case)
    others = torch.stack([ends, ends // 2, ends // 3])
    made = [torch.randn(R, N, K).double(), torch.randn(R, E, K, J).double(), others]
    return [x[0] if d is None else x.movedim(0, d) for x, d in zip(made, dims, strict=True)]


@pytest.mark.parametrize("case", ENDS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_product_matches_plain(case: str, dtype: torch.dtype) -> None:
    rows, weight, ends = operands((None, None, None), case)
    rows, weight = rows.to(dtype), weight.to(dtype)
    wanted = multiply_plainly(rows, weight, ends)
    if case == "none":
        assert torch.equal(GROUPED_MM(rows, weight, ends), torch.zeros(N, J, dtype=dtype))
        return
    assert rel_err(GROUPED_MM(rows, weight, ends), wanted) < BOUNDS[dtype]
    turned = weight.mT.contiguous().mT
    assert rel_err(GROUPED_MM(rows, turned, ends.long()), wanted) < BOUNDS[dtype]


@pytest.mark.parametrize("dims", DIMS)
def test_vmap_matches_loop_over_ranks(dims: tuple[int | None, ...]) -> None:
    for case in ("all", "empty", "rows-left"):
        args = operands(dims, case)
        found = torch.vmap(GROUPED_MM, dims)(*args)
        assert rel_err(found, over_ranks(multiply_plainly, args, dims)) < 1e-13


def loss_of(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """(rows, weight, ends) -> a scalar in which every entry of the output counts."""
    weights = torch.randn(N, J, generator=torch.Generator().manual_seed(3)).double()

    def loss(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        out = product(rows, weight, ends)
        return (out * weights + out**2).sum()

    return loss


@pytest.mark.parametrize("case", ["all", "empty", "rows-left"])
def test_gradient_matches_plain_under_every_transform(case: str) -> None:
    dims = (0, 0, None)
    rows, weight, ends = operands(dims, case)
    loss, plain = loss_of(GROUPED_MM), loss_of(multiply_plainly)
    pairs = list(zip(rows, weight, strict=True))
    each = [gradients(lambda a, b: plain(a, b, ends), pair) for pair in pairs]
    expected = [torch.stack(parts) for parts in zip(*each, strict=True)]

    def summed(rows: Tensor, weight: Tensor) -> Tensor:
        return torch.vmap(loss, dims)(rows, weight, ends).sum()

    compiled = torch.compile(summed, backend="aot_eager", fullgraph=True)
    alone = [gradients(lambda a, b: loss(a, b, ends), pair) for pair in pairs]
    found = {
        "backward": [torch.stack(parts) for parts in zip(*alone, strict=True)],
        "backward of vmap": gradients(summed, [rows, weight]),
        "grad of vmap": torch.func.grad(summed, (0, 1))(rows, weight),
        "vmap of grad": torch.vmap(torch.func.grad(loss, (0, 1)), dims)(rows, weight, ends),
        "compiled": gradients(compiled, [rows, weight]),
    }
    for how, grads in found.items():
        for grad, wanted in zip(grads, expected, strict=True):
            assert rel_err(grad, wanted) < 1e-12, how


@pytest.mark.parametrize("dims", [(None, 0, None), (0, None, None)])
def test_gradient_of_shared_operand_sums_over_ranks(dims: tuple[int | None, ...]) -> None:
    rows, weight, ends = operands(dims)
    loss, plain = loss_of(GROUPED_MM), loss_of(multiply_plainly)
    found = gradients(lambda *x: torch.vmap(loss, dims)(*x, ends).sum(), [rows, weight])
    wanted = gradients(lambda *x: over_ranks(plain, [*x, ends], dims).sum(), [rows, weight])
    for grad, other in zip(found, wanted, strict=True):
        assert rel_err(grad, other) < 1e-12


def test_second_gradient_matches_finite_differences() -> None:
    rows, weight, ends = operands((None, None, None), "rows-left")
    rows.requires_grad_()
    weight.requires_grad_()
    function = loss_of(GROUPED_MM)
    assert torch.autograd.gradgradcheck(lambda a, b: function(a, b, ends), (rows, weight))


def test_two_vmaps_match_plain() -> None:
    rows, weight, ends = operands((0, 0, 0))
    rows, weight = torch.randn(2, *rows.shape).double(), torch.randn(2, *weight.shape).double()
    grad = torch.func.grad(loss_of(GROUPED_MM), (0, 1))
    inner = torch.vmap(grad)
    found = torch.vmap(inner, (0, 0, None))(rows, weight, ends)
    for i in range(2):
        for rank in range(R):
            wanted = gradients(
                lambda a, b, rank=rank: loss_of(multiply_plainly)(a, b, ends[rank]),
                [rows[i, rank], weight[i, rank]],
            )
            for grads, other in zip(found, wanted, strict=True):
                assert rel_err(grads[i, rank], other) < 1e-12


def test_new_lengths_compile_nothing() -> None:
    backend = Counting()
    dims = (None, 0, None)
    weight = torch.nn.Parameter(torch.randn(R, E, J, K), requires_grad=False)

    def function(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return GROUPED_MM(rows, weight.transpose(-2, -1), ends)

    mapped = torch.vmap(function, dims)
    compiled = torch.compile(mapped, backend=backend, fullgraph=True, dynamic=True)
    for length in (23, 9, 14, 2):
        ends = torch.tensor([1, 1, 2, length])
        rows = torch.randn(length, K)
        assert rel_err(compiled(rows, weight, ends), mapped(rows, weight, ends)) < 1e-6
    assert backend.count == 1


def test_operators_pass_opcheck() -> None:
    rows, weight, ends = operands((None, None, None))
    torch.library.opcheck(GROUPED_MM, (rows.requires_grad_(), weight.requires_grad_(), ends))
    others = torch.randn(N, J).double().requires_grad_()
    torch.library.opcheck(GROUPED_OUTER, (rows, others, ends))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [16, 12], ids=["aligned", "not-aligned"])
@pytest.mark.parametrize("dims", [(None, 0, None), (0, 0, None), (0, None, None)])
def test_fused_kernel_matches_loop(width: int, dims: tuple[int | None, ...]) -> None:
    rows, weight = torch.randn(R, N, width), torch.randn(R, E, 24, width)
    ends = ends_of("rows-left").cuda()
    given = [x[0] if d is None else x for x, d in zip((rows, weight), dims, strict=False)]
    given = [x.cuda().bfloat16() for x in given]

    def loss(rows: Tensor, weight: Tensor) -> Tensor:
        out = GROUPED_MM(rows, weight.mT, ends)
        return (out.float() ** 2).sum()

    found = torch.vmap(torch.func.grad_and_value(loss, (0, 1)), dims[:2])(*given)
    exact = [x.double() for x in given]
    wanted = torch.vmap(torch.func.grad_and_value(loss, (0, 1)), dims[:2])(*exact)
    assert rel_err(found[1].double(), wanted[1]) < 2e-2
    for grad, other in zip(found[0], wanted[0], strict=True):
        assert rel_err(grad.double(), other) < 2e-2
