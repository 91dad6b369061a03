"""Operators inside compiled blocks.

Shapes: R ranks, B batch, S tokens, H query heads, G KV heads, D width of a query head, V of a value
head, C width of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spdcompile.passes.ops import ATTENTION, GATHER, SYNC, TAKE
from spdcompile.runtime.attention import ATTENTION_BACKWARD
from tests.compare import rel_err
from tests.runtime.operator_cases import (
    CAT,
    LAYER_NORM,
    SDPA,
    R,
    attend_plainly,
)

pytestmark = pytest.mark.usefixtures("reproducible")


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
