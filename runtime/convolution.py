"""Replacement of `conv1d`, whose own vmap rule freezes sizes (torch 2.13).

As `VMAP_REPLACEMENTS` in ops.py; importing this module registers it.

Shapes: R ranks (the vmapped dim), B batch, I and O channels, T times, K taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spdcompile.runtime._torch import OpOverload, define_copy

_LIBRARY = torch.library.Library("spd", "FRAGMENT")
_CONV1D = define_copy(_LIBRARY, torch.ops.aten.conv1d.default)
CONVOLUTION_REPLACEMENTS: Mapping[OpOverload, OpOverload] = MappingProxyType(
    {torch.ops.aten.conv1d.default: _CONV1D}
)


@torch.library.register_vmap(_CONV1D, lib=_LIBRARY)
def _conv1d_rule(
    info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *settings: Any
) -> tuple[Tensor, int]:
    """Ranks with filters of their own are groups of channels, [B, R * I, T]; else more batch."""
    x_dim, weight_dim, bias_dim = (*in_dims, None, None)[:3]
    if weight_dim is None and bias_dim is None:
        folded = x.movedim(x_dim, 0).flatten(0, 1)
        out = F.conv1d(folded, weight, bias, *settings)
        return out.unflatten(0, (info.batch_size, -1)), 0
    stride, padding, dilation, groups = (*settings, *(1, 0, 1, 1)[len(settings) :])
    ranks = info.batch_size
    x = x.expand(ranks, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
    weight, bias = (
        None if p is None else (p.expand(ranks, *p.shape) if d is None else p.movedim(d, 0))
        for d, p in ((weight_dim, weight), (bias_dim, bias))
    )
    out = F.conv1d(
        x.movedim(0, 1).flatten(1, 2),
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(0, 1),
        stride,
        padding,
        dilation,
        groups * ranks,
    )
    return out.unflatten(1, (ranks, -1)), 1
