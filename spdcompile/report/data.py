"""The report as data: plain values only, so that it goes to JSON and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from spdcompile.report.text import render


class PointState(StrEnum):
    """What became of a sync point."""

    KEPT = "kept"
    DROPPED = "dropped"
    MERGED = "merged"
    FIXED = "cannot be dropped"


@dataclass(frozen=True, slots=True)
class ModelReport:
    """The model in one line; None where its configuration has no such number.

    Args:
        type: Hugging Face's model type.
        dtype: of the parameters, such as "bfloat16".
    """

    type: str
    layers: int | None
    hidden: int | None
    heads: int | None
    kv_heads: int | None
    vocab: int | None
    dtype: str


@dataclass(frozen=True, slots=True)
class LinearReport:
    """A linear that is split.

    Args:
        path: module path, relative to the block; absolute outside the blocks.
        split: "columns" (output features) or "rows" (input features).
        placement: of its weight: "S(0)" or "S(1)".
        shape: of its weight.
        local_shape: of its weight on one rank, padding included.
    """

    path: str
    split: str
    placement: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RegionReport:
    """Linears that are split together.

    Args:
        kind: "attn", "mlp" or "head".
        num_units: head groups of an attention, channels of an MLP, vocabulary entries of a head.
        units: per rank, its units as ranges.
        units_per_rank: units of the fullest rank; the others are padded to it.
        in_order: the units lie on the ranks in order, as evenly as they can.
    """

    name: str
    kind: str
    num_units: int
    units: tuple[str, ...]
    units_per_rank: int
    in_order: bool
    linears: tuple[LinearReport, ...]


@dataclass(frozen=True, slots=True)
class PointReport:
    """A sync point of a block.

    Args:
        into: the sync point that it is merged into, or "".
        reason: why it cannot be dropped, or "".
    """

    name: str
    state: PointState
    into: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BlockReport:
    """Blocks of which all that follows is the same.

    Args:
        layers: their layers; none for the prelude and the postlude.
        name: "layers 0-31", "prelude" or "postlude".
        whole: parameters with two dims or more that every rank holds whole, relative to the block.
        routers: modules that choose or weigh experts by the replicated part of a value alone,
            relative to the block.
    """

    name: str
    layers: tuple[int, ...]
    regions: tuple[RegionReport, ...]
    sync_points: tuple[PointReport, ...]
    whole: tuple[str, ...]
    routers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Collectives:
    """What one forward pass communicates.

    Args:
        plain_all_reduces: one for each row-split linear.
        merged_all_reduces: after partial sums that meet in an addition share one.
        all_reduces: after the drop.
        gathers: concatenations over the ranks (the logits).
        merged_bytes_per_token: size of the all-reduced values for one token, before the drop.
        bytes_per_token: the same after the drop.
        gather_bytes_per_token: size of the gathered values for one token.
    """

    plain_all_reduces: int
    merged_all_reduces: int
    all_reduces: int
    gathers: int
    merged_bytes_per_token: int
    bytes_per_token: int
    gather_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class Size:
    """Numbers held, and the bytes that they take."""

    count: int
    num_bytes: int

    def __add__(self, other: Size) -> Size:
        return Size(self.count + other.count, self.num_bytes + other.num_bytes)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Who holds how much; every rank holds the same.

    Args:
        total: the unsharded model, a tied tensor counted once.
        per_rank: `sharded` + `replicated`.
        sharded: what a rank holds of split parameters, padding included.
        replicated: parameters that every rank holds whole. A tied tensor that is whole as an
            embedding and split as the head counts in both.
        padding_bytes: zeros among the shards of all ranks together.
        shared_bytes: further copies of K/V heads that several ranks hold, all ranks together.
    """

    total: Size
    per_rank: Size
    sharded: Size
    replicated: Size
    padding_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class RefusalReport:
    """A rewrite that did not happen, and why.

    Args:
        subject: what was refused; a module path is relative to the block.
        where: "layers 0-31", "prelude", "postlude" or "model".
        layers: the layers concerned; none outside the blocks.
        found_by: the pass that refused.
    """

    subject: str
    where: str
    layers: tuple[int, ...]
    reason: str
    found_by: str


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did.

    Args:
        seconds: wall time without the checks.
        nodes: operator calls over all distinct graphs, after it.
    """

    name: str
    numerics: str
    seconds: float
    nodes: int
    rewrites: int


@dataclass(frozen=True, slots=True)
class Report:
    """What was split, synced, dropped and refused, and what it costs; prints as tables."""

    tp: int
    num_layers: int
    blocks: tuple[BlockReport, ...]
    collectives: Collectives
    parameters: Parameters
    refusals: tuple[RefusalReport, ...]
    passes: tuple[PassReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers: what its JSON holds."""
        return _listed(asdict(self))

    def __str__(self) -> str:
        return render(self)


def _listed(value: Any) -> Any:
    """Tuples as lists and enums as strings, so that the dict equals its JSON read back."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_listed(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value
