"""How the linear that makes the logits is split: by its features, the vocabulary."""

from __future__ import annotations

from dataclasses import replace

import torch

from spdcompile.passes.regions import FindRegions
from tests.passes.graphs import HIDDEN, Block

aten = torch.ops.aten


def test_head_behind_a_gate_is_split_by_the_vocabulary() -> None:
    """head(x * sigmoid(gate(x))): the gate's features could feed a head that is split by rows."""
    block = Block()
    gate, head = block.param("gate", HIDDEN, HIDDEN), block.param("head", 20, HIDDEN)
    gates = block.call(aten.sigmoid.default, block.call(aten.linear.default, block.x, gate))
    gated = block.call(aten.mul.Tensor, block.x, gates)
    program = block.program(block.call(aten.linear.default, gated, head, at="head"))
    (part,) = program.parts
    program = replace(program, parts=(replace(part, outputs=(program.output,)),))
    found = FindRegions(2)(program)
    (region,) = found.program.graphs["block"].regions
    assert (region.name, list(region.columns), list(region.rows)) == ("head", ["head"], [])
    (refused,) = found.refusals
    assert "reads them whole" in refused.reason
