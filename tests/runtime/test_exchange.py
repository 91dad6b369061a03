"""What ranks exchange, and the replacements of operators whose vmap rules freeze sizes.

Shapes: R ranks, B batch, S tokens, H query heads, G KV heads, D width of a query head, V of a value
head, C width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spdcompile.passes.ops import GATHER, SYNC, TAKE
from spdcompile.runtime.ops import NotPerRankError
from tests.compare import rel_err
from tests.runtime.operator_cases import (
    BOUNDS,
    CAT,
    LAYER_NORM,
    SDPA,
    B,
    D,
    H,
    R,
    S,
    V,
    gradients,
    over_ranks,
    random_inputs,
)

pytestmark = pytest.mark.usefixtures("reproducible")


def test_sync_sums_over_ranks_and_is_shared() -> None:
    partial = torch.randn(4, R, 5).double()
    out = torch.vmap(lambda x: SYNC(x, "attn.0"), in_dims=1, out_dims=None)(partial)
    assert torch.equal(out, partial.sum(1))


@pytest.mark.parametrize("op", [lambda x: SYNC(x, "mlp.1"), lambda x: GATHER(x, 0)])
def test_single_rank_gets_copy_with_identity_gradient(op: Callable[[Tensor], Tensor]) -> None:
    value = torch.randn(3, 4, requires_grad=True)
    out = op(value)
    assert torch.equal(out, value) and out.data_ptr() != value.data_ptr()
    (grad,) = torch.autograd.grad((out * out).sum(), value)
    assert torch.equal(grad, 2 * value)
    assert torch.equal(torch.func.grad(lambda x: (op(x) ** 2).sum())(value.detach()), grad)


def test_sync_gradient_reaches_each_rank() -> None:
    weight, x = torch.randn(R, 4, 5).double(), torch.randn(2, 5).double()

    def loss(weight: Tensor) -> Tensor:
        out = torch.vmap(lambda w: SYNC(x @ w.mT, "attn.0"), out_dims=None)(weight)
        return (out**3).sum()

    def plain(weight: Tensor) -> Tensor:
        return ((x @ weight.sum(0).mT) ** 3).sum()

    (wanted,) = gradients(plain, [weight])
    assert rel_err(gradients(loss, [weight])[0], wanted) < 1e-12
    assert rel_err(torch.func.grad(loss)(weight), wanted) < 1e-12


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("rank_dim", [0, 2])
def test_gather_concatenates_shards(dim: int, rank_dim: int) -> None:
    shards = torch.randn(R, 2, 3, 4).double()
    scale = torch.randn(torch.cat(list(shards), dim).shape).double()

    def gathered(shards: Tensor) -> Tensor:
        moved = shards.movedim(0, rank_dim)
        return torch.vmap(lambda x: GATHER(x, dim), rank_dim, out_dims=None)(moved)

    assert torch.equal(gathered(shards), torch.cat(list(shards), dim))
    (found,) = gradients(lambda x: (gathered(x) * scale).sum(), [shards])
    assert torch.equal(found, torch.stack(scale.chunk(R, dim)))


@pytest.mark.parametrize("op", [lambda x: SYNC(x, "mlp.1"), lambda x: GATHER(x, 0)])
def test_value_that_ranks_share_is_refused(op: Callable[[Tensor], Tensor]) -> None:
    shared, ranks = torch.ones(4), torch.randn(R, 4)
    with pytest.raises(NotPerRankError, match=r"shape \(4,\)"):
        torch.vmap(lambda x: op(shared) + x[0])(ranks)
    with pytest.raises(NotPerRankError):  # batched, but by the outer vmap
        torch.vmap(lambda x: torch.vmap(lambda y: op(x) + y[0])(ranks))(ranks)


@pytest.mark.parametrize(("dim", "n"), [(1, 1), (-1, 1), (0, 2), (-2, 4)])
def test_take_picks_share_of_rank(dim: int, n: int) -> None:
    units = 6
    shape = [2, 3]
    shape[dim] = n * units
    whole = torch.randn(R, *shape).double()
    index = torch.tensor([[0, 1], [5, 2], [4, 4]])

    def take(whole: Tensor, index: Tensor) -> Tensor:
        return TAKE(whole, index, dim % 2, units)

    def take_any_dim(whole: Tensor, index: Tensor) -> Tensor:
        return TAKE(whole, index, dim, units)

    for dims in [(0, 0), (None, 0), (0, None)]:
        args = [x if d == 0 else x[0] for x, d in zip((whole, index), dims, strict=True)]
        found = torch.vmap(take_any_dim, dims)(*args)
        assert torch.equal(found, over_ranks(take, args, dims))
    grad = torch.func.grad(lambda x: torch.vmap(take, (None, 0))(x, index).sum())(whole[0])
    counts = torch.bincount(index.flatten(), minlength=units).double()
    line = [1, 1]
    line[dim] = n * units
    assert torch.equal(grad, counts.repeat(n).reshape(line).expand(shape))


def assert_replaces(op: Any, aten: Any, args: Sequence[Any], dims: Sequence[int | None]) -> None:
    """The same outside vmap, in a loop over ranks, and in the gradient."""
    outside = [x if d is None else x.select(d, 0) for x, d in zip(args, dims, strict=True)]
    assert torch.equal(op(*outside), aten(*outside))
    out, wanted = torch.vmap(op, tuple(dims))(*args), over_ranks(aten, args, dims)
    bound = BOUNDS[wanted.dtype]
    assert rel_err(out, wanted) < bound
    leaves = [x.detach().requires_grad_() for x in args if x is not None and x.is_floating_point()]
    rest = iter(leaves)
    args = [next(rest) if x is not None and x.is_floating_point() else x for x in args]
    weights = torch.randn_like(wanted)
    found = torch.autograd.grad((torch.vmap(op, tuple(dims))(*args) * weights).sum(), leaves)
    others = torch.autograd.grad((over_ranks(aten, args, dims) * weights).sum(), leaves)
    for grad, other in zip(found, others, strict=True):
        assert rel_err(grad, other) < 4 * bound


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dims", [(0, 0), (1, None), (None, 2)])
def test_cat_replacement_matches_aten(dim: int, dims: tuple[int | None, ...]) -> None:
    args = []
    for rank_dim, width in zip(dims, (3, 5), strict=True):
        shape = [2, 2]
        shape[dim] = width
        x = torch.randn(R, *shape).double()
        args.append(x[0] if rank_dim is None else x.movedim(0, rank_dim))
    assert_replaces(lambda *x: CAT(x, dim), lambda *x: torch.cat(x, dim), args, dims)


def test_cat_replacement_keeps_default_dim_and_promotion() -> None:
    x, y = torch.randn(R, 2, 3), torch.randint(0, 5, (4, 3))
    out = torch.vmap(lambda x: CAT([x, y]))(x)
    assert torch.equal(out, torch.stack([torch.cat([part, y]) for part in x]))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("dims", [(1, None, None), (0, 0, 1), (None, 0, None), (0, None, 0)])
def test_layer_norm_replacement_matches_aten(
    dims: tuple[int | None, ...], dtype: torch.dtype
) -> None:
    args = [
        torch.randn(*shape) if dim is None else torch.randn(R, *shape).movedim(0, dim)
        for shape, dim in zip(((2, 4, 6), (6,), (6,)), dims, strict=True)
    ]
    args = [x.to(dtype) for x in args]
    assert_replaces(
        lambda x, w, b: LAYER_NORM(x, [6], w, b, 1e-3),
        lambda x, w, b: F.layer_norm(x, [6], w, b, 1e-3),
        args,
        dims,
    )


def test_layer_norm_replacement_takes_optional_arguments() -> None:
    x, weight = torch.randn(R, 2, 4, 6).double(), torch.randn(R, 4, 6).double()
    plain = over_ranks(lambda x: F.layer_norm(x, [6]), [x], [0])
    assert rel_err(torch.vmap(lambda x: LAYER_NORM(x, [6]))(x), plain) < 1e-13
    plain = over_ranks(lambda x, w: F.layer_norm(x, [4, 6], w), [x, weight], [0, 0])
    out = torch.vmap(lambda x, w: LAYER_NORM(x, [4, 6], w))(x, weight)
    assert rel_err(out, plain) < 1e-13


MASKS = {"none": None, "ST": (S, S), "1ST": (1, S, S), "BHST": (B, H, S, S), "B1ST": (B, 1, S, S)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dims", [(0, 0, 0, 0), (1, None, None, None), (None, 0, None, 0)])
def test_attention_replacement_matches_aten(dims: tuple[int | None, ...], mask: str) -> None:
    per_rank, shared = random_inputs(R), random_inputs()
    args: list[Any] = [
        shared[name] if dim is None else per_rank[name].movedim(0, dim)
        for name, dim in zip("qkv", dims, strict=False)
    ]
    shape = MASKS[mask]
    if shape is not None:
        seen = torch.rand(R, *shape) < 0.6
        seen = seen | torch.eye(S, dtype=torch.bool)
        args.append(seen[0] if dims[3] is None else seen)
    rest = {"is_causal": shape is None, "scale": 0.3, "enable_gqa": True}
    assert_replaces(
        lambda *x: SDPA(*x, **rest),
        lambda *x: F.scaled_dot_product_attention(*x, **rest),
        args,
        dims[: len(args)],
    )


def test_attention_replacement_takes_three_dims() -> None:
    q, k, v = (torch.randn(R, 2, S, width).double() for width in (D, D, V))
    mask = torch.rand(R, S, S).double()
    assert_replaces(SDPA, F.scaled_dot_product_attention, [q, k, v, mask], [0, 0, 0, 0])
