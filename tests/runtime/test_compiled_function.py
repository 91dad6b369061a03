"""Compiled graphs: which inputs and settings one holds for, and what is written down of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spdcompile.runtime import compiled_function, kernel_directory
from spdcompile.runtime.compiled_function import CompiledFunction
from spdcompile.runtime.kernel_directory import INDUCTOR_VARIABLE, work_directory


class _Product(nn.Module):
    def forward(self, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (torch.relu(x * y) @ weight, x.sum(1))


WEIGHT = nn.Parameter(torch.randn(4, 3), requires_grad=False)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(INDUCTOR_VARIABLE, raising=False)
    monkeypatch.setattr(kernel_directory, "_work", None)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each compilation."""
    seen: list[int] = []
    original = compiled_function.compile_ahead

    def counted(*arguments: object) -> object:
        seen.append(1)
        return original(*arguments)

    monkeypatch.setattr(compiled_function, "compile_ahead", counted)
    return seen


def _run(function: CompiledFunction, x: Tensor, y: Tensor, weight: Tensor = WEIGHT) -> None:
    work = work_directory()
    assert work is not None
    with work.in_use():
        found = function(x, y, weight)
    for one, other in zip(found, _Product()(x, y, weight), strict=True):
        torch.testing.assert_close(one, other)


def test_each_kind_of_input_is_compiled_once(compiled: list[int]) -> None:
    function = CompiledFunction(_Product(), "product")
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    steps = [
        (1, partial(_run, function, x, y)),
        (1, partial(_run, function, x[:3], y[:3])),  # another size
        (2, partial(_run, function, x[:1], y[:1])),  # one row, which broadcasts
        (3, partial(_run, function, x, y[:1])),
        (4, partial(_run, function, x, x)),  # the same tensor twice
        (4, partial(_run, function, y[:2], y[:2].clone())),
        (5, partial(_run, function, x.double(), y.double(), nn.Parameter(WEIGHT.double(), False))),
        (5, partial(_run, function, x, y)),
    ]
    for expected, step in steps:
        step()
        assert len(compiled) == expected


def test_settings_that_change_the_result_are_conditions(compiled: list[int]) -> None:
    function = CompiledFunction(_Product(), "product")
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    _run(function, x, y)
    torch.use_deterministic_algorithms(True)
    try:
        _run(function, x, y)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(compiled) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert function(x, y, WEIGHT)[0].dtype == torch.bfloat16
    with torch.no_grad():
        _run(function, x, y)
    assert len(compiled) == 3, "autocast is torch.compile's own"


def test_gradients_are_those_of_the_module_and_transforms_are_refused(compiled: list[int]) -> None:
    function, x, y = CompiledFunction(_Product(), "product"), torch.randn(5, 4), torch.randn(5, 4)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(_Product()(x, y, WEIGHT)[0].sum(), x)
    (found,) = torch.autograd.grad(function(x, y, WEIGHT)[0].sum(), x)
    torch.testing.assert_close(found, expected)
    with pytest.raises(Exception, match="functorch"):  # not a wrong result
        torch.func.grad(lambda x: function(x, y, WEIGHT)[0].sum())(x.detach())
    assert not compiled


def test_kept_variants_are_read_and_other_texts_or_sizes_are_not(compiled: list[int]) -> None:
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    _run(CompiledFunction(_Product(), "product"), x, y)
    _run(CompiledFunction(_Product(), "product"), x[:3], y[:3])
    assert len(compiled) == 1
    _run(CompiledFunction(_Product(), "another"), x, y)
    assert len(compiled) == 2
    wider = nn.Parameter(torch.randn(4, 7), requires_grad=False)
    _run(CompiledFunction(_Product(), "product"), x, y, wider)
    assert len(compiled) == 3
    _run(CompiledFunction(_Product(), "product"), x[:1], y[:1])
    assert len(compiled) == 4, "its conditions do not hold for one row"


def test_unreadable_variant_is_compiled_anew(compiled: list[int], notices: list[str]) -> None:
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    _run(CompiledFunction(_Product(), "product"), x, y)
    work = kernel_directory._work
    (file,) = (work.path / "functions").glob("*/*")
    file.write_bytes(file.read_bytes()[:500])
    _run(CompiledFunction(_Product(), "product"), x, y)
    assert len(compiled) == 2
    (notice,) = notices
    assert notice.startswith("Compiled anew, since a kept function cannot be read: ")


def test_without_a_directory_nothing_is_kept(
    compiled: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INDUCTOR_VARIABLE, str(tmp_path / "own"))
    function = CompiledFunction(_Product(), "product")
    function(torch.randn(5, 4), torch.randn(5, 4), WEIGHT)
    assert len(compiled) == 1
    assert not list(tmp_path.rglob("functions"))


def test_a_torch_that_cannot_compile_ahead_compiles_as_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled_function, "compile_ahead", lambda *_: None)
    _run(CompiledFunction(_Product(), "product"), torch.randn(5, 4), torch.randn(5, 4))


def test_what_held_last_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class OfOneSize:
        def __init__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.size = len(inputs[0])

        def holds_for(self, inputs: tuple[Tensor, ...]) -> bool:
            asked.append(self.size)
            return len(inputs[0]) == self.size

        def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return inputs

    monkeypatch.setattr(compiled_function, "compile_ahead", OfOneSize)
    function = CompiledFunction(_Product(), "")
    for size in (1, 2, 2, 1, 1):
        function(torch.ones(size))
    assert asked == [1, *(1, 2), *(2, 1), 1]
