"""A tensor of one safetensors file, read box by box.

Read with `os.preadv` and not through safetensors' own slices: those map the file, so that its pages
count as the process's memory, or read a whole tensor for each slice of it (safetensors 0.8).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spdcompile.errors import CheckpointError
from spdcompile.runtime.stored import Stored

_AT_ONCE = 2**22  # bytes read before they are copied, so that a cast needs little memory


@dataclass(frozen=True, slots=True, eq=False)
class FileTensor(Stored):
    """A tensor of one safetensors file.

    Args:
        offset: where its data begins in the file.
    """

    file: Path
    key: str
    offset: int

    @property
    def place(self) -> str:
        return f"{self.key} in {self.file}"

    def fill(self, out: Tensor, starts: tuple[int, ...]) -> None:
        if out.numel():
            descriptor = os.open(self.file, os.O_RDONLY)
            try:
                self._fill(descriptor, out, starts)
            finally:
                os.close(descriptor)

    def _fill(self, descriptor: int, out: Tensor, starts: tuple[int, ...]) -> None:
        """Descends the dims until what is left is a stack of runs of the file that fits."""
        inner = _contiguous_dims(self.shape, out.shape)
        run = math.prod(out.shape[inner:]) * self.dtype.itemsize
        outer = math.prod(out.shape[:inner])
        if run * outer <= _AT_ONCE:
            return self._read(descriptor, out, starts, inner)
        dim = next(dim for dim, size in enumerate(out.shape) if size > 1)
        each = max(1, _AT_ONCE * out.shape[dim] // (run * outer))
        for first in range(0, out.shape[dim], each):
            part = out.narrow(dim, first, min(each, out.shape[dim] - first))
            begin = (*starts[:dim], starts[dim] + first, *starts[dim + 1 :])
            self._fill(descriptor, part, begin)
        return None

    def _read(self, descriptor: int, out: Tensor, starts: tuple[int, ...], inner: int) -> None:
        """Reads a box whose dims from `inner` on lie together in the file."""
        data = bytearray(out.numel() * self.dtype.itemsize)
        view, size = memoryview(data), self.dtype.itemsize
        strides = [math.prod(self.shape[dim + 1 :]) * size for dim in range(len(self.shape))]
        first = sum(start * stride for start, stride in zip(starts, strides, strict=True))
        run = math.prod(out.shape[inner:]) * size
        outer = itertools.product(*(range(length) for length in out.shape[:inner]))
        for number, place in enumerate(outer):
            ahead = sum(i * stride for i, stride in zip(place, strides[:inner], strict=True))
            self._read_run(descriptor, view[number * run : (number + 1) * run], first + ahead)
        out.copy_(torch.frombuffer(data, dtype=self.dtype).view(out.shape))

    def _read_run(self, descriptor: int, into: memoryview, place: int) -> None:
        done = 0
        while done < len(into):
            count = os.preadv(descriptor, [into[done:]], self.offset + place + done)
            if not count:
                raise CheckpointError(
                    "A checkpoint file is cut short.",
                    where=self.place,
                    found=f"the end of the file at byte {self.offset + place + done}",
                    needed="as many bytes as its header says",
                    fix="copy or download the file again",
                )
            done += count


def _contiguous_dims(whole: Sequence[int], box: Sequence[int]) -> int:
    """The first dim from which on a box of a tensor lies together in memory."""
    dim = len(whole)
    while dim > 0 and whole[dim:] == tuple(box[dim:]):
        dim -= 1
    return dim
