"""Kernels, gradients and vmap rules of the operators, against plain versions written out here.

Shapes: R ranks, B batch, S tokens, H query heads, G KV heads, D width of a query head, V of a value
head, C width of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spdcompile.passes.ops import ATTENTION, GATHER, SYNC, TAKE
from spdcompile.runtime.ops import ATTENTION_BACKWARD, VMAP_REPLACEMENTS, NotPerRankError
from tests.compare import rel_err

R, B, S, H, G, D, V = 3, 2, 7, 4, 2, 6, 5
CAT, LAYER_NORM, SDPA = VMAP_REPLACEMENTS.values()

# Relative to the largest entry: rounding of sums of at most 7 products, and of the weights to
# bfloat16 (2^-8) in its case.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}

# scale, causal, window, softcap
SETTINGS = {
    "causal": (0.4, True, 0, 0.0),
    "full": (0.4, False, 0, 0.0),
    "window": (0.4, True, 3, 0.0),
    "window-full": (0.4, False, 2, 0.0),
    "window-of-one": (0.4, True, 1, 0.0),
    "window-longer": (0.4, True, 50, 0.0),
    "softcap": (0.9, True, 0, 1.5),
    "softcap-window": (0.9, True, 4, 1.5),
}
PADDINGS = {"none": (0, 0), "left": (3, 0), "right": (0, 2), "both": (2, 2), "all": (S, 0)}


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(7)
    torch.compiler.reset()


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, sinks: Tensor | None, *settings: Any
) -> Tensor:
    """Attention row by row over the columns that the row sees -> [B, S, H, V]."""
    scale, causal, window, softcap = settings
    rows = []
    for b, i, h in itertools.product(range(q.shape[0]), range(q.shape[2]), range(q.shape[1])):
        seen = [
            j
            for j in range(k.shape[2])
            if i == j
            or (valid[b, j] and (not causal or j <= i) and (window == 0 or i - j < window))
        ]
        group = h // (q.shape[1] // k.shape[1])
        logits = scale * (k[b, group, seen] @ q[b, h, i])
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        top = torch.exp(logits)
        total = top.sum() + (0 if sinks is None else torch.exp(sinks[h]))
        rows.append((top / total) @ v[b, group, seen])
    return torch.stack(rows).reshape(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def random_inputs(*lead: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """q, k, v and sinks with leading dims, reproducible."""
    make = torch.Generator().manual_seed(5)
    shapes = {"q": (B, H, S, D), "k": (B, G, S, D), "v": (B, G, S, V), "sinks": (H,)}
    return {
        name: torch.randn(*lead, *shape, generator=make, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def padded(left: int, right: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """[B, S] with padding in the last sequence only."""
    valid = torch.ones(B, S, dtype=dtype)
    valid[-1, :left] = 0
    valid[-1, S - right :] = 0
    return valid


def over_ranks(
    function: Callable[..., Tensor], args: Sequence[Any], dims: Sequence[int | None]
) -> Tensor:
    """What vmap should compute, by a loop."""
    outs = []
    for rank in range(R):
        pairs = zip(args, dims, strict=True)
        outs.append(function(*(x if d is None else x.select(d, rank) for x, d in pairs)))
    return torch.stack(outs)


# ---- attention


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_attention_matches_plain(setting: str, with_sinks: bool, padding: str) -> None:
    for dtype, bound in BOUNDS.items():
        given = random_inputs(dtype=dtype)
        sinks = given.pop("sinks") if with_sinks else None
        given.pop("sinks", None)
        valid = padded(*PADDINGS[padding])
        wide = [x.double() for x in given.values()]
        wide_sinks = None if sinks is None else sinks.double()
        expected = attend_plainly(*wide, valid, wide_sinks, *SETTINGS[setting])
        for mask in (valid, valid.bool()):
            out = ATTENTION(*given.values(), mask, sinks, *SETTINGS[setting])
            assert out.dtype == dtype and out.is_contiguous()
            assert rel_err(out.double(), expected) < bound


def test_attention_without_groups_matches_plain() -> None:
    given = random_inputs()
    k, v = (given[name].repeat(1, 2, 1, 1) for name in "kv")
    args = (given["q"], k, v, padded(1, 1), None, *SETTINGS["causal"])
    assert rel_err(ATTENTION(*args), attend_plainly(*args)) < BOUNDS[torch.float64]


def test_attention_refuses_more_keys_than_queries() -> None:
    given = random_inputs()
    args = (given["q"][:, :, 1:], given["k"], given["v"], padded(0, 0), None)
    with pytest.raises(ValueError, match="6 queries to 7 keys"):
        ATTENTION(*args, *SETTINGS["causal"])


# Every mix of batched and shared, as vmapped dims that are not all in front.
MIXES = [
    [dim if batched else None for dim, batched in zip((0, 2, 1, 1, 1), mix, strict=True)]
    for mix in itertools.product([True, False], repeat=5)
    if any(mix)
]


@pytest.mark.parametrize("setting", ["causal", "window", "softcap"])
def test_vmapped_attention_matches_loop_in_all_mixes(setting: str) -> None:
    per_rank, shared = random_inputs(R), random_inputs()
    per_rank["valid"] = torch.stack([padded(rank, 0) for rank in range(R)])
    shared["valid"] = padded(0, 2)
    names = ("q", "k", "v", "valid", "sinks")

    def attend(*args: Any) -> Tensor:
        return ATTENTION(*args, *SETTINGS[setting])

    for mix, with_sinks in itertools.product(MIXES, (True, False)):
        dims = [*mix[:4], mix[4] if with_sinks else None]
        if all(dim is None for dim in dims):
            continue
        args = [
            shared[name] if dim is None else per_rank[name].movedim(0, dim).contiguous()
            for name, dim in zip(names, dims, strict=True)
        ]
        args[4] = args[4] if with_sinks else None
        out = torch.vmap(attend, tuple(dims))(*args)
        assert rel_err(out, over_ranks(attend, args, dims)) < 1e-13, dims


def test_vmapped_attention_nests() -> None:
    given = random_inputs(2, R)

    def attend(*args: Tensor) -> Tensor:
        return ATTENTION(*args[:3], padded(2, 0), args[3], *SETTINGS["causal"])

    out = torch.vmap(torch.vmap(attend))(*given.values())
    parts = [over_ranks(attend, [x[i] for x in given.values()], [0] * 4) for i in range(2)]
    assert rel_err(out, torch.stack(parts)) < 1e-13


# ---- gradients of attention


def loss_of(attention: Callable[..., Tensor], setting: str) -> Callable[..., Tensor]:
    """(q, k, v, sinks or nothing) -> a scalar in which every entry of the output counts."""
    weights = torch.randn(B, S, H, V, generator=torch.Generator().manual_seed(6)).double()

    def loss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        out = attention(q, k, v, padded(2, 1), sinks, *SETTINGS[setting])
        return (out * weights + out**2).sum()

    return loss


def gradients(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves), leaves)


GRADIENT_CASES = [
    pytest.param(setting, count, id=f"{setting}-{'sinks' if count == 4 else 'plain'}")
    for setting in ("causal", "full", "window", "softcap")
    for count in (3, 4)
]


@pytest.mark.parametrize(("setting", "count"), GRADIENT_CASES)
def test_gradient_matches_plain_under_every_transform(setting: str, count: int) -> None:
    inputs = list(random_inputs(R).values())[:count]
    loss, numbers = loss_of(ATTENTION, setting), tuple(range(count))
    plain = [gradients(loss_of(attend_plainly, setting), [x[r] for x in inputs]) for r in range(R)]
    expected = [torch.stack(parts) for parts in zip(*plain, strict=True)]

    def summed(*args: Tensor) -> Tensor:
        return torch.vmap(loss)(*args).sum()

    compiled = torch.compile(summed, backend="aot_eager", fullgraph=True)
    found = {
        "backward": [
            torch.stack(parts)
            for parts in zip(
                *(gradients(loss, [x[r] for x in inputs]) for r in range(R)), strict=True
            )
        ],
        "backward of vmap": gradients(summed, inputs),
        "grad of vmap": torch.func.grad(summed, numbers)(*inputs),
        "vmap of grad": torch.vmap(torch.func.grad(loss, numbers))(*inputs),
        "compiled": gradients(compiled, inputs),
    }
    for how, grads in found.items():
        for grad, wanted in zip(grads, expected, strict=True):
            assert rel_err(grad, wanted) < 1e-10, how


def test_gradient_of_shared_inputs_sums_over_ranks() -> None:
    per_rank, shared = random_inputs(R), random_inputs()
    loss, plain = loss_of(ATTENTION, "causal"), loss_of(attend_plainly, "causal")
    inputs = [per_rank["q"], shared["k"], shared["v"], shared["sinks"]]
    dims = (0, None, None, None)
    found = gradients(lambda *args: torch.vmap(loss, dims)(*args).sum(), inputs)
    wanted = gradients(lambda *args: over_ranks(plain, args, dims).sum(), inputs)
    for grad, other in zip(found, wanted, strict=True):
        assert rel_err(grad, other) < 1e-10


def test_vmapped_backward_keeps_gradients_of_shared_inputs_per_rank() -> None:
    per_rank, shared = random_inputs(R), random_inputs()
    loss = torch.func.grad(loss_of(ATTENTION, "causal"), (1, 3))
    rest = [shared[name] for name in ("k", "v", "sinks")]
    found = torch.vmap(loss, (0, None, None, None))(per_rank["q"], *rest)
    for rank in range(R):
        wanted = gradients(loss_of(attend_plainly, "causal"), [per_rank["q"][rank], *rest])
        assert rel_err(found[0][rank], wanted[1]) < 1e-10
        assert rel_err(found[1][rank], wanted[3]) < 1e-10


def test_gradient_under_two_vmaps_matches_plain() -> None:
    inputs = list(random_inputs(2, R).values())
    loss = torch.func.grad(loss_of(ATTENTION, "causal"), (0, 1, 2, 3))
    found = torch.vmap(torch.vmap(loss))(*inputs)
    for i, rank in itertools.product(range(2), range(R)):
        wanted = gradients(loss_of(attend_plainly, "causal"), [x[i, rank] for x in inputs])
        for grad, other in zip(found, wanted, strict=True):
            assert rel_err(grad[i, rank], other) < 1e-10


def test_gradient_keeps_dtype_in_bfloat16() -> None:
    given = list(random_inputs(dtype=torch.bfloat16).values())
    found = gradients(lambda *args: loss_of(ATTENTION, "causal")(*args).float(), given)
    wanted = gradients(loss_of(attend_plainly, "causal"), [x.double() for x in given])
    for grad, other in zip(found, wanted, strict=True):
        assert grad.dtype == torch.bfloat16
        assert rel_err(grad.double(), other) < 5e-2  # several sums of bfloat16 values in a row


def test_second_gradient_is_refused() -> None:
    q, k, v, _ = random_inputs().values()
    loss = loss_of(ATTENTION, "causal")
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x, k, v).sum())(q)


@pytest.mark.parametrize("sinks", [None, torch.randn(H).double()], ids=["plain", "sinks"])
def test_operators_pass_opcheck(sinks: Tensor | None) -> None:
    given = random_inputs()
    q, k, v = (given[name].requires_grad_() for name in "qkv")
    rest = (padded(1, 0), sinks, *SETTINGS["window"])
    torch.library.opcheck(ATTENTION, (q, k, v, *rest))
    fixed = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(ATTENTION_BACKWARD, (torch.ones(B, S, H, V).double(), *fixed, *rest))
    torch.library.opcheck(SYNC, (torch.randn(3, 4).mT.requires_grad_(), "attn.0"))
    torch.library.opcheck(GATHER, (torch.randn(3, 4, requires_grad=True), -1))


# ---- what ranks exchange


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


# ---- replacements of operators whose own vmap rules freeze sizes


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


# ---- compiled


class Counting:
    """A backend of torch.compile that counts compilations and runs the graph as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.count += 1
        return module.forward


WIDTH, HEAD = 12, 4  # of the model, of a head


def rotated(x: Tensor) -> Tensor:
    """x [B, H, S, D], turned by its position."""
    angles = torch.arange(x.shape[2])[:, None] * torch.tensor([0.5, 0.1]).double()
    cos, sin = (CAT([f(angles), f(angles)], -1) for f in (torch.cos, torch.sin))
    half = HEAD // 2
    return x * cos + CAT([-x[..., half:], x[..., :half]], -1) * sin


def block(x: Tensor, valid: Tensor, params: dict[str, Tensor]) -> Tensor:
    """One rank of an attention layer with a sync, a gather and a take; x [B, S, C]."""
    normed = LAYER_NORM(x, [WIDTH], params["norm"], None)
    q, k, v = (
        F.linear(normed, params[name]).unflatten(-1, (-1, HEAD)).transpose(1, 2) for name in "qkv"
    )
    heads = ATTENTION(rotated(q), rotated(k), v, valid, params["sinks"], 0.5, True, 3, 0.0)
    x = x + SYNC(F.linear(heads.flatten(2), params["out"]), "attn.0")
    shard = SDPA(
        *(TAKE(x, params["index"], 2, WIDTH).unsqueeze(1) for _ in range(3)), is_causal=True
    )
    return GATHER(shard.squeeze(1), -1)


def block_of(num_ranks: int) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The block over ranks, (x, valid, params) -> [B, S, C], and its parameters."""
    shapes = {"q": (2 * HEAD, WIDTH), "k": (HEAD, WIDTH), "v": (HEAD, WIDTH), "sinks": (2,)}
    shapes |= {"out": (WIDTH, 2 * HEAD)}
    params = {name: torch.randn(num_ranks, *shape).double() for name, shape in shapes.items()}
    params["norm"] = torch.randn(WIDTH).double()
    params["index"] = torch.randperm(WIDTH).reshape(num_ranks, -1)
    # As parameters they have static sizes for torch.compile, as the weights of a model have.
    params = {
        name: torch.nn.Parameter(x, requires_grad=x.is_floating_point())
        for name, x in params.items()
    }
    dims = {name: None if name == "norm" else 0 for name in params}
    return torch.vmap(block, (None, None, dims), out_dims=None), params


def block_inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    valid = torch.ones(batch, length, dtype=torch.int64)
    valid[0, : length // 3] = 0
    return torch.randn(batch, length, WIDTH).double(), valid


def test_compiled_block_keeps_sizes_dynamic() -> None:
    function, params = block_of(3)
    backend = Counting()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for batch, length in ((5, 11), (3, 5), (3, 9), (3, 17)):
        inputs = block_inputs(batch, length)
        assert rel_err(compiled(*inputs, params), function(*inputs, params)) < 1e-12
    assert backend.count == 1


@pytest.mark.parametrize("name", ["cat", "layer_norm", "attention", "backward"])
def test_each_rule_keeps_sizes_dynamic(name: str) -> None:
    def backward(x: Tensor) -> Tensor:
        heads, valid = x.transpose(1, 2), x.new_ones(x.shape[0], x.shape[1])
        rest = (valid, None, 0.5, True, 0, 0.0)
        return ATTENTION_BACKWARD(x.detach(), heads, heads, heads, *rest)[0]

    function = {
        "cat": lambda x: CAT([x, x[..., :2]], -1),
        "layer_norm": lambda x: LAYER_NORM(x, [6]),
        "attention": lambda x: SDPA(x.transpose(1, 2), x.transpose(1, 2), x.transpose(1, 2)),
        "backward": backward,
    }[name]
    backend, mapped = Counting(), torch.vmap(function)
    compiled = torch.compile(mapped, backend=backend, fullgraph=True, dynamic=True)
    for batch, length in ((5, 11), (3, 5), (3, 9), (3, 17)):
        x = torch.randn(R, batch, length, 4, 6)
        assert rel_err(compiled(x), mapped(x)) < 1e-5
    assert backend.count == 1


def test_counting_sees_recompilation() -> None:
    function, params = block_of(3)
    backend = Counting()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    for length in (5, 9):
        compiled(*block_inputs(3, length), params)
    assert backend.count == 2


@pytest.mark.slow
def test_compiled_block_trains_under_inductor() -> None:
    function, params = block_of(2)
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    leaves = [x for x in params.values() if x.requires_grad]
    for batch, length in ((5, 11), (3, 9)):
        x, valid = block_inputs(batch, length)
        x.requires_grad_()
        out, wanted = compiled(x, valid, params), function(x, valid, params)
        assert rel_err(out, wanted) < 1e-12
        found = torch.autograd.grad((out**2).sum(), [x, *leaves])
        others = torch.autograd.grad((wanted**2).sum(), [x, *leaves])
        for grad, other in zip(found, others, strict=True):
            assert rel_err(grad, other) < 1e-10


def test_block_agrees_with_loop_over_ranks() -> None:
    function, params = block_of(3)
    x, valid = block_inputs(2, 5)
    normed = F.layer_norm(x, [WIDTH], params["norm"])
    summed = x.clone()
    for rank in range(3):
        q, k, v = (
            F.linear(normed, params[name][rank]).unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for name in "qkv"
        )
        settings = (params["sinks"][rank], 0.5, True, 3, 0.0)
        heads = attend_plainly(rotated(q), rotated(k), v, valid, *settings)
        summed = summed + F.linear(heads.flatten(2), params["out"][rank])
    shards = [summed[..., index].unsqueeze(1) for index in params["index"]]
    attended = [F.scaled_dot_product_attention(x, x, x, is_causal=True) for x in shards]
    wanted = torch.cat([x.squeeze(1) for x in attended], -1)
    assert rel_err(function(x, valid, params), wanted) < 1e-12
