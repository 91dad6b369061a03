"""One distance between tensors, used by every numeric test."""

from __future__ import annotations

from torch import Tensor


def rel_err(a: Tensor, b: Tensor, *, real: Tensor | None = None) -> float:
    """Largest difference between `a` and `b`, relative to the largest entry of `b`.

    Args:
        a: Result, any shape.
        b: Expected result, the same shape and dtype.
        real: Optional [B, S] mask of 0/1; only positions with 1 are compared, because the logits
            of a padding token mean nothing and differ between attention kernels.

    Raises:
        ValueError: Shapes or dtypes differ, `real` selects nothing, or a compared entry is not
            finite.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"cannot compare {tuple(a.shape)} {a.dtype} with {tuple(b.shape)} {b.dtype}"
        )
    if real is not None:
        a, b = a[real.bool()], b[real.bool()]
    if b.numel() == 0:
        raise ValueError("nothing to compare")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("a compared entry is not finite")
    return ((a - b).abs().max() / b.abs().max()).item()
