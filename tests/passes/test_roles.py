"""Which projections are split by rows where several could be."""

from __future__ import annotations

import torch

from spdcompile.passes.regions import FindRegions
from tests.passes.graphs import CHANNELS, HIDDEN, Block

aten = torch.ops.aten


def test_split_that_comes_to_nothing_leaves_its_feeder_free() -> None:
    """h = x * up(down(x)); y = whole(h) + out(inner(h)).

    `whole` could be split by the features of h, but `inner`, which feeds `out`, reads them whole.
    So `up` feeds no split, and is split by its own input.
    """
    block = Block()
    shapes = {
        "down": (CHANNELS, HIDDEN),
        "up": (HIDDEN, CHANNELS),
        "whole": (HIDDEN, HIDDEN),
        "inner": (CHANNELS, HIDDEN),
        "out": (HIDDEN, CHANNELS),
    }
    weights = {name: block.param(name, *shape) for name, shape in shapes.items()}

    def linear(x: torch.fx.Node, name: str) -> torch.fx.Node:
        return block.call(aten.linear.default, x, weights[name], at=name)

    mixed = linear(block.call(aten.relu.default, linear(block.x, "down")), "up")
    hidden = block.call(aten.mul.Tensor, block.x, mixed)
    result = block.add(linear(hidden, "whole"), linear(linear(hidden, "inner"), "out"))
    found = FindRegions(2)(block.program(result))
    regions = found.program.graphs["block"].regions
    pairs = [(list(region.columns), list(region.rows)) for region in regions]
    assert pairs == [(["down"], ["up"]), (["inner"], ["out"])]
    assert {refusal.subject.rpartition(".")[2] for refusal in found.refusals} == {"whole"}
