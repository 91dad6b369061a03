"""What kernels take: a roofline, or measured rates of products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from spdcompile.errors import UsageError
from spdcompile.estimate.kernels import FUSED, Kernel

Point = tuple[int, float]
"""A size and the rate that was measured with it."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A product by a matrix, measured.

    Args:
        rows: vectors that the matrix meets.
        matrix_bytes: of the matrix.
        state_bytes: of all matrices that were read in turn, this one among them.
        flops: floating-point operations per second.
    """

    rows: int
    matrix_bytes: int
    state_bytes: int
    flops: float


class Host(NamedTuple):
    """What a step takes beside its kernels and collectives.

    Args:
        tokens: of a step that was measured, all sequences together.
        block_s, step_s: seconds for each decoder layer, and for a step besides.
    """

    tokens: int
    block_s: float
    step_s: float


@dataclass(frozen=True, slots=True)
class Device:
    """What a rank computes on.

    Args:
        flops: dtype -> floating-point operations per second of a large product.
        bytes_per_s: of a long stream from its memory.
        kernel_s: what every kernel takes at least.
        host: what the host takes besides, by tokens of a step; nothing where it runs ahead.
        products: dtype -> measured rates of products, used in place of the roofline.
        attention: dtype -> (queries of a head, operations per second) of measured attention to as
            many keys.
        streams: (bytes, bytes per second) of streams of several lengths, in place of one.
        fused: the same of fused kernels, which compute on what they move.
    """

    name: str
    flops: Mapping[torch.dtype, float]
    bytes_per_s: float
    kernel_s: float
    host: Sequence[Host] = ()
    products: Mapping[torch.dtype, tuple[Rate, ...]] | None = None
    attention: Mapping[torch.dtype, Sequence[Point]] | None = None
    streams: Sequence[Point] = ()
    fused: Sequence[Point] = ()
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
                needed=f"one of {', '.join(str(dtype) for dtype in self.flops)}",
            )
        rates = (self.products or {}).get(kernel.dtype)
        if rates and kernel.matrix_bytes:
            rate = _between(rates, (kernel.rows, kernel.matrix_bytes, state_bytes))
            return self.kernel_s + kernel.flops / rate
        stream = self._stream(kernel, state_bytes)
        return self.kernel_s + max(self._computing(kernel), kernel.num_bytes / stream)

    def host_seconds(self, tokens: int, blocks: int) -> float:
        """Of a step of so many tokens and decoder layers, between what was measured."""
        if not self.host:
            return 0.0
        sizes = np.log([host.tokens for host in self.host])
        seconds = [blocks * host.block_s + host.step_s for host in self.host]
        return float(np.interp(np.log(tokens), sizes, seconds))

    def _computing(self, kernel: Kernel) -> float:
        if not kernel.flops:
            return 0.0
        points = (self.attention or {}).get(kernel.dtype)
        if points and kernel.rows:
            return kernel.flops / _at(points, kernel.rows)
        return kernel.flops / self.flops[kernel.dtype]

    def _stream(self, kernel: Kernel, state_bytes: int) -> float:
        """Bytes per second."""
        if self.fused and kernel.name == FUSED:
            return _at(self.fused, kernel.num_bytes)
        if self.streams:
            return _at(self.streams, state_bytes if kernel.reads_state else kernel.num_bytes)
        return self.bytes_per_s


def _at(points: Sequence[Point], size: int) -> float:
    """The rate between the nearest measured ones, by logarithms."""
    sizes, rates = zip(*points, strict=True)
    return float(np.exp(np.interp(np.log(size), np.log(sizes), np.log(rates))))


@lru_cache(maxsize=4096)
def _between(rates: tuple[Rate, ...], place: tuple[int, int, int]) -> float:
    """Operations per second between the nearest measured ones, by logarithms.

    Args:
        place: rows, bytes of the matrix, bytes of all.
    """
    points = [((r.rows, r.matrix_bytes, r.state_bytes), r.flops) for r in rates]
    return float(np.exp(_interpolated(points, place)))


def _interpolated(points: Sequence[tuple[tuple[int, ...], float]], place: tuple[int, ...]) -> float:
    """The logarithm at a place: along its first coordinate, of what the others give there."""
    if not place:
        return float(np.log(points[0][1]))
    groups: dict[int, list[tuple[tuple[int, ...], float]]] = {}
    for (first, *rest), flops in points:
        groups.setdefault(first, []).append((tuple(rest), flops))
    known = sorted(groups)
    values = [_interpolated(groups[first], place[1:]) for first in known]
    return float(np.interp(np.log(place[0]), np.log(known), values))
