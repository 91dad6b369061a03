"""Gradients of attention, under every transform.

Shapes: R ranks, B batch, S tokens, H query heads, G KV heads, D width of a query head, V of a value
head, C width of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spdcompile.passes.ops import ATTENTION, GATHER, SYNC
from spdcompile.runtime.attention import ATTENTION_BACKWARD
from tests.compare import rel_err
from tests.runtime.operator_cases import (
    SETTINGS,
    B,
    H,
    R,
    S,
    V,
    attend_plainly,
    gradients,
    over_ranks,
    padded,
    random_inputs,
)

pytestmark = pytest.mark.usefixtures("reproducible")


def loss_of(attention: Callable[..., Tensor], setting: str) -> Callable[..., Tensor]:
    """(q, k, v, sinks or nothing) -> a scalar in which every entry of the output counts."""
    weights = torch.randn(B, S, H, V, generator=torch.Generator().manual_seed(6)).double()

    def loss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        out = attention(q, k, v, padded(2, 1), sinks, *SETTINGS[setting])
        return (out * weights + out**2).sum()

    return loss


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
