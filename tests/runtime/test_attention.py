"""Attention against its plain version, vmapped or not.

Shapes: R ranks, B batch, S tokens, H query heads, G KV heads, D width of a query head, V of a value
head, C width of the model.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from spdcompile.passes.ops import ATTENTION
from tests.compare import rel_err
from tests.runtime.operator_cases import (
    BOUNDS,
    PADDINGS,
    SETTINGS,
    R,
    attend_plainly,
    over_ranks,
    padded,
    random_inputs,
)

pytestmark = pytest.mark.usefixtures("reproducible")


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_attention_matches_plain(setting: str, with_sinks: bool, padding: str) -> None:
    for dtype, bound in BOUNDS.items():
        given = random_inputs(dtype=dtype)
        sinks = given.pop("sinks") if with_sinks else None
        given.pop("sinks", None)
        valid = padded(*PADDINGS[padding])
        wide = [x.double() for x in given.values()]
        wide_sinks = None if sinks is None else sinks.double()
        expected = attend_plainly(*wide, valid, wide_sinks, *SETTINGS[setting])
        for mask in (valid, valid.bool()):
            out = ATTENTION(*given.values(), mask, sinks, *SETTINGS[setting])
            assert out.dtype == dtype and out.is_contiguous()
            assert rel_err(out.double(), expected) < bound


def test_attention_without_groups_matches_plain() -> None:
    given = random_inputs()
    k, v = (given[name].repeat(1, 2, 1, 1) for name in "kv")
    args = (given["q"], k, v, padded(1, 1), None, *SETTINGS["causal"])
    assert rel_err(ATTENTION(*args), attend_plainly(*args)) < BOUNDS[torch.float64]


def test_attention_refuses_more_keys_than_queries() -> None:
    given = random_inputs()
    args = (given["q"][:, :, 1:], given["k"], given["v"], padded(0, 0), None)
    with pytest.raises(ValueError, match="6 queries to 7 keys"):
        ATTENTION(*args, *SETTINGS["causal"])


# Every mix of batched and shared, as vmapped dims that are not all in front.
MIXES = [
    [dim if batched else None for dim, batched in zip((0, 2, 1, 1, 1), mix, strict=True)]
    for mix in itertools.product([True, False], repeat=5)
    if any(mix)
]


@pytest.mark.parametrize("setting", ["causal", "window", "softcap", "chunk"])
def test_vmapped_attention_matches_loop_in_all_mixes(setting: str) -> None:
    per_rank, shared = random_inputs(R), random_inputs()
    per_rank["valid"] = torch.stack([padded(rank, 0) for rank in range(R)])
    shared["valid"] = padded(0, 2)
    names = ("q", "k", "v", "valid", "sinks")

    def attend(*args: Any) -> Tensor:
        return ATTENTION(*args, *SETTINGS[setting])

    for mix, with_sinks in itertools.product(MIXES, (True, False)):
        dims = [*mix[:4], mix[4] if with_sinks else None]
        if all(dim is None for dim in dims):
            continue
        args = [
            shared[name] if dim is None else per_rank[name].movedim(0, dim).contiguous()
            for name, dim in zip(names, dims, strict=True)
        ]
        args[4] = args[4] if with_sinks else None
        out = torch.vmap(attend, tuple(dims))(*args)
        assert rel_err(out, over_ranks(attend, args, dims)) < 1e-13, dims


def test_vmapped_attention_nests() -> None:
    given = random_inputs(2, R)

    def attend(*args: Tensor) -> Tensor:
        return ATTENTION(*args[:3], padded(2, 0), args[3], *SETTINGS["causal"])

    out = torch.vmap(torch.vmap(attend))(*given.values())
    parts = [over_ranks(attend, [x[i] for x in given.values()], [0] * 4) for i in range(2)]
    assert rel_err(out, torch.stack(parts)) < 1e-13
