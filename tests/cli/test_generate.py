"""`generate` on the bundled model: what it prints, and what it refuses."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spdcompile
from tests.cli.conftest import Command

MODEL = str(Path(__file__).parents[2] / "examples" / "models" / "tiny-llama")
PROMPT = "The database"
NUM_NEW = 24
OPTIONS = ("--tp", "2", "--backend", "eager", "--max-new-tokens", str(NUM_NEW))


@cache
def _expected(**settings: float) -> str:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(3)
    out = model.generate(**prompt, max_new_tokens=NUM_NEW, do_sample=bool(settings), **settings)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def test_greedy_text_is_the_model_s_own(command: Command) -> None:
    outcome = command("generate", MODEL, "--prompt", PROMPT, *OPTIONS)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == _expected() + "\n"
    assert len(_expected()) > len(PROMPT) + NUM_NEW


def test_drawn_text_is_the_model_s_own(command: Command) -> None:
    drawn = ("--temperature", "1.5", "--top-k", "9", "--seed", "3")
    outcome = command("generate", MODEL, "--prompt", PROMPT, *OPTIONS, *drawn)
    assert outcome.out == _expected(temperature=1.5, top_k=9) + "\n" != _expected() + "\n"


def test_text_ends_at_the_stop_text(command: Command) -> None:
    word = _expected()[len(PROMPT) :].split()[2]
    outcome = command("generate", MODEL, "--prompt", PROMPT, *OPTIONS, "--stop", word)
    assert outcome.out.rstrip("\n").endswith(word)
    assert len(outcome.out) < len(_expected())


def test_dropped_sync_points_change_the_text(command: Command) -> None:
    options = ("--spd-mask", "0-5", "--drop", "0-6.mlp")
    outcome = command("generate", MODEL, "--prompt", PROMPT, *OPTIONS, *options)
    assert outcome.code == 0
    assert outcome.out != _expected() + "\n"


def test_weights_in_half_precision_give_text(command: Command) -> None:
    outcome = command("generate", MODEL, "--prompt", PROMPT, *OPTIONS, "--dtype", "bfloat16")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(PROMPT) and len(outcome.out) > len(PROMPT) + NUM_NEW


def test_vocabulary_is_split_if_told(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plain = [], spdcompile.compile

    def noting(*args: Any, **settings: Any) -> spdcompile.CompiledModel:
        made.append(plain(*args, **settings))
        return made[-1]

    monkeypatch.setattr(spdcompile, "compile", noting)
    outcome = command("generate", MODEL, "--prompt", PROMPT, *OPTIONS, "--vocab", "split")
    assert outcome.out == _expected() + "\n"
    held = {tuple(tensor.shape) for tensor in made[0].executor.params["prelude"].values()}
    config = made[0].config
    assert (2, config.vocab_size // 2, config.hidden_size) in held


def test_settings_of_draws_without_a_temperature_are_a_message(command: Command) -> None:
    outcome = command("generate", MODEL, "--prompt", PROMPT, *OPTIONS, "--top-p", "0.9")
    assert outcome.code == 2
    assert "--top-p" in outcome.err and "--temperature besides" in outcome.err


@pytest.mark.parametrize("files", [{"config__json": '{"model_type": "llama"}'}, {}])
def test_directory_without_weights_is_a_message(command: Command, make_directory, files) -> None:
    outcome = command("generate", make_directory(**files), "--prompt", PROMPT, *OPTIONS)
    assert outcome.code == 2
    assert outcome.out == "" and "Traceback" not in outcome.err
