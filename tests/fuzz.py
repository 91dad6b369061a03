"""Data with one thing wrong."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

_VALUES = st.sampled_from(
    [None, True, 0, 1, -1, 2**31, 2**62, 1.5, "", "x", "aten.relu.default", [], {}, [[0, 2**40]]]
)


def mutated(data: Any, draw: st.DataObject) -> Any:
    """A copy in which one value, wherever it lies, is gone or another."""
    data = copy.deepcopy(data)
    at, key = data, None
    while isinstance(at, dict | list) and at:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        parent, key = at, draw.draw(st.sampled_from(keys))
        at = at[key]
        if draw.draw(st.integers(0, 5)) == 0:
            break
    if key is not None:
        if draw.draw(st.booleans()) and isinstance(parent, dict):
            del parent[key]
        else:
            parent[key] = draw.draw(_VALUES)
    return data
