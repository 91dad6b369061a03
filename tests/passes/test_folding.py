"""What a movement of data does at batch and length 1, it does at every size, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spdcompile.passes.layout import EVERY, Layout
from spdcompile.passes.placement.folding import keeps_layouts
from spdcompile.passes.placement.types import Call, Operand, R, Shard

aten = torch.ops.aten
HEADS, BATCH, LENGTH = 4, 3, 5


def heads(dim: int, runs: int = 1, every: int = 0) -> Shard:
    """Two units of two heads each, `runs` times, and what every rank holds."""
    owners = [*np.tile(np.arange(HEADS) // 2, runs), *[EVERY] * every]
    return Shard(dim, Layout("attn", 2, np.array(owners)))


def holds(
    target: Callable[..., Any], shape: tuple[int, ...], given: Any, out: Any, *args: Any
) -> bool:
    """The answer for `target(x, *args)`."""
    moved = target(torch.zeros(shape), *args)
    out_shape = tuple(moved.shape) if isinstance(moved, Tensor) else ()
    return keeps_layouts(Call(target, (Operand(shape, given), *args), {}, out_shape), out, {})


@pytest.mark.parametrize(
    ("shape", "given", "sizes", "out", "expected"),
    [
        ((BATCH, HEADS, LENGTH), heads(1), [BATCH * HEADS, LENGTH], heads(0), True),
        ((BATCH * HEADS, LENGTH), heads(0), [BATCH, HEADS, LENGTH], heads(1), True),
        ((BATCH, LENGTH, HEADS, 1), heads(2), [BATCH * LENGTH, HEADS], heads(1), True),
        ((BATCH, HEADS, LENGTH), heads(1), [BATCH, HEADS * LENGTH], heads(1), False),
        ((BATCH, HEADS, LENGTH, 8), heads(1), [-1, 8], heads(0), False),
        # At batch and length 1 the same as the first: here the heads become tokens.
        ((BATCH, LENGTH, HEADS), heads(2), [BATCH, HEADS, LENGTH], heads(1), False),
        ((BATCH * HEADS, LENGTH), heads(0), [HEADS, BATCH, LENGTH], heads(0), False),
    ],
)
def test_folding(
    shape: tuple[int, ...], given: Shard, sizes: list[int], out: Shard, expected: bool
) -> None:
    assert holds(aten.reshape.default, shape, given, out, sizes) is expected


def test_pieces_of_a_folded_dim_are_no_pieces_of_each_layout() -> None:
    given, out = heads(1, every=2), [heads(1), R]
    cut = aten.split_with_sizes.default
    assert holds(cut, (BATCH, 6), given, out, [HEADS, 2], 1)
    assert not holds(cut, (1, BATCH * 6), given, out, [BATCH * HEADS, BATCH * 2], 1)
