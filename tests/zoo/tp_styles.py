"""The styles of transformers' tensor-parallel plans, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Style:
    """What a style of transformers does to a parameter in the forward pass.

    Args:
        dim: the dim that it cuts, counted from the end; None if every rank holds the whole.
        parts: stretches of equal length that are cut each by itself.
        gathers: outside of the module, every rank has the whole activation at the cut side.
    """

    dim: int | None = None
    parts: int = 1
    gathers: bool = False


STYLES: Mapping[str, Style] = {
    "colwise": Style(-2),
    "colwise_gather_output": Style(-2, gathers=True),
    "packed_colwise": Style(-2, parts=2),
    "rowwise": Style(-1),
    "rowwise_split_input": Style(-1, gathers=True),
    "packed_rowwise": Style(-1, parts=2),
    "embedding_rowwise": Style(-2),
    "embedding_colwise": Style(-1),
    "replicate": Style(),
    "replicated_with_grad_allreduce": Style(),
    "mla_kv_a_proj": Style(),
    "all_reduce": Style(),
    "moe_tp_experts": Style(),
    "moe_identity_expert": Style(),
    "local_params": Style(),
}
