"""Latency of a step: its kernels by a roofline, its collectives by alpha and beta."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spdcompile.estimate.devices import Device
from spdcompile.estimate.links import Link
from spdcompile.estimate.work import Work


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of a step.

    Args:
        compute: kernels, one after the other.
        exchanges: collective -> its seconds, nothing overlapping.
    """

    compute: float
    exchanges: Mapping[str, float]

    @property
    def exchange(self) -> float:
        return sum(self.exchanges.values())

    @property
    def total(self) -> float:
        return self.compute + self.exchange

    @property
    def exchange_share(self) -> float:
        """How much of the step ranks wait for each other."""
        return self.exchange / self.total


def latency_of(work: Work, device: Device, link: Link, ranks: int) -> Latency:
    """What a step takes."""
    kernels = sum(device.seconds(kernel, work.state_bytes) for kernel in work.kernels)
    return Latency(
        kernels + device.host_seconds(work.tokens, work.blocks),
        {each.point: link.seconds(each, ranks) for each in work.exchanges},
    )


def ideal_gain(plain: Latency, dropped: Latency) -> float:
    """The share of a step that the collectives take which are gone."""
    gone = plain.exchanges.keys() - dropped.exchanges.keys()
    return sum(plain.exchanges[point] for point in gone) / plain.total


def expected_gain(plain: Latency, dropped: Latency) -> float:
    """The share of a step that is gone, what the drop adds to compute counted."""
    return 1 - dropped.total / plain.total
