"""Devices and links whose latencies are estimated: machines.json beside this file, or another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spdcompile.errors import UsageError
from spdcompile.estimate.counting import Kind
from spdcompile.estimate.kernels import Kernel
from spdcompile.estimate.links import Link, Timed, Way, fitted

FORMAT = "spdcompile-machines-1"


@dataclass(frozen=True, slots=True)
class Rate:
    """A product by a matrix, measured.

    Args:
        rows: vectors that the matrix meets.
        num_bytes: of all matrices that were read in turn.
        flops: floating-point operations per second.
    """

    rows: int
    num_bytes: int
    flops: float


@dataclass(frozen=True, slots=True)
class Device:
    """What a rank computes on.

    Args:
        flops: dtype -> floating-point operations per second of a large product.
        bytes_per_s: of a long stream from its memory.
        kernel_s: what every kernel takes at least.
        part_s: what the host takes for each part of the program; 0 where it runs ahead.
        products: dtype -> measured rates of products, all rows at all sizes, which are used in
            place of the roofline.
        streams: (bytes, bytes per second) of streams of several lengths, in place of one.
    """

    name: str
    flops: Mapping[torch.dtype, float]
    bytes_per_s: float
    kernel_s: float
    part_s: float = 0.0
    products: Mapping[torch.dtype, Sequence[Rate]] | None = None
    streams: Sequence[tuple[int, float]] = ()
    sources: tuple[str, ...] = ()

    def seconds(self, kernel: Kernel, state_bytes: int) -> float:
        """Roofline: whichever takes longer, computing or moving.

        Args:
            state_bytes: that a step reads, of weights and caches.

        Raises:
            UsageError: nothing is known of the kernel's dtype.
        """
        if kernel.flops and kernel.dtype not in self.flops:
            raise UsageError(
                f"Nothing is known of {kernel.dtype} there.",
                where=f"device {self.name!r}",
                needed=f"one of {', '.join(str(d) for d in self.flops)}",
            )
        rates = (self.products or {}).get(kernel.dtype)
        if rates and kernel.rows:
            return self.kernel_s + kernel.flops / _rate(rates, kernel.rows, state_bytes)
        compute = kernel.flops / self.flops[kernel.dtype] if kernel.flops else 0.0
        stream = self._stream(state_bytes if kernel.reads_state else kernel.num_bytes)
        return self.kernel_s + max(compute, kernel.num_bytes / stream)

    def _stream(self, num_bytes: int) -> float:
        if not self.streams:
            return self.bytes_per_s
        sizes, rates = zip(*self.streams, strict=True)
        return float(np.exp(np.interp(np.log(num_bytes), np.log(sizes), np.log(rates))))


def _rate(rates: Sequence[Rate], rows: int, num_bytes: int) -> float:
    """Between the nearest measured ones, by logarithms."""
    known = sorted({rate.rows for rate in rates})
    at = []
    for each in known:
        own = sorted((rate.num_bytes, rate.flops) for rate in rates if rate.rows == each)
        sizes, flops = zip(*own, strict=True)
        at.append(np.interp(np.log(num_bytes), np.log(sizes), np.log(flops)))
    return float(np.exp(np.interp(np.log(rows), np.log(known), at)))


class Machines:
    """Devices and links by name.

    Args:
        table: as in machines.json.
        where: the file's name, for messages.
    """

    def __init__(self, table: Mapping[str, Any], where: str) -> None:
        self._table, self._where = table, where

    @classmethod
    def load(cls, path: str | Path | None = None) -> Machines:
        """What is known: the package's own entries, and before those the entries of a file.

        Raises:
            UsageError: the file holds none.
        """
        own = files("spdcompile.estimate").joinpath("machines.json").read_text("utf-8")
        table = json.loads(own)
        if path is None:
            return cls(table, "machines.json")
        try:
            given = json.loads(Path(path).read_text("utf-8"))
            if given["format"] != FORMAT:
                raise ValueError(f"format {given['format']!r}")
            found = cls({key: {**table[key], **given[key]} for key in ("devices", "links")}, "")
            found._where = str(path)
            for name in given["devices"]:
                found.device(name)
            for name in given["links"]:
                found.link(name)
        except UsageError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                "The machine cannot be read.",
                where=str(path),
                found=f"{type(error).__name__}: {error}",
                needed=f"JSON of the format {FORMAT}: devices and links, as measure-machine writes",
            ) from error
        return found

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self._table["devices"])

    @property
    def links(self) -> tuple[str, ...]:
        return tuple(self._table["links"])

    def device(self, name: str) -> Device:
        """A device by name.

        Raises:
            UsageError: there is none of that name.
        """
        row = self._row("devices", name)
        share, rates = row.get("flops_share", 1.0), row.get("products", {})
        return Device(
            name,
            {getattr(torch, dtype): share * rate for dtype, rate in row["flops"].items()},
            row.get("bytes_share", 1.0) * row["bytes_per_s"],
            row["kernel_s"],
            row.get("part_s", 0.0),
            {getattr(torch, dtype): [Rate(*x) for x in rows] for dtype, rows in rates.items()},
            [(int(size), float(rate)) for size, rate in row.get("streams", [])],
            tuple(row["sources"]),
        )

    def link(self, name: str) -> Link:
        """A link by name.

        Raises:
            UsageError: there is none of that name.
        """
        row = self._row("links", name)
        sources = tuple(row["sources"])
        if "within" in row:
            across = Link(name, (_given(row["across"]),))
            within = self.link(row["within"])
            given = {"across": across, "nodes": row["nodes"], "measured": (), "sources": sources}
            return replace(within, name=name, **given)
        if "steps_of" in row:
            ways = self.link(row["steps_of"]).ways
            ways = tuple(replace(way, s_per_byte=1 / row["bytes_per_s"]) for way in ways)
            return Link(name, ways, sources=sources)
        ways = [_fitted(way, row.get("hop_s")) for way in row["ways"]]
        measured = tuple(dict.fromkeys(timed for _, rows in ways for timed in rows))
        return Link(name, tuple(way for way, _ in ways), measured=measured, sources=sources)

    def _row(self, kind: str, name: str) -> Mapping[str, Any]:
        rows = self._table[kind]
        if name not in rows:
            raise UsageError(
                f"There is no such entry under {kind}.",
                where=self._where,
                found=repr(name),
                needed=f"one of {', '.join(rows)}",
            )
        return rows[name]


def _given(row: Mapping[str, float]) -> Way:
    return Way(row["base_s"], row["hop_s"], 1 / row["bytes_per_s"])


def _fitted(row: Sequence[Sequence[Any]], hop_s: float | None) -> tuple[Way, list[Timed]]:
    rows = [Timed(Kind(kind), ranks, size, seconds) for kind, ranks, size, seconds in row]
    return fitted(rows, hop_s), rows
