"""Memory for weights in large pages, where the system has them.

A next token reads every weight once. Of pages of 4 KB that is slowed by looking up where each of
them lies, and by prefetching that ends with each (docs/speed.md has figures).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_CPU = torch.device("cpu")
_PAGE = 2**21  # of x86-64 and of most arm64 kernels


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
    """An uninitialised tensor, on a CPU in large pages if it fills one and the system grants them.

    What does not fill a large page lies in small ones, so that no memory is wasted.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    region = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -torch.frombuffer(region, dtype=torch.uint8).data_ptr() % _PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        region.madvise(mmap.MADV_HUGEPAGE, first, size // _PAGE * _PAGE)
    flat = torch.frombuffer(region, dtype=dtype, count=math.prod(shape), offset=first)
    return flat.view(*shape)


def settled(tensor: Tensor) -> Tensor:
    """A contiguous copy in such memory; the tensor itself if it is contiguous and small."""
    if tensor.nbytes < _PAGE:
        return tensor.contiguous()
    return empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)
