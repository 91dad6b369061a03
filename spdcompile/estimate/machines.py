"""Devices and links whose latencies are estimated, from machines.json beside this file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from spdcompile.errors import UsageError
from spdcompile.estimate.counting import Kind
from spdcompile.estimate.kernels import Kernel
from spdcompile.estimate.work import Exchange


@dataclass(frozen=True, slots=True)
class Device:
    """What a rank computes on.

    Args:
        flops: dtype -> floating-point operations per second of a large product.
        bytes_per_s: of a long stream from its memory.
        kernel_s: what every kernel takes at least.
    """

    name: str
    flops: Mapping[torch.dtype, float]
    bytes_per_s: float
    kernel_s: float
    sources: tuple[str, ...] = ()

    def seconds(self, kernel: Kernel) -> float:
        """Roofline: whichever takes longer, computing or moving."""
        compute = kernel.flops / self.flops[kernel.dtype] if kernel.flops else 0.0
        return self.kernel_s + max(compute, kernel.num_bytes / self.bytes_per_s)


@dataclass(frozen=True, slots=True)
class Link:
    """What ranks exchange through: alpha-beta of a ring, or of rings within nodes and across.

    Args:
        base_s: of a collective, however many ranks there are.
        hop_s: of each of a ring's steps.
        bytes_per_s: bus bandwidth: what a rank sends, and at the same time receives.
        across: between nodes, for ranks of several; shared by the ranks of a node.
        per_node: ranks of a node, with `across`.
    """

    name: str
    base_s: float
    hop_s: float
    bytes_per_s: float
    across: Link | None = None
    per_node: int = 0
    sources: tuple[str, ...] = field(default=())

    def seconds(self, exchange: Exchange, ranks: int) -> float:
        """Of one collective over so many ranks; 0 for a single one."""
        if self.across is not None and ranks > self.per_node:
            nodes = ranks // self.per_node
            return self._ring(exchange, self.per_node) + self.across._ring(exchange, nodes)
        return self._ring(exchange, ranks)

    def _ring(self, exchange: Exchange, ranks: int) -> float:
        if ranks == 1:
            return 0.0
        # A sum goes round twice: to be summed, then to be known to all.
        rounds = 2 if exchange.kind is Kind.ALL_REDUCE else 1
        hops = rounds * (ranks - 1)
        return self.base_s + hops * (self.hop_s + exchange.num_bytes / ranks / self.bytes_per_s)


@cache
def _table() -> dict[str, Any]:
    return json.loads(files("spdcompile.estimate").joinpath("machines.json").read_text("utf-8"))


def device_named(name: str) -> Device:
    """A device of the table.

    Raises:
        UsageError: there is none of that name.
    """
    row = _row("devices", name)
    flops = {getattr(torch, d): row["flops_share"] * rate for d, rate in row["flops"].items()}
    stream = row["bytes_share"] * row["bytes_per_s"]
    return Device(name, flops, stream, row["kernel_s"], tuple(row["sources"]))


def link_named(name: str) -> Link:
    """A link of the table.

    Raises:
        UsageError: there is none of that name.
    """
    row = dict(_row("links", name))
    within = row.pop("within", None)
    link = Link(name, **{**row, "sources": tuple(row["sources"])}) if not within else None
    if link is None:
        across = Link(name, row["base_s"], row["hop_s"], row["bytes_per_s"])
        link = replace(link_named(within), name=name, across=across, per_node=row["per_node"])
    return link


def _row(kind: str, name: str) -> dict[str, Any]:
    rows = _table()[kind]
    if name not in rows:
        raise UsageError(
            f"There is no such entry under {kind}.",
            where="machines.json",
            found=repr(name),
            needed=f"one of {', '.join(rows)}",
        )
    return rows[name]
