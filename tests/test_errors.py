"""The errors' message form, their way through pickle, and what catches them."""

from __future__ import annotations

import pickle

import pytest

from spdcompile import errors
from spdcompile.errors import PassError, RefusalError, SpdCompileError

PARTS = {"where": "roll_3", "found": "S(2)", "needed": "a row for S(2)", "fix": "add it"}
EXAMPLES = [
    *(
        cls("It failed.", **PARTS)
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, SpdCompileError)
        if cls not in (PassError, RefusalError)
    ),
    PassError("It failed.", pass_name="drop", passes_before=("capture", "sync"), fix="add it"),
    RefusalError("It failed.", point="model.layers.3.attn", reason="a norm follows"),
]


def test_message_has_its_parts_in_order() -> None:
    assert str(SpdCompileError("No rule.", **PARTS)).splitlines() == [
        "No rule.",
        "  where  : roll_3",
        "  found  : S(2)",
        "  needed : a row for S(2)",
        "  fix    : add it",
    ]


def test_message_leaves_out_what_is_not_given() -> None:
    assert str(SpdCompileError("No rule.")) == "No rule."
    assert str(SpdCompileError("No rule.", fix="add it")) == "No rule.\n  fix    : add it"


def test_further_lines_of_a_part_are_indented() -> None:
    lines = str(SpdCompileError("No rule.", found="one\ntwo")).splitlines()
    assert lines[1:] == ["  found  : one", "           two"]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_error_survives_pickling(error: SpdCompileError) -> None:
    restored = pickle.loads(pickle.dumps(error))
    assert type(restored) is type(error)
    assert str(restored) == str(error)
    assert vars(restored) == vars(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_only_a_users_mistake_is_a_value_error(error: SpdCompileError) -> None:
    files = (errors.CheckpointError, errors.ArtefactError)
    mistakes = (errors.UsageError, errors.PlanError, RefusalError, *files)
    assert isinstance(error, ValueError) == isinstance(error, mistakes)


def test_pass_error_names_the_passes_before() -> None:
    error = PassError("It failed.", pass_name="drop", passes_before=["capture", "sync"])
    assert error.where == "pass drop, after capture, sync"
    assert error.passes_before == ("capture", "sync")
    assert PassError("It failed.", pass_name="capture").where == "pass capture, after no other pass"


def test_refusal_names_point_and_reason() -> None:
    error = RefusalError("Cannot drop.", point="layers.3.attn", reason="a norm follows")
    assert (error.point, error.reason) == ("layers.3.attn", "a norm follows")
    assert (error.where, error.found) == ("sync point layers.3.attn", "a norm follows")
