"""Blocks of equal structure are compiled once, and a new length compiles nothing."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import spdcompile
from spdcompile.runtime import compiled_function
from spdcompile.runtime._torch import Guarded, compile_ahead
from tests.models import tiny, token_ids

FIRST = (3, 21)
LATER = ((2, 13), (5, 37), (7, 19))


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """What is compiled, which is only traced here."""
    seen: list[nn.Module] = []

    def traced(module: nn.Module, inputs: tuple[Tensor, ...]) -> Guarded | None:
        seen.append(module)
        return compile_ahead(module, inputs, backend="aot_eager")

    monkeypatch.setattr(compiled_function, "compile_ahead", traced)
    monkeypatch.setattr(compiled_function, "work_in_use", lambda: None)
    return seen


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_new_sizes_compile_nothing(family: str, compilations: list[nn.Module]) -> None:
    """One program for batches of two or more, one for batch 1, one for length 1."""
    compiled = spdcompile.compile(tiny(family, layers=3), tp=4, executor="local")
    for expected, shapes in ((3, (FIRST, *LATER)), (6, ((1, 9), (1, 17))), (9, ((2, 1), (4, 1)))):
        for batch, length in shapes:
            compiled(token_ids(batch=batch, length=length))
        # Prelude, one block for all three layers, postlude.
        assert len(compilations) == expected


def test_a_dropped_point_adds_one_block(compilations: list[nn.Module]) -> None:
    compiled = spdcompile.compile(tiny("llama", layers=3), tp=4, executor="local")
    compiled(token_ids(batch=FIRST[0], length=FIRST[1]))
    dropped = compiled.with_mask([True, False, True])
    dropped(token_ids(batch=FIRST[0], length=FIRST[1]))
    assert len(compilations) == 4
