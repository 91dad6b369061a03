"""Checkpoints on disk for the tests of loading, and what is read of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from spdcompile.runtime.file_tensor import FileTensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Tensors = dict[str, Tensor]


def saved(model: PreTrainedModel, folder: Path, *, files: int = 1) -> Path:
    """Saves a model in one file or several, as save_pretrained does."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=size if files == 1 else size // files)
    assert (folder / INDEX).exists() == (files > 1)
    return folder


def edit(folder: Path, change: Callable[[Tensors], object], file: str = SINGLE) -> None:
    """Rewrites a file of a checkpoint after `change` had its tensors."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)


def edit_config(folder: Path, **settings: object) -> None:
    """Changes settings of a config.json."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **settings}
    path.write_text(json.dumps(config), encoding="utf-8")


class Reads:
    """The byte ranges that were read: (file, first, behind the last)."""

    def __init__(self) -> None:
        self.ranges: list[tuple[str, int, int]] = []

    @property
    def total(self) -> int:
        """Bytes read."""
        return sum(stop - start for _, start, stop in self.ranges)

    @property
    def twice(self) -> int:
        """Bytes that were read more than once."""
        pairs = pairwise(sorted(self.ranges))
        return sum(max(0, min(a[2], b[2]) - b[1]) for a, b in pairs if a[0] == b[0])


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[Reads]:
    """Notes what is read of checkpoints."""
    reads, read_run = Reads(), FileTensor._read_run

    def noting(self: FileTensor, descriptor: int, into: memoryview, place: int) -> None:
        begin = self.offset + place
        reads.ranges.append((str(self.file), begin, begin + len(into)))
        read_run(self, descriptor, into, place)

    with patch.context() as patched:
        patched.setattr(FileTensor, "_read_run", noting)
        yield reads


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit, in dtype and shape too."""
    return a.dtype == b.dtype and torch.equal(a, b)
