"""A few letters that tell checkpoints apart, without reading all of them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from spdcompile.runtime.stored import Stored
from spdcompile.runtime.weights import Weights

_ROWS, _LENGTH = 4, 64  # of the sample of each tensor


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
    """The begin of a few rows; all of a tensor without dims or entries."""
    shape = tuple(tensor.shape)
    if not shape or 0 in shape:
        whole = tensor.whole(tensor.dtype) if isinstance(tensor, Stored) else tensor
        return whole.reshape(-1).cpu().contiguous()
    *rows, last = shape
    length = min(last, _LENGTH)
    out = torch.empty((_ROWS, length), dtype=tensor.dtype)
    for number, row in enumerate(out):
        starts = tuple((size - 1) * number // (_ROWS - 1) for size in rows)
        if isinstance(tensor, Stored):
            tensor.fill(row.reshape([1] * len(rows) + [length]), (*starts, 0))
        else:
            row.copy_(tensor[starts][:length])
    return out
