"""Sample calls for every operator that has a placement rule.

Shape letters: b batch, s sequence length (both 1 where a rule looks); numbers are channels.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import Tensor

from spdcompile.passes.ops import ATTENTION, GROUPED_MM
from tests.passes.sample import Sample

aten = torch.ops.aten
END = sys.maxsize


def x(*shape: int) -> Tensor:
    """Floating values."""
    return torch.randn(shape, dtype=torch.float64)


def i(*shape: int) -> Tensor:
    """Small integers."""
    return torch.randint(-2, 3, shape)


def m(*shape: int) -> Tensor:
    """A mask."""
    return torch.rand(shape) < 0.5


def kept(b: int, s: int) -> Tensor:
    """A padding mask that leaves out the last token."""
    return (torch.arange(s) < max(s - 1, 1)).expand(b, s)


def attend(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, sinks: Tensor | None, *settings: Any
) -> Tensor:
    """Attention written out: q [B, H, S, D], k and v [B, Hkv, T, D], valid [B, T]."""
    scale, causal, window, softcap = settings
    repeats = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeats, 1).transpose(-1, -2) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    seen = valid[:, None, None, :].bool()
    if causal:
        seen = seen & (distance >= 0)
    if window:
        seen = seen & (distance < window)
    scores = scores.masked_fill(~seen, -1e9)
    if sinks is not None:
        sinks_BHS1 = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks_BHS1], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v.repeat_interleave(repeats, 1)).transpose(1, 2)


def multiply_groups(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """A mixture of experts row by row: rows [N, K], weight [E, K, J], ends [E]."""
    groups = (ends[None, :] <= torch.arange(len(rows))[:, None]).sum(1)
    return (rows[:, :, None] * weight[groups]).sum(1)


_FUNCTIONS = (
    *(aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default),
    *(aten.tanh.default, aten.exp.default, aten.neg.default),
    *(aten.cos.default, aten.sin.default, aten.abs.default, aten.square.default),
    *(aten.reciprocal.default, aten.expm1.default),
    *(aten.erf.default, aten.softplus.default, aten.floor.default, aten.hardtanh.default),
    *(aten.leaky_relu.default, aten.elu.default, aten.mish.default, aten.relu6.default),
    *(aten.log_sigmoid.default, aten.sign.default, aten.ceil.default, aten.round.default),
    *(aten.trunc.default, aten.exp2.default, aten.hardsigmoid.default),
    *(aten.hardswish.default, aten.celu.default, aten.selu.default),
)
_OF_POSITIVE = (
    *(aten.rsqrt.default, aten.sqrt.default, aten.log.default, aten.log1p.default),
    *(aten.log2.default,),
)
_WITH_NUMBER = (
    *(aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar),
    *(aten.pow.Tensor_Scalar, aten.remainder.Scalar, aten.rsub.Scalar),
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor),
    *(aten.mul.Scalar, aten.div.Scalar, aten.clamp.default),
    *(aten.add.Scalar, aten.sub.Scalar, aten.fmod.Scalar, aten.floor_divide.Scalar),
    *(aten.clamp_min.default, aten.clamp_max.default),
)
_OF_TWO = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor),
    *(aten.maximum.default, aten.minimum.default),
    *(aten.floor_divide.default, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor),
    *(aten.ge.Tensor, aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor),
    *(aten.remainder.Tensor, aten.fmod.Tensor, aten.atan2.default, aten.rsub.Tensor),
)
_OF_TWO_INTEGERS = (
    *(aten.__and__.Tensor, aten.__or__.Tensor, aten.bitwise_and.Tensor),
    *(aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor, aten.logical_and.default),
    *(aten.logical_or.default, aten.logical_xor.default, aten.eq.Tensor, aten.ne.Tensor),
)
_WITH_INTEGER = (*(aten.eq.Scalar, aten.ne.Scalar, aten.bitwise_and.Scalar, aten.__and__.Scalar),)
_CASTS = {
    aten.to.dtype: ((torch.float32,), {}),
    aten.to.device: ((torch.device("cpu"), torch.float32), {}),
    aten.to.dtype_layout: ((), {"dtype": torch.float32, "layout": torch.strided}),
    aten._to_copy.default: ((), {"dtype": torch.float32}),
}

POINTWISE = (
    *(Sample(op, lambda b, s: (x(b, s, 6),)) for op in _FUNCTIONS),
    *(Sample(op, lambda b, s: (x(b, s, 6).exp(),)) for op in _OF_POSITIVE),
    *(Sample(op, lambda b, s: (x(b, s, 4, 6), 2)) for op in _WITH_NUMBER),
    *(Sample(op, lambda b, s: (i(b, s, 6), 2)) for op in _WITH_INTEGER),
    *(Sample(op, lambda b, s: (x(b, s, 4, 6), x(b, s, 4, 6))) for op in _OF_TWO),
    *(Sample(op, lambda b, s: (x(b, s, 4, 6), x(6))) for op in _OF_TWO),
    *(Sample(op, lambda b, s: (x(b, 1, 1, 6), x(b, s, 4, 1))) for op in _OF_TWO),
    *(Sample(op, lambda b, s: (x(), x(s, 6))) for op in _OF_TWO),
    *(Sample(op, lambda b, s: (i(b, s, 6), i(b, s, 6))) for op in _OF_TWO_INTEGERS),
    *(Sample(op, lambda b, s: (i(4, 1), i(b, s, 1, 6))) for op in _OF_TWO_INTEGERS),
    *(
        Sample(op, lambda b, s, more=more: (x(b, s, 6), *more), kwargs)
        for op, (more, kwargs) in _CASTS.items()
    ),
    Sample(aten.add.Tensor, lambda b, s: (x(b, s, 6), x(b, s, 6)), {"alpha": 2.0}),
    Sample(aten.pow.Tensor_Scalar, lambda b, s: (x(b, s, 6), 3)),
    Sample(aten.pow.Tensor_Tensor, lambda b, s: (x(b, s, 4, 6).exp(), x(6))),
    Sample(aten.pow.Scalar, lambda b, s: (2.0, x(b, s, 6))),
    Sample(aten.bitwise_not.default, lambda b, s: (i(b, s, 6),)),
    Sample(aten.logical_not.default, lambda b, s: (m(b, s, 6),)),
    Sample(aten.type_as.default, lambda b, s: (x(b, s, 6), x(b, s, 6).float())),
    Sample(aten.type_as.default, lambda b, s: (x(b, s, 6), x(4, 12).float())),
    Sample(aten.masked_fill.Scalar, lambda b, s: (x(b, 4, s, 6), m(b, 1, s, 6), -9.0)),
    Sample(aten.masked_fill.Scalar, lambda b, s: (x(b, 4, s, 6), m(4, 1, 6), -9.0)),
    Sample(aten.masked_fill.Tensor, lambda b, s: (x(b, 4, s, 6), m(b, 1, s, 6), x())),
    Sample(aten.where.self, lambda b, s: (m(b, s, 6), x(b, s, 6), x(b, s, 6))),
    Sample(aten.where.self, lambda b, s: (m(4, 1), x(b, s, 1, 6), x())),
    Sample(aten.where.ScalarOther, lambda b, s: (m(b, s, 6), x(4, 1, 1, 6), 2.0)),
    Sample(aten.where.ScalarSelf, lambda b, s: (m(s, 6), 2.0, x(b, s, 6))),
    Sample(aten.where.Scalar, lambda b, s: (m(b, s, 6), 2.0, 3.0)),
    # A zero is filled into an unreduced sum on each rank.
    Sample(aten.masked_fill.Scalar, lambda b, s: (x(b, 4, s, 6), m(b, 1, s, 6), 0)),
    Sample(aten.where.ScalarOther, lambda b, s: (m(b, s, 6), x(4, 1, 1, 6), 0.0)),
    Sample(aten.where.ScalarSelf, lambda b, s: (m(s, 6), 0.0, x(b, s, 6))),
    Sample(aten.erfinv.default, lambda b, s: (x(b, s, 6).tanh(),)),
    Sample(aten.lerp.Scalar, lambda b, s: (x(b, s, 4, 6), x(6), 0.3)),
    Sample(aten.clamp.Tensor, lambda b, s: (x(b, s, 6), x(6) - 1, x(6) + 1)),
    Sample(aten.clamp.Tensor, lambda b, s: (x(b, s, 6), None, x(6))),
    Sample(aten.div.Tensor_mode, lambda b, s: (x(b, s, 6), x(6)), {"rounding_mode": "trunc"}),
    Sample(aten.div.Scalar_mode, lambda b, s: (x(b, s, 6), 2), {"rounding_mode": "floor"}),
)

ALONG = (
    Sample(aten.softmax.int, lambda b, s: (x(b, s, 4, 6), -1)),
    Sample(aten.softmax.int, lambda b, s: (x(b, s, 4, 6), 2)),
    Sample(aten._softmax.default, lambda b, s: (x(b, 4, s, 6), -1, False)),
    Sample(aten.cumsum.default, lambda b, s: (x(b, s, 4, 6), -1)),
    Sample(aten.cumsum.default, lambda b, s: (x(b, s, 6), 1)),
    Sample(aten.layer_norm.default, lambda b, s: (x(b, s, 4, 6), [6], x(6), x(6))),
    Sample(aten.layer_norm.default, lambda b, s: (x(b, s, 2, 6), [2, 6], x(2, 6))),
    Sample(aten.layer_norm.default, lambda b, s: (x(b, s, 4, 6), [6])),
    Sample(aten.rms_norm.default, lambda b, s: (x(b, s, 4, 6), [6], x(6), 1e-5)),
    Sample(aten.mean.dim, lambda b, s: (x(b, s, 4, 6), [-1], True)),
    Sample(aten.mean.dim, lambda b, s: (x(b, s, 4, 6), [2])),
    Sample(aten.mean.dim, lambda b, s: (x(b, s, 4, 6), [1, 2])),
    Sample(aten.amax.default, lambda b, s: (x(b, s, 4, 6), [-1], True)),
    Sample(aten.amax.default, lambda b, s: (x(b, s, 4, 6), [0, 2])),
    Sample(aten.amax.default, lambda b, s: (x(b, s, 6),)),
    Sample(aten.std.dim, lambda b, s: (x(b, s, 4, 6), [-1], True)),
    Sample(aten.std.dim, lambda b, s: (x(b, s, 4, 6), [2], False, True)),
    Sample(aten.sum.dim_IntList, lambda b, s: (x(b, s, 4, 6), [-1])),
    Sample(aten.sum.dim_IntList, lambda b, s: (x(b, s, 4, 6), [1, 2], True)),
    Sample(aten.sum.dim_IntList, lambda b, s: (x(b, s, 4, 6), [0, 2])),
    Sample(aten.sum.dim_IntList, lambda b, s: (x(4, 6), [])),
    Sample(aten.sum.dim_IntList, lambda b, s: (x(4, 6), None)),
)

CONTRACTION = (
    Sample(aten.linear.default, lambda b, s: (x(b, s, 6), x(4, 6))),
    Sample(aten.linear.default, lambda b, s: (x(b, s, 6), x(4, 6), x(4))),
    Sample(aten.linear.default, lambda b, s: (x(b, s, 4, 6), x(12, 6), x(12))),
    Sample(aten.mm.default, lambda b, s: (x(12, 6), x(6, 4))),
    Sample(aten.matmul.default, lambda b, s: (x(b, s, 6), x(6, 4))),
    Sample(aten.matmul.default, lambda b, s: (x(b, 4, s, 6), x(b, 4, 6, s))),
    Sample(aten.matmul.default, lambda b, s: (x(b, 4, s, 6), x(6, 12))),
    Sample(aten.matmul.default, lambda b, s: (x(12, 6), x(4, 6, 2))),
    Sample(aten.matmul.default, lambda b, s: (x(b, 1, s, 6), x(4, 6, 2))),
    Sample(aten.matmul.default, lambda b, s: (x(4, 6), x(6))),
    Sample(aten.matmul.default, lambda b, s: (x(6), x(6, 4))),
    Sample(aten.matmul.default, lambda b, s: (x(6), x(6))),
    Sample(aten.bmm.default, lambda b, s: (x(b * 4, s, 6), x(b * 4, 6, s))),
    Sample(aten.bmm.default, lambda b, s: (x(4, 2, 6), x(4, 6, 3))),
    Sample(
        aten.baddbmm.default,
        lambda b, s: (x(b * 4, 1, s), x(b * 4, s, 6), x(b * 4, 6, s)),
        {"beta": 0.5, "alpha": 2.0},
    ),
    Sample(aten.baddbmm.default, lambda b, s: (x(4, 2, 3), x(4, 2, 6), x(4, 6, 3))),
    Sample(aten.baddbmm.default, lambda b, s: (x(3), x(4, 2, 6), x(4, 6, 3))),
    Sample(aten.addmm.default, lambda b, s: (x(4), x(b * s, 6), x(6, 4))),
    Sample(aten.addmm.default, lambda b, s: (x(2, 1), x(2, 6), x(6, 4))),
    Sample(
        GROUPED_MM,
        lambda b, s: (x(b * s, 6), x(2, 6, 4), torch.tensor([b, b * s])),
        kernel=multiply_groups,
    ),
    Sample(
        GROUPED_MM,
        lambda b, s: (x(6 * b * s, 4), x(3, 4, 12), torch.tensor([0, s, 6 * b * s])),
        kernel=multiply_groups,
    ),
)

_SDPA = aten.scaled_dot_product_attention.default
_SETTINGS = (0.4, True, 2, 5.0)
ATTENTIONS = (
    *(
        Sample(
            ATTENTION,
            lambda b, s, h=h, kv=kv, sinks=sinks: (
                *(x(b, h, s, 2), x(b, kv, s, 2), x(b, kv, s, 3), kept(b, s)),
                *(x(h) if sinks else None, *_SETTINGS),
            ),
            kernel=attend,
        )
        for h, kv, sinks in ((4, 2, False), (6, 3, True), (2, 2, True), (4, 1, False))
    ),
    Sample(_SDPA, lambda b, s: (x(b, 6, s, 4), x(b, 6, s, 4), x(b, 6, s, 2))),
    Sample(
        _SDPA,
        lambda b, s: (x(b, 4, s, 2), x(b, 2, s, 2), x(b, 2, s, 2), None, 0.0, True),
        {"enable_gqa": True},
    ),
    *(
        Sample(_SDPA, lambda b, s, shape=shape: (*(x(b, 4, s, 2) for _ in "qkv"), x(*shape(b, s))))
        for shape in (
            lambda b, s: (b, 4, s, s),
            lambda b, s: (b, 1, s, s),
            lambda b, s: (s, s),
            lambda b, s: (4, s, s),
        )
    ),
)

SOURCE = (
    Sample(aten.arange.default, lambda b, s: (6,)),
    Sample(aten.arange.start, lambda b, s: (1, 6)),
    Sample(aten.arange.start_step, lambda b, s: (0, 12, 2)),
    Sample(aten.full.default, lambda b, s: ([4, 6], 1.0)),
    Sample(aten.zeros.default, lambda b, s: ([4, 6],)),
    Sample(aten.ones.default, lambda b, s: ([4, 6],)),
    Sample(aten.scalar_tensor.default, lambda b, s: (2.0,)),
    Sample(aten.lift_fresh_copy.default, lambda b, s: (x(4, 6),)),
    Sample(aten.embedding.default, lambda b, s: (x(12, 6), i(b, s).abs())),
    Sample(aten.new_ones.default, lambda b, s: (x(b, s, 6), [4, 6])),
    Sample(aten.new_zeros.default, lambda b, s: (x(b, s, 6), [4, 6])),
    Sample(aten.new_full.default, lambda b, s: (x(b, s, 6), [4, 6], 2.0)),
    Sample(aten.new_empty.default, lambda b, s: (x(b, s, 6), [b, 6]), kernel=aten.new_zeros),
    *(
        Sample(op, lambda b, s: (x(b, s, 4, 6),), kernel=kernel)
        for op, kernel in (
            (aten.ones_like.default, None),
            (aten.zeros_like.default, None),
            (aten.empty_like.default, aten.zeros_like),
        )
    ),
    Sample(aten.full_like.default, lambda b, s: (x(b, s, 6), 2.0)),
    Sample(aten.eye.default, lambda b, s: (6,)),
    Sample(aten.eye.m, lambda b, s: (4, 6)),
    Sample(aten.linspace.default, lambda b, s: (0.0, 1.0, 6)),
)

# Rules without a sample -> why.
EXEMPT = {
    **dict.fromkeys((operator.add, operator.sub, operator.mul, operator.floordiv), "on sizes only"),
    **dict.fromkeys((operator.eq, operator.ge, operator.gt, operator.le), "on sizes only"),
    **dict.fromkeys((operator.lt, operator.neg), "on sizes only"),
    aten.sym_size.int: "yields a size; test_size_of_a_split_dim_is_refused",
    aten.empty.memory_format: "yields no defined value",
    operator.getitem: "takes a list of results; tested with the operators that yield one",
}
