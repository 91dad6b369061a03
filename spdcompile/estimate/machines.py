"""Devices and links whose latencies are estimated: machines.json beside this file, or another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from spdcompile.errors import UsageError
from spdcompile.estimate.counting import Kind
from spdcompile.estimate.devices import Device, Host, Point, Rate
from spdcompile.estimate.links import Link, Timed, Way, fitted

FORMAT = "spdcompile-machines-2"


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
        attention = row.get("attention", {})
        return Device(
            name,
            {_dtype(dtype): share * rate for dtype, rate in row["flops"].items()},
            row.get("bytes_share", 1.0) * row["bytes_per_s"],
            row["kernel_s"],
            tuple(sorted(Host(*each) for each in row.get("host", []))),
            {_dtype(dtype): tuple(Rate(*x) for x in rows) for dtype, rows in rates.items()},
            {_dtype(dtype): _points(rows) for dtype, rows in attention.items()},
            _points(row.get("streams", [])),
            _points(row.get("fused", [])),
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


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _points(rows: Sequence[Sequence[Any]]) -> tuple[Point, ...]:
    return tuple((int(size), float(rate)) for size, rate in rows)


def _given(row: Mapping[str, float]) -> Way:
    return Way(row["base_s"], row["hop_s"], 1 / row["bytes_per_s"])


def _fitted(row: Sequence[Sequence[Any]], hop_s: float | None) -> tuple[Way, list[Timed]]:
    rows = [Timed(Kind(kind), ranks, size, seconds) for kind, ranks, size, seconds in row]
    return fitted(rows, hop_s), rows
