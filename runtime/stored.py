"""Tensors that stay in their files until a rank asks for its part of them."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spdcompile.errors import CheckpointError
from spdcompile.runtime import pages


@dataclass(frozen=True, slots=True, eq=False)
class Stored(ABC):
    """A tensor in files.

    Args:
        shape: its shape.
        dtype: the dtype it is stored in.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def fill(self, out: Tensor, starts: tuple[int, ...]) -> None:
        """Reads the box of out's shape that begins at `starts` into `out`, which may be strided."""

    @property
    @abstractmethod
    def place(self) -> str:
        """File and tensor, for messages."""

    def whole(self, dtype: torch.dtype) -> Tensor:
        """All of it, contiguous, in another dtype.

        Raises:
            CheckpointError: the file has fewer bytes than its header says.
        """
        out = pages.empty(self.shape, dtype)
        self.fill(out, (0,) * len(self.shape))
        return out

    def take(self, dim: int, index: np.ndarray, dtype: torch.dtype) -> Tensor:
        """The entries `index` along `dim`, contiguous, zeros where it is -1; nothing else is read.

        Args:
            index: int64 [local size]; an entry that occurs several times is read once.

        Raises:
            CheckpointError: the file has fewer bytes than its header says.
        """
        held = index[index >= 0]
        unique, back = np.unique(held, return_inverse=True)
        if len(unique) < len(held):
            inverse = np.where(index >= 0, 0, -1)
            inverse[index >= 0] = back
            return _pick(self.take(dim, unique, dtype), dim, inverse)
        shape = (*self.shape[:dim], len(index), *self.shape[dim + 1 :])
        out = pages.empty(shape, dtype)
        for local, first, length in _runs(index):
            piece = out.narrow(dim, local, length)
            if first < 0:
                piece.zero_()
            else:
                self.fill(piece, (0,) * dim + (first,) + (0,) * (len(shape) - dim - 1))
        return out

    # What transformers' conversions of checkpoints do to tensors; whatever else they try raises.

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = {torch.stack: _stack, torch.cat: _cat, torch.chunk: _chunk}.get(func)
        return NotImplemented if made is None else made(*args, **(kwargs or {}))

    def contiguous(self) -> Stored:
        return self


def _pick(tensor: Tensor, dim: int, index: np.ndarray) -> Tensor:
    """`tensor` at `index` along `dim`, zeros where it is -1."""
    picked = tensor.index_select(dim, torch.from_numpy(index.clip(min=0)))
    gone = torch.from_numpy(np.flatnonzero(index < 0))
    return picked.index_fill_(dim, gone, 0)


def _runs(index: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(place, first entry, length) of each stretch of consecutive entries, or of -1."""
    if not len(index):
        return
    consecutive = (np.diff(index) == 1) & (index[:-1] >= 0)
    padding = (index[1:] < 0) & (index[:-1] < 0)
    breaks = np.flatnonzero(~(consecutive | padding)) + 1
    for start, stop in itertools.pairwise([0, *breaks.tolist(), len(index)]):
        yield start, int(index[start]), stop - start


@dataclass(frozen=True, slots=True, eq=False)
class Stacked(Stored):
    """Tensors stacked along a new dim."""

    parts: tuple[Stored, ...]
    dim: int

    @property
    def place(self) -> str:
        return _place(self.parts)

    def fill(self, out: Tensor, starts: tuple[int, ...]) -> None:
        rest = starts[: self.dim] + starts[self.dim + 1 :]
        for number in range(out.shape[self.dim]):
            self.parts[starts[self.dim] + number].fill(out.select(self.dim, number), rest)


@dataclass(frozen=True, slots=True, eq=False)
class Joined(Stored):
    """Tensors joined along a dim."""

    parts: tuple[Stored, ...]
    dim: int

    @property
    def place(self) -> str:
        return _place(self.parts)

    def fill(self, out: Tensor, starts: tuple[int, ...]) -> None:
        dim, low = self.dim, starts[self.dim]
        high, begin = low + out.shape[dim], 0
        for part in self.parts:
            end = begin + part.shape[dim]
            first, last = max(low, begin), min(high, end)
            if first < last:
                inside = (*starts[:dim], first - begin, *starts[dim + 1 :])
                part.fill(out.narrow(dim, first - low, last - first), inside)
            begin = end


@dataclass(frozen=True, slots=True, eq=False)
class Cut(Stored):
    """A stretch of a tensor along a dim."""

    of: Stored
    dim: int
    start: int

    @property
    def place(self) -> str:
        return self.of.place

    def fill(self, out: Tensor, starts: tuple[int, ...]) -> None:
        dim = self.dim
        self.of.fill(out, (*starts[:dim], starts[dim] + self.start, *starts[dim + 1 :]))


@dataclass(frozen=True, slots=True, eq=False)
class Kept(Stored):
    """A tensor whose parts are kept once read: several parameters take the same."""

    of: Stored
    read: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return self.of.place

    def fill(self, out: Tensor, starts: tuple[int, ...]) -> None:
        self.of.fill(out, starts)

    def whole(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self.read:
            self.read[dtype] = self.of.whole(dtype)
        return self.read[dtype]

    def take(self, dim: int, index: np.ndarray, dtype: torch.dtype) -> Tensor:
        key = (dim, index.tobytes(), dtype)
        if key not in self.read:
            self.read[key] = self.of.take(dim, index, dtype)
        return self.read[key]


def _place(parts: tuple[Stored, ...]) -> str:
    more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
    return f"{parts[0].place}{more}"


def _stack(parts: Sequence[Stored], dim: int = 0) -> Stored:
    _check_alike(parts, None)
    first = parts[0]
    dim = dim % (len(first.shape) + 1)
    shape = (*first.shape[:dim], len(parts), *first.shape[dim:])
    return Stacked(shape, first.dtype, tuple(parts), dim)


def _cat(parts: Sequence[Stored], dim: int = 0) -> Stored:
    first = parts[0]
    dim = dim % len(first.shape)
    _check_alike(parts, dim)
    size = sum(part.shape[dim] for part in parts)
    shape = (*first.shape[:dim], size, *first.shape[dim + 1 :])
    return Joined(shape, first.dtype, tuple(parts), dim)


def _chunk(whole: Stored, chunks: int, dim: int = 0) -> tuple[Stored, ...]:
    dim = dim % len(whole.shape)
    size = whole.shape[dim]
    each = -(-size // chunks)
    made = []
    for start in range(0, size, each):
        length = min(each, size - start)
        shape = (*whole.shape[:dim], length, *whole.shape[dim + 1 :])
        made.append(Cut(shape, whole.dtype, whole, dim, start))
    return tuple(made)


def _check_alike(parts: Sequence[Stored], dim: int | None) -> None:
    """Raises CheckpointError unless the shapes agree in every dim but `dim`."""
    first = parts[0]
    for part in parts[1:]:
        pairs = list(itertools.zip_longest(first.shape, part.shape))
        if any(a != b for number, (a, b) in enumerate(pairs) if number != dim):
            raise CheckpointError(
                "Two tensors that belong together have different shapes.",
                where=part.place,
                found=f"{list(part.shape)}",
                needed=f"the shape of {first.place}, {list(first.shape)}",
            )
