"""What `bench` refuses, before it starts anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cli.conftest import Command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tp", "2", "--spd-mask", "3"), "The model has no layer 3."),
        (("--tp", "2", "--spd-mask", "2-1"), "runs backwards"),
        (("--tp", "2", "--spd-mask", "none"), "The mask drops nothing."),
        (("--tp", "2", "--only", "hf-eager", "fast"), "There is no variant 'fast'."),
        (("--tp", "2", "--only", "spd-shm/0"), "There is no variant 'spd-shm/0'."),
        (("--tp", "2", "--context", "99999999"), "The texts are too long for the model."),
        (
            (
                "--tp",
                "4096",
            ),
            "needed : 4096 cores",
        ),
    ],
)
def test_mistake_in_options_is_a_message(
    command: Command, config_of: Callable[[str], str], options: tuple[str, ...], said: str
) -> None:
    outcome = command("bench", config_of("llama_gqa"), "--quick", *options)
    assert outcome.code == 2
    assert outcome.err.startswith("spdcompile: ")
    assert said in outcome.err
    assert outcome.out == ""


def test_directory_without_model_is_a_message(command: Command) -> None:
    outcome = command("bench", "nowhere", "--tp", "2")
    assert outcome.code == 2
    assert "nowhere is not a directory" in outcome.err
