"""For which lengths an exported graph holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spdcompile.errors import CaptureError
from spdcompile.passes._torch import check_size
from spdcompile.passes.export import export

DEVICE = torch.device("cpu")


class _Of(nn.Module):
    """A module that computes `function(input_ids)`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        for other in (attention_mask, position_ids):
            for dim in (0, 1):
                check_size(other.shape[dim] == input_ids.shape[dim])
        return self.function(input_ids) + attention_mask[:, :1] + position_ids[:, :1]


def _picks_some(ids: Tensor) -> Tensor:
    """The condition min(4, S) <= S always holds, and torch cannot prove it."""
    return ids.topk(min(4, ids.shape[1])).values[:, :1]


def _has_two_paths(ids: Tensor) -> Tensor:
    return ids.sum(1, keepdim=True) if ids.shape[1] <= 40 else ids[:, :1]


def _has_two_paths_that_mix(ids: Tensor) -> Tensor:
    """The conditions are of a minimum, so that no range of lengths expresses them."""
    if max(0, 64 - ids.shape[1]) + ids.shape[1] == 64:
        return ids[:, :1]
    return ids[:, -1:]


@pytest.mark.parametrize(
    ("function", "longest"),
    [
        (lambda ids: ids.sum(1, keepdim=True), None),
        (_picks_some, None),
        (_has_two_paths, 40),
        (_has_two_paths_that_mix, 64),
    ],
)
def test_export_finds_the_longest_input(
    function: Callable[[Tensor], Tensor], longest: int | None
) -> None:
    exported = export(_Of(function), DEVICE)
    assert exported.max_length == longest
    ids = torch.arange(26).reshape(2, 13)
    zeros = torch.zeros_like(ids)
    with torch.no_grad():
        assert exported.program.module()(ids, zeros, zeros).equal(function(ids))


def _is_for_long_inputs(ids: Tensor) -> Tensor:
    return ids[:, :1] if ids.shape[1] < 6 else ids.sum(1, keepdim=True)


def _is_for_long_inputs_by_a_minimum(ids: Tensor) -> Tensor:
    return ids[:, :1] if min(ids.shape[1], 6) * 2 < 12 else ids.sum(1, keepdim=True)


def _is_not_for_five(ids: Tensor) -> Tensor:
    return ids[:, :1] if ids.shape[1] == 5 else ids.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "function", [_is_for_long_inputs, _is_for_long_inputs_by_a_minimum, _is_not_for_five]
)
def test_export_finds_the_shortest_input(function: Callable[[Tensor], Tensor]) -> None:
    exported = export(_Of(function), DEVICE)
    assert (exported.min_length, exported.max_length) == (6, None)
    ids = torch.arange(12).reshape(2, 6)
    zeros = torch.zeros_like(ids)
    with torch.no_grad():
        assert exported.program.module()(ids, zeros, zeros).equal(function(ids))


def _is_for_few(ids: Tensor) -> Tensor:
    return ids[:, :1] if ids.shape[0] > 4 else ids.sum(1, keepdim=True)


def _is_for_many(ids: Tensor) -> Tensor:
    return ids[:, :1] if ids.shape[0] < 3 else ids.sum(1, keepdim=True)


def _is_for_many_by_a_minimum(ids: Tensor) -> Tensor:
    return ids[:, :1] if min(ids.shape[0], 3) * 2 < 6 else ids.sum(1, keepdim=True)


@pytest.mark.parametrize("function", [_is_for_few, _is_for_many, _is_for_many_by_a_minimum])
def test_export_refuses_a_graph_of_some_batches_alone(
    function: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(CaptureError, match="another path for other inputs"):
        export(_Of(function), DEVICE)


def test_export_refuses_a_loop_over_tokens() -> None:
    def scan(ids: Tensor) -> Tensor:
        total = torch.zeros_like(ids[:, :1])
        for place in range(ids.shape[1]):
            total = total + ids[:, place : place + 1]
        return total

    with pytest.raises(Exception, match=r"static shape of 11|constant \(11\)"):
        export(_Of(scan), DEVICE)
