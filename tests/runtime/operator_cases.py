"""Inputs and plain versions of the operators, written out, for the tests beside this file.

Shapes: R ranks, B batch, S tokens, H query heads, G KV heads, D width of a query head, V of a value
head, C width of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spdcompile.runtime.ops import VMAP_REPLACEMENTS

R, B, S, H, G, D, V = 3, 2, 7, 4, 2, 6, 5
CAT, LAYER_NORM, SDPA = VMAP_REPLACEMENTS.values()

# Relative to the largest entry: rounding of sums of at most 7 products, and of the weights to
# bfloat16 (2^-8) in its case.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}

# scale, causal, window, softcap and, where there are chunks, their size
SETTINGS = {
    "causal": (0.4, True, 0, 0.0),
    "full": (0.4, False, 0, 0.0),
    "window": (0.4, True, 3, 0.0),
    "window-full": (0.4, False, 2, 0.0),
    "window-of-one": (0.4, True, 1, 0.0),
    "window-longer": (0.4, True, 50, 0.0),
    "softcap": (0.9, True, 0, 1.5),
    "softcap-window": (0.9, True, 4, 1.5),
    "chunk": (0.4, True, 0, 0.0, 3),
    "chunk-longer": (0.4, True, 0, 0.0, 50),
    "chunk-softcap": (0.9, True, 0, 1.5, 2),
}
PADDINGS = {"none": (0, 0), "left": (3, 0), "right": (0, 2), "both": (2, 2), "all": (S, 0)}


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, sinks: Tensor | None, *settings: Any
) -> Tensor:
    """Attention row by row over the columns that the row sees -> [B, S, H, V]."""
    scale, causal, window, softcap, chunk = (*settings, 0)[:5]
    padding = [[*row.bool().tolist(), True].index(True) for row in valid]
    rows = []
    for b, i, h in itertools.product(range(q.shape[0]), range(q.shape[2]), range(q.shape[1])):
        seen = [
            j
            for j in range(k.shape[2])
            if i == j
            or (
                valid[b, j]
                and (not causal or j <= i)
                and (window == 0 or i - j < window)
                and (chunk == 0 or (j - padding[b]) // chunk == (i - padding[b]) // chunk)
            )
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


def gradients(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves), leaves)
