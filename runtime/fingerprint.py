"""A few letters that tell checkpoints apart, without reading all of them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from spdcompile.runtime.stored import Stored
from spdcompile.runtime.weights import Weights

_ROWS = 4
_SAMPLES = 256  # of each tensor, evenly spaced


def fingerprint(tensors: Weights) -> str:
    """SHA-256 of the names, shapes, dtypes and some values of global tensors.

    Args:
        tensors: by name. Only their samples are read, or copied to the CPU.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_samples(tensor).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _samples(tensor: Tensor | Stored) -> Tensor:
    if isinstance(tensor, Stored):
        return _read(tensor)
    count = tensor.numel()
    if not count or not tensor.ndim:
        return tensor.reshape(-1).cpu().contiguous()
    steps = min(count, _SAMPLES)
    flat = torch.arange(steps, device=tensor.device) * (count - 1) // max(steps - 1, 1)
    return tensor[torch.unravel_index(flat, tensor.shape)].cpu().contiguous()


def _read(stored: Stored) -> Tensor:
    """The begin of a few rows."""
    if not stored.shape or 0 in stored.shape:
        return stored.whole(stored.dtype).reshape(-1)
    *rows, last = stored.shape
    length = min(last, _SAMPLES // _ROWS)
    out = torch.empty((_ROWS, length), dtype=stored.dtype)
    for number, row in enumerate(out):
        starts = tuple((size - 1) * number // (_ROWS - 1) for size in rows)
        stored.fill(row.reshape([1] * len(rows) + [length]), (*starts, 0))
    return out
