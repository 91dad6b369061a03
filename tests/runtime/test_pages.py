"""Memory in large pages: what it holds, where it begins, and who owns it."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from spdcompile.runtime import pages
from spdcompile.runtime.packing import Pack, packed

BIG, SMALL = (3, 1024, 257), (5, 7)  # 3 MB, that is one large page and a rest, and no page at all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [BIG, SMALL, (0, 4), ()])
def test_holds_what_is_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    found = pages.empty(shape, dtype)
    assert found.shape == given.shape and found.dtype == dtype and found.is_contiguous()
    assert torch.equal(found.copy_(given), given)


def test_copy_of_a_strided_tensor_is_contiguous_and_its_own() -> None:
    given = torch.randn(1024, 1024).t()
    found = pages.settled(given)
    assert found.is_contiguous() and torch.equal(found, given)
    found.zero_()
    assert given.any()


def test_small_tensor_is_left_where_it_is() -> None:
    given = torch.randn(SMALL)
    assert pages.settled(given) is given


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux only")
def test_begins_with_a_page() -> None:
    assert pages.empty(BIG, torch.float32).data_ptr() % 2**21 == 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux only")
def test_whole_pages_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Listening(mmap.mmap):
        def madvise(self, *args: int) -> None:
            asked.append(args)
            super().madvise(*args)

    monkeypatch.setattr(pages.mmap, "mmap", Listening)
    pages.empty(BIG, torch.float32)
    ((advice, _, length),) = asked
    assert advice == mmap.MADV_HUGEPAGE and length == 2**21


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux only")
def test_packed_weights_lie_in_pages() -> None:
    given = {"a": torch.ones(512, 1024), "b": torch.ones(256, 1024)}
    found = packed(given.items(), (Pack("both", ("a", "b"), (512, 256)),))
    assert found["both"].data_ptr() % 2**21 == 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux only")
def test_memory_outlives_the_first_name_and_is_given_back() -> None:
    first = pages.empty((64, 2**20), torch.float32).fill_(3)
    rows = first[5]
    del first
    gc.collect()
    assert torch.equal(rows, torch.full((2**20,), 3.0))
    before = resident()
    del rows
    gc.collect()
    assert before - resident() > 200 * 2**20


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux only")
def test_system_without_large_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *args: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(pages.mmap, "mmap", Refusing)
    assert torch.equal(pages.empty(BIG, torch.float32).fill_(1), torch.ones(BIG))
