"""Sample calls for reductions, orders, pairs, convolutions; letters as in rule_samples.py."""

from __future__ import annotations

import torch

from tests.passes.rule_samples import x
from tests.passes.sample import Sample

aten = torch.ops.aten


def c(*shape: int) -> torch.Tensor:
    """Complex values."""
    return torch.complex(x(*shape), x(*shape))


def same(b: int, s: int, value: bool) -> torch.Tensor:
    """A mask in which each entry alone decides whether there is any, or whether all are."""
    return torch.full((b, s, 4, 6), value)


_ALONG = (
    *(aten.amin.default, aten.logsumexp.default, aten.prod.dim_int, aten.var.dim),
    *(aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default),
)
_OF_ALL = (
    *(aten.max.default, aten.min.default, aten.sum.default, aten.mean.default),
    *(aten.argmax.default, aten.linalg_vector_norm.default),
)
REDUCTIONS = (
    *(Sample(op, lambda b, s: (x(b, s, 4, 6), 2)) for op in _ALONG),
    *(Sample(op, lambda b, s: (x(b, s, 4, 6), -1, True)) for op in _ALONG),
    *(Sample(op, lambda b, s: (x(b, s, 6),)) for op in _OF_ALL),
    Sample(aten.any.default, lambda b, s: (same(b, s, False),)),
    Sample(aten.all.default, lambda b, s: (same(b, s, True),)),
    *(
        Sample(op, lambda b, s, value=value, more=more: (same(b, s, value), *more))
        for op, value in ((aten.any.dim, False), (aten.all.dim, True))
        for more in ((2,), (-1, True))
    ),
    *(
        Sample(op, lambda b, s: (x(b, s, 4, 6), [2]), {"correction": 0})
        for op in (aten.var.correction, aten.std.correction)
    ),
    *(
        Sample(op, lambda b, s, dim=dim: (x(b, s, 4, 6), dim))
        for dim in (-1, 2)
        for op in (aten.cumprod.default, aten.log_softmax.int, aten.logcumsumexp.default)
    ),
    Sample(aten.linalg_vector_norm.default, lambda b, s: (x(b, s, 4, 6), 2, [-1], True)),
    Sample(aten.linalg_vector_norm.default, lambda b, s: (x(b, s, 4, 6), 2, [2])),
)

CHOICES = (
    Sample(aten.topk.default, lambda b, s: (x(b, s, 4, 6), 2)),
    Sample(aten.topk.default, lambda b, s: (x(b, s, 4, 6), 2, 2)),
    *(
        Sample(op, lambda b, s, more=more: (x(b, s, 4, 6), *more))
        for more in ((), (2,))
        for op in (aten.sort.default, aten.argsort.default)
    ),
    Sample(aten.sort.stable, lambda b, s: (x(b, s, 4, 6),), {"stable": True}),
    Sample(aten.histc.default, lambda b, s: (x(12), 4, -2, 2)),
)

PAIRS = (
    Sample(aten.view_as_complex.default, lambda b, s: (x(b, s, 6, 2),)),
    Sample(aten.view_as_real.default, lambda b, s: (c(b, s, 6),)),
    Sample(aten.polar.default, lambda b, s: (x(s, 6).abs(), x(s, 6))),
    Sample(aten.mul.Tensor, lambda b, s: (c(b, s, 4, 6), c(s, 1, 6))),
)

_PADDED = (1, 3, 1)  # stride, padding, dilation; four taps, so that each time meets the next
CONVOLUTIONS = (
    Sample(aten.conv1d.default, lambda b, s: (x(b, 6, s), x(6, 1, 4), None, *_each(), 6)),
    Sample(aten.conv1d.default, lambda b, s: (x(b, 12, s), x(12, 1, 4), x(12), *_each(), 12)),
    Sample(aten.conv1d.default, lambda b, s: (x(b, 6, s), x(4, 6, 4), None, *_each())),
    Sample(aten.conv1d.default, lambda b, s: (x(b, 6, s), x(4, 6, 4), x(4), *_each(), 1)),
    Sample(aten.conv1d.default, lambda b, s: (x(b, 4, s), x(6, 2, 4), None, *_each(), 2)),
)


def _each() -> tuple[list[int], ...]:
    return tuple([number] for number in _PADDED)


EINSUMS = (
    Sample(
        aten.einsum.default,
        lambda b, s: ("bclhn,bchpn->bclhp", [x(b, 1, s, 4, 2), x(b, 1, 4, 3, 2)]),
    ),
    Sample(aten.einsum.default, lambda b, s: ("bcln,bchn->bclh", [x(b, 1, s, 6), x(b, 1, 4, 6)])),
    Sample(aten.einsum.default, lambda b, s: ("bti,oi", [x(b, s, 6), x(4, 6)])),
    Sample(aten.einsum.default, lambda b, s: ("i, j -> ji", [x(6), x(4)])),
    Sample(aten.einsum.default, lambda b, s: ("bhi,h,bhj->bij", [x(b, 4, 6), x(4), x(b, 4, 2)])),
)

REARRANGING = (
    Sample(aten.flip.default, lambda b, s: (x(b, s, 4, 6), [-1])),
    Sample(aten.flip.default, lambda b, s: (x(b, s, 4, 6), [1, 2])),
    Sample(aten.roll.default, lambda b, s: (x(b, s, 4, 6), [1], [1])),
    Sample(aten.roll.default, lambda b, s: (x(b, s, 4, 6), [2], [3])),
    Sample(aten.unfold.default, lambda b, s: (x(b, 6, 4), 2, 2, 1)),
    Sample(aten.constant_pad_nd.default, lambda b, s: (x(b, 6, s), [3, 0])),
    Sample(aten.constant_pad_nd.default, lambda b, s: (x(b, s, 6), [0, 0, 1, 2], 1.0)),
    Sample(aten.constant_pad_nd.default, lambda b, s: (x(b, s, 4, 6), [0, 0, 0, 2], 0.0)),
    Sample(aten.tril.default, lambda b, s: (x(b, 4, 6, 6),)),
    Sample(aten.triu.default, lambda b, s: (x(b, 4, 6, 6), 1)),
    Sample(aten.expand_as.default, lambda b, s: (x(b, 1, s, 6), x(b, 4, s, 6))),
    Sample(aten.expand_as.default, lambda b, s: (x(6), x(b, s, 6))),
)

MORE = (*REDUCTIONS, *CHOICES, *PAIRS, *CONVOLUTIONS, *EINSUMS, *REARRANGING)
