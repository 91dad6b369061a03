"""Blocks of equal structure are compiled once, and a new length compiles nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.aot_compile_types import SerializableCallable

import spdcompile
from spdcompile.runtime import compiled_function
from spdcompile.runtime._torch import compile_ahead
from tests.models import tiny, token_ids

FIRST = (3, 21)
LATER = ((2, 13), (5, 37), (7, 19))


class _Plain(SerializableCallable):
    """A graph that is run as it is."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self.module = module

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    @classmethod
    def serialize_compile_artifacts(cls, _: Any) -> bytes:
        raise RuntimeError("not kept")

    @classmethod
    def deserialize_compile_artifacts(cls, _: bytes) -> Any:
        raise RuntimeError("not kept")


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of nodes of each graph that is handed to a backend."""
    seen: list[int] = []

    def backend(module: torch.fx.GraphModule, _: list[Any]) -> _Plain:
        seen.append(len(module.graph.nodes))
        return _Plain(module)

    monkeypatch.setattr(compiled_function, "compile_ahead", partial(compile_ahead, backend=backend))
    return seen


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_new_sizes_compile_nothing(family: str, compilations: list[int]) -> None:
    """One program for batches of two or more, one for batch 1, one for length 1."""
    compiled = spdcompile.compile(tiny(family, layers=3), tp=4, executor="local")
    for expected, shapes in ((3, (FIRST, *LATER)), (6, ((1, 9), (1, 17))), (9, ((2, 1), (4, 1)))):
        for batch, length in shapes:
            compiled(token_ids(batch=batch, length=length))
        # Prelude, one block for all three layers, postlude.
        assert len(compilations) == expected


def test_a_dropped_point_adds_one_block(compilations: list[int]) -> None:
    compiled = spdcompile.compile(tiny("llama", layers=3), tp=4, executor="local")
    compiled(token_ids(batch=FIRST[0], length=FIRST[1]))
    dropped = compiled.with_mask([True, False, True])
    dropped(token_ids(batch=FIRST[0], length=FIRST[1]))
    assert len(compilations) == 4
