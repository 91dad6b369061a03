"""`estimate`, `replay` and `measure-machine`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spdcompile
from tests.cli.conftest import NUM_LAYERS, Command

Config = Callable[[str], str]
ON = ("--device", "a100-80g", "--link", "pcie4", "--dtype", "bfloat16")


def test_estimate_tells_both_steps(command: Command, config_of: Config) -> None:
    argv = ("--tp", "4", "--spd-mask", "0-1", *ON, "--prompt", "16", "--context", "32")
    outcome = command("estimate", config_of("llama_gqa"), *argv)
    assert outcome.code == 0
    assert outcome.err == ""
    for step in ("prefill, 1 x 16 tokens", "decode, 1 x 1 token at context 32"):
        rows = [line for line in outcome.out.splitlines() if step in line]
        assert ["nothing" in rows[0], "2 sync points" in rows[1]] == [True, True]
    assert "datasheet" in outcome.out


@pytest.fixture
def document(command: Command, config_of: Config) -> dict[str, Any]:
    argv = ("--tp", "4", "--spd-mask", "all", *ON, "--prompt", "16", "--context", "32")
    return json.loads(command("estimate", config_of("llama_gqa"), *argv, "--json", "-").out)


def test_json_holds_what_the_table_shows(document: dict[str, Any]) -> None:
    assert document["model"]["type"] == "llama"
    assert [step["step"] for step in document["steps"]] == ["prefill", "decode"]
    for step in document["steps"]:
        plain, dropped = step["plain"], step["dropped"]
        assert plain["total_s"] == pytest.approx(plain["compute_s"] + plain["communication_s"])
        gone = plain["communication_s"] - dropped["communication_s"]
        assert step["ideal_gain"] == pytest.approx(gone / plain["total_s"])
        assert step["expected_gain"] == pytest.approx(1 - dropped["total_s"] / plain["total_s"])
        assert 0 < step["expected_gain"] <= step["ideal_gain"] < 0.5


def test_function_gives_what_the_command_gives(document: dict[str, Any], config_of: Config) -> None:
    import torch

    found = spdcompile.estimate_latency(
        config_of("llama_gqa"),
        tp=4,
        device="a100-80g",
        link="pcie4",
        spd_mask=[True] * NUM_LAYERS,
        dtype=torch.bfloat16,
        prompt=16,
        context=32,
    )
    assert found.to_dict()["steps"] == document["steps"]


def test_nothing_dropped_gains_nothing(config_of: Config) -> None:
    found = spdcompile.estimate_latency(config_of("opt"), tp=2, device="h100", link="nvlink4")
    assert [(step.ideal_gain, step.expected_gain) for step in found.steps] == [(0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--device", "tpu", "--link", "pcie4"), "a100-80g"),
        (("--device", "h100", "--link", "wire"), "two-nodes"),
        (("--device", "h100", "--link", "pcie4", "--machine", "/nowhere.json"), "/nowhere.json"),
    ],
)
def test_unknown_names_are_mistakes(
    command: Command, config_of: Config, options: tuple[str, ...], named: str
) -> None:
    outcome = command("estimate", config_of("llama_gqa"), "--tp", "2", *options)
    assert outcome.code == 2
    assert named in outcome.err


def test_replay_runs_a_model_without_weights(
    command: Command, config_of: Config, tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    argv = ("--tp", "2", "--link", "pcie4", "--share", "0", "--share", "100", "--batch", "1")
    argv += ("--prompt", "8", "--context", "9", "--backend", "eager", "--rounds", "1")
    outcome = command("replay", config_of("llama_gqa"), *argv, "--json", str(path))
    assert outcome.code == 0
    found = json.loads(path.read_text())
    assert [(row["step"], row["dropped"], row["collectives"]) for row in found["rows"]] == [
        ("prefill", 0, 2 * NUM_LAYERS + 1),
        ("decode", 0, 2 * NUM_LAYERS + 1),
        ("prefill", NUM_LAYERS, NUM_LAYERS + 1),
        ("decode", NUM_LAYERS, NUM_LAYERS + 1),
    ]
    assert "compute ms, measured" in outcome.out


def test_replay_refuses_what_is_no_device(command: Command, config_of: Config) -> None:
    argv = ("--tp", "2", "--link", "pcie4", "--device", "abacus")
    outcome = command("replay", config_of("llama_gqa"), *argv)
    assert outcome.code == 2
    assert "--device abacus" in outcome.err


def test_one_rank_has_no_link(command: Command, tmp_path: Path) -> None:
    outcome = command("measure-machine", "--ranks", "1", "--output", str(tmp_path / "x.json"))
    assert outcome.code == 2
    assert "One rank has no link" in outcome.err
