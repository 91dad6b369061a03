"""Brings the products of a mixture of experts to one operator, `spd::grouped_mm`.

One function a rewrite, as in normalize.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from spdcompile.passes.base import ParamRef, add_call
from spdcompile.passes.ops import GROUPED_MM

aten = torch.ops.aten


def grouped_mm(node: fx.Node, _: dict[str, ParamRef]) -> fx.Node | None:
    """The two operators that Hugging Face's experts use, by dtype and by whether it is traced."""
    if str(node.target) == _FALLBACK:  # exists once transformers' experts are imported
        rows, weight, ends = _bound(node, ("input", "weight", "offs"))
    elif node.target is aten._grouped_mm.default:
        names = ("self", "mat2", "offs", "bias", "out_dtype")
        rows, weight, ends, bias, out_dtype = _bound(node, names)
        if ends is None or bias is not None or out_dtype not in (None, rows.meta["val"].dtype):
            return None
    else:
        return None
    if (rows.meta["val"].dim(), weight.meta["val"].dim()) != (2, 3):
        return None
    with node.graph.inserting_before(node):
        return add_call(node.graph, GROUPED_MM, (rows, weight, ends), node.meta)


def _bound(node: fx.Node, names: tuple[str, ...]) -> tuple[Any, ...]:
    """The arguments of a call by name, None where one is not given."""
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return tuple(given.get(name) for name in names)


_FALLBACK = "transformers.grouped_mm_fallback.default"
