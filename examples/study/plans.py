"""Sets of sync points over attention and MLP alike; a point is counted from 0 to 2L - 1."""

from __future__ import annotations

from examples.study.context import ATTENTION, MLP
from spdcompile.plan import Point

Points = frozenset[Point]


def point(number: int) -> Point:
    """The sync point with a number, in program order: attention, MLP, attention, ..."""
    return number // 2, (ATTENTION, MLP)[number % 2]


def one_sync_per(sublayers: int, num_layers: int) -> Points:
    """Only each so-many-th sync point is kept, and the last one."""
    total = 2 * num_layers
    return frozenset(
        point(number)
        for number in range(total - 1)  # the last one cannot be dropped
        if (number + 1) % sublayers
    )


def mlp_points(num_layers: int, step: int = 1) -> Points:
    """Each `step`-th MLP point but the last block's."""
    return frozenset((layer, MLP) for layer in range(step - 1, num_layers - 1, step))


def inner_attention(num_layers: int) -> Points:
    """The attention points of all blocks but the first and the last."""
    return frozenset((layer, ATTENTION) for layer in range(1, num_layers - 1))


def run_of(count: int, num_layers: int) -> Points:
    """A run of sync points one after the other, up to the last one, which is kept."""
    last = 2 * num_layers - 1
    return frozenset(point(number) for number in range(max(last - count, 0), last))


def beyond(num_layers: int) -> dict[str, Points]:
    """Name -> plans that the paper does not have, from few points to all but the last."""
    second = inner_attention(num_layers) | mlp_points(num_layers, 2)
    return {
        "every second MLP": mlp_points(num_layers, 2),
        "every MLP but the last": mlp_points(num_layers),
        "run of 4 points at the end": run_of(4, num_layers),
        "run of 8 points at the end": run_of(8, num_layers),
        "inner attention, every second MLP": second,
        "one sync per 2 sub-layers": one_sync_per(2, num_layers),
        "one sync per 4 sub-layers": one_sync_per(4, num_layers),
        "one sync per 8 sub-layers": one_sync_per(8, num_layers),
        "one sync per 4, block 0's attention kept": one_sync_per(4, num_layers) - {point(0)},
        "only the last one kept": one_sync_per(2 * num_layers, num_layers),
    }
