"""Sample calls for the operators that move data; shape letters as in rule_samples.py."""

from __future__ import annotations

import torch

from tests.passes.rule_samples import END, m, x
from tests.passes.sample import Sample

aten = torch.ops.aten

VIEWS = (
    # Heads split off and merged; fused and per-head interleaved q, k, v.
    Sample(aten.reshape.default, lambda b, s: (x(b, s, 12), [b, s, 4, 3])),
    Sample(aten.reshape.default, lambda b, s: (x(b, s, 12), [b, s, -1, 3])),
    Sample(aten.reshape.default, lambda b, s: (x(b, s, 4, 3), [b, s, 12])),
    Sample(aten.reshape.default, lambda b, s: (x(b, s, 4, 3), [b, s, -1])),
    Sample(aten.reshape.default, lambda b, s: (x(b, s, 36), [b, s, 3, 6, 2])),
    Sample(aten.reshape.default, lambda b, s: (x(b, s, 36), [b, s, 6, 3, 2])),
    Sample(aten.reshape.default, lambda b, s: (x(b, s, 3, 6, 2), [b, s, 36])),
    Sample(aten.reshape.default, lambda b, s: (x(b, s, 6, 3, 2), [b, s, 6, 6])),
    # The batch folded into the heads, and out again.
    Sample(aten.reshape.default, lambda b, s: (x(b, 4, s, 6), [b * 4, s, 6])),
    Sample(aten.reshape.default, lambda b, s: (x(b * 4, s, 6), [b, 4, s, 6])),
    Sample(aten.reshape.default, lambda b, s: (x(b * 4, s, 6), [b, -1, s, 6])),
    Sample(aten.reshape.default, lambda b, s: (x(b, 4, s, 6), [b * 4, -1, 6])),
    Sample(aten.reshape.default, lambda b, s: (x(b, s, 12), [b * s, 12])),
    Sample(aten.reshape.default, lambda b, s: (x(b, s, 12), [-1, 6])),
    Sample(aten.flatten.using_ints, lambda b, s: (x(b, s, 4, 3), 2)),
    Sample(aten.flatten.using_ints, lambda b, s: (x(b, s, 12), 0, 1)),
    Sample(aten.unflatten.int, lambda b, s: (x(b, s, 12), -1, [4, 3])),
    Sample(aten.unflatten.int, lambda b, s: (x(b, s, 12), 2, [-1, 2])),
    Sample(aten.unflatten.int, lambda b, s: (x(b, s, 12), 2, [2, -1])),
    Sample(aten.unsqueeze.default, lambda b, s: (x(b, s, 4, 6), 2)),
    Sample(aten.unsqueeze.default, lambda b, s: (x(b, s, 6), -1)),
    Sample(aten.squeeze.dim, lambda b, s: (x(b, s, 1, 6), 2)),
    Sample(aten.squeeze.dim, lambda b, s: (x(b, s, 2, 3), 2)),
    Sample(aten.squeeze.dim, lambda b, s: (x(b, s, 6), 1), out_shape=(1, 1, 6)),
    Sample(aten.squeeze.default, lambda b, s: (x(3, 1, 2),)),
    Sample(aten.squeeze.default, lambda b, s: (x(b, s, 6),), out_shape=(1, 1, 6)),
)

ORDERS = (
    Sample(aten.transpose.int, lambda b, s: (x(b, s, 4, 6), 1, 2)),
    Sample(aten.transpose.int, lambda b, s: (x(b, 4, s, 6), -1, -2)),
    Sample(aten.permute.default, lambda b, s: (x(b, s, 4, 6), [0, 2, 3, 1])),
    Sample(aten.t.default, lambda b, s: (x(4, 6),)),
    Sample(aten.numpy_T.default, lambda b, s: (x(4, 6),)),
    Sample(aten.contiguous.default, lambda b, s: (x(b, s, 4, 6),)),
    Sample(aten.clone.default, lambda b, s: (x(b, s, 6),)),
    Sample(aten.alias.default, lambda b, s: (x(b, s, 6),)),
    Sample(aten.detach.default, lambda b, s: (x(b, s, 6),)),
    Sample(aten.dropout.default, lambda b, s: (x(b, s, 6), 0.5, False)),
)

COPIES = (
    Sample(aten.expand.default, lambda b, s: (x(b, 2, 1, s, 3), [b, 2, 2, s, 3])),
    Sample(aten.expand.default, lambda b, s: (x(b, 6, 1, s), [-1, -1, 2, -1])),
    Sample(aten.expand.default, lambda b, s: (x(6, 1), [b, s, 6, 4])),
    Sample(aten.expand.default, lambda b, s: (m(b, 1, s, s), [b, 4, s, s])),
    Sample(aten.broadcast_to.default, lambda b, s: (x(6, 1), [b, 6, 4])),
    Sample(aten.repeat.default, lambda b, s: (x(b, s, 6), [1, 1, 2])),
    Sample(aten.repeat.default, lambda b, s: (x(2, 3), [4, 1, 2])),
    Sample(aten.repeat_interleave.self_int, lambda b, s: (x(b, 2, s, 3), 2, 1)),
    Sample(aten.repeat_interleave.self_int, lambda b, s: (x(b, s, 6), 2, -1)),
)

CUTS = (
    # A fused [q | k | v] cut in every way; halves of a head; a dim with the batch folded in.
    Sample(aten.slice.Tensor, lambda b, s: (x(b, s, 12), 2, 0, 6)),
    Sample(aten.slice.Tensor, lambda b, s: (x(b, s, 12), 2, 6, END)),
    Sample(aten.slice.Tensor, lambda b, s: (x(b, s, 12), -1, 4, 8)),
    Sample(aten.slice.Tensor, lambda b, s: (x(b, s, 12), 2, -6, None)),
    Sample(aten.slice.Tensor, lambda b, s: (x(b, s, 12), 2, None, -6)),
    Sample(aten.slice.Tensor, lambda b, s: (x(b, s, 12), 2, 0, END, 2)),
    Sample(aten.slice.Tensor, lambda b, s: (x(b, s, 12), 2)),
    Sample(aten.slice.Tensor, lambda b, s: (x(b, s, 12), 2, 8, 10), runs=(8, 2, 2)),
    Sample(aten.slice.Tensor, lambda b, s: (x(b, 4, s, 6), 3, 3, END)),
    Sample(aten.slice.Tensor, lambda b, s: (x(b, s, 6), 1, 0, END)),
    Sample(aten.slice.Tensor, lambda b, s: (x(b * 4, s, 6), 0, 0, END)),
    Sample(aten.select.int, lambda b, s: (x(b, s, 3, 4), 2, 1)),
    Sample(aten.select.int, lambda b, s: (x(b, s, 4, 3), -1, -1)),
    Sample(aten.narrow.default, lambda b, s: (x(b, s, 12), 2, 6, 6)),
    Sample(aten.narrow.default, lambda b, s: (x(b, s, 12), -1, -4, 4)),
    Sample(aten.narrow.default, lambda b, s: (x(b, s, 12), 2, 8, 2), runs=(8, 2, 2)),
    Sample(aten.split.Tensor, lambda b, s: (x(b, s, 12), 6, -1)),
    Sample(aten.split.Tensor, lambda b, s: (x(b, s, 12), 4, 2)),
    Sample(aten.split.Tensor, lambda b, s: (x(b, s, 12), 8, 2), runs=(8, 4)),
    Sample(aten.split.Tensor, lambda b, s: (x(6, 4), 2)),
    Sample(aten.split_with_sizes.default, lambda b, s: (x(b, s, 12), [6, 6], -1)),
    Sample(aten.split_with_sizes.default, lambda b, s: (x(b, s, 12), [4, 4, 4], 2)),
    Sample(aten.split_with_sizes.default, lambda b, s: (x(b, s, 12), [8, 2, 2], 2), runs=(8, 2, 2)),
    Sample(aten.split_with_sizes.default, lambda b, s: (x(b, s, 12), [6, 3, 3], 2), runs=(6, 3, 3)),
    Sample(aten.split_with_sizes.default, lambda b, s: (x(b, 4, s, 6), [2, 4], -1)),
    Sample(aten.chunk.default, lambda b, s: (x(b, s, 12), 2, -1)),
    Sample(aten.chunk.default, lambda b, s: (x(b, s, 12), 3, 2)),
    Sample(aten.chunk.default, lambda b, s: (x(b, s, 10), 3, 2), runs=(4, 4, 2)),
    Sample(aten.chunk.default, lambda b, s: (x(b, 4, s, 6), 2, -1)),
    Sample(aten.unbind.int, lambda b, s: (x(b, s, 3, 4), 2)),
    Sample(aten.unbind.int, lambda b, s: (x(3, 4),)),
)

JOINS = (
    Sample(aten.cat.default, lambda b, s: ([x(b, s, 6), x(b, s, 6)], -1)),
    Sample(aten.cat.default, lambda b, s: ([x(b, s, 6), x(b, s, 4)], 2)),
    Sample(aten.cat.default, lambda b, s: ([x(b, 4, s, 6), x(b, 4, s, 3)], -1)),
    Sample(aten.cat.default, lambda b, s: ([x(b, s, 6), x(b, s, 6)], 1)),
    Sample(aten.cat.default, lambda b, s: ([x(4, 2), x(2, 2), x(2, 2)],)),
    Sample(aten.stack.default, lambda b, s: ([x(b, s, 6), x(b, s, 6)], -1)),
    Sample(aten.stack.default, lambda b, s: ([x(b, s, 6), x(b, s, 6)], 2)),
)

MOVEMENT = (*VIEWS, *ORDERS, *COPIES, *CUTS, *JOINS)
