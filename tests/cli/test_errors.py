"""What a user reads who asked for what cannot be had: a message, no traceback, exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from spdcompile.cli import main
from spdcompile.errors import CaptureError, UsageError
from spdcompile.models import resolve_model
from spdcompile.passes import pipeline
from tests.cli.conftest import Command
from tests.models import tiny

T5 = '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'
BERT = '{"model_type": "bert"}'
CLASSIFIER = '{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}'
REMOTE = '{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}'


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--spd-mask", "2-1"), "runs backwards"),
        (("--spd-mask", "0-3"), "found  : 0-3 for a model of 3 layers"),
        (("--drop", "1"), "needed : sync points such as 3.mlp or 4-6.attn"),
        (("--drop", "1.norm"), "layer 1 has no sync point 'norm'"),
        (("--print", "lower"), "needed : one of: capture, normalize, split, tokens, regions"),
        (("--stop-after", "x"), "There is no pass 'x'."),
        (("--stop-after", "split", "--print", "sync"), "needed : a pass up to split"),
        (("--stop-after", "split", "--json", "-"), "no report of a program that is not finished"),
        (("--print", "split", "--json", "-"), "cannot both go to stdout"),
        (("--json", "/nowhere/report.json"), "/nowhere is not a directory"),
    ],
)
def test_mistake_in_options_is_a_message(
    trace: Command, options: tuple[str, ...], said: str
) -> None:
    outcome = trace("llama_gqa", *options)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.startswith("spdcompile: ")
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("gemma2", "found  : model.layers.0.post_attention_layernorm acts on the sum"),
        ("gpt_neox", "it is merged into layers.0.mlp"),
    ],
)
def test_point_that_cannot_be_dropped_is_a_message(trace: Command, family: str, said: str) -> None:
    outcome = trace(family, "--spd-mask", "0")
    assert outcome.code == 2
    assert said in outcome.err


def test_more_ranks_than_heads_pad(command: Command, config_of: Callable[[str], str]) -> None:
    outcome = command("trace-and-report", config_of("llama_gqa"), "--tp", "64")
    assert outcome.code == 0
    assert "64: 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |" in outcome.out or "padded" in outcome.out
    assert "further copies of shared heads" in outcome.out


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no config.json."),
        ({"config__json": "{"}, "transformers cannot make a model of this configuration."),
        ({"config__json": '{"model_type": "mine"}'}, "cannot make a model of this configuration."),
        ({"config__json": REMOTE}, "code from a checkpoint is never run"),
        ({"config__json": T5}, "found  : model type 't5' (T5ForConditionalGeneration)"),
        ({"config__json": BERT}, "found  : model type 'bert' with is_decoder=false"),
        ({"config__json": CLASSIFIER}, "(LlamaForSequenceClassification)"),
    ],
)
def test_directory_without_causal_lm_is_a_message(
    command: Command, make_directory: Callable[..., str], files: dict[str, str], said: str
) -> None:
    outcome = command("trace-and-report", make_directory(**files), "--tp", "2")
    assert outcome.code == 2
    assert said in outcome.err
    assert "Traceback" not in outcome.err


def test_name_on_the_hub_is_a_message(command: Command) -> None:
    outcome = command("trace-and-report", "meta-llama/Llama-3.1-8B", "--tp", "2")
    assert outcome.code == 2
    assert "only local directories are read, nothing is downloaded" in outcome.err


@pytest.mark.parametrize("number", ["0", "-2", "two"])
def test_number_of_ranks_is_positive(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["trace-and-report", "anywhere", f"--tp={number}"])
    assert caught.value.code == 2
    assert "argument --tp" in capsys.readouterr().err


def fail_to_capture(model: object) -> None:
    raise CaptureError("It cannot be captured.", fix="report the architecture")


@pytest.mark.parametrize(("logs", "traced"), [("", False), ("passes", True)])
def test_failed_capture_shows_traceback_only_with_logs(
    config_of: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    logs: str,
    traced: bool,
) -> None:
    monkeypatch.setenv("SPD_LOGS", logs)
    monkeypatch.setattr(pipeline, "start", fail_to_capture)
    assert main(["trace-and-report", config_of("llama_gqa"), "--tp", "2"]) == 1
    err = capsys.readouterr().err
    assert "It cannot be captured.\n  fix    : report the architecture" in err
    assert ("Traceback" in err) is traced


def test_unknown_log_component_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPD_LOGS", "everything")
    assert main(["trace-and-report", "anywhere", "--tp", "2"]) == 2
    assert "SPD_LOGS lists an unknown component." in capsys.readouterr().err


# ---- resolve_model itself


def test_resolve_model_puts_a_model_in_eval_mode() -> None:
    model = tiny("llama").train()
    assert resolve_model(model, weights=True) is model
    assert not model.training


def test_resolve_model_builds_a_config_without_weights() -> None:
    model = resolve_model(tiny("llama").config, weights=False, dtype=torch.bfloat16)
    assert not model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_resolve_model_loads_a_directory(tmp_path: Path, dtype: torch.dtype | None) -> None:
    saved = tiny("gpt2", dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path)
    loaded = resolve_model(tmp_path, weights=True, dtype=dtype)
    assert not loaded.training
    assert loaded.dtype == (dtype or torch.bfloat16)
    expected = saved.state_dict()
    assert all(bool((expected[k] == v).all()) for k, v in loaded.state_dict().items())


def test_resolve_model_never_reads_pickle(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"no \*\.safetensors"):
        resolve_model(tmp_path, weights=True)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin, pickle files, which are never read"):
        resolve_model(tmp_path, weights=True)


def encoder() -> torch.nn.Module:
    return AutoModel.from_config(_small("bert"))


def bidirectional() -> torch.nn.Module:
    from transformers import BertLMHeadModel

    return BertLMHeadModel(_small("bert"))


def _small(model_type: str) -> object:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoConfig.for_model(model_type, intermediate_size=16, vocab_size=32, **sizes)


@pytest.mark.parametrize(
    ("make", "said"), [(encoder, "BertModel"), (bidirectional, "is_decoder=False")]
)
def test_resolve_model_refuses_models_that_are_not_causal(
    make: Callable[[], torch.nn.Module], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        resolve_model(make(), weights=False)


def test_resolve_model_refuses_what_has_no_weights() -> None:
    config = tiny("llama").config
    with pytest.raises(UsageError, match="A configuration alone cannot be run"):
        resolve_model(config, weights=True)
    with pytest.raises(UsageError, match="parameters on the meta device"):
        resolve_model(resolve_model(config, weights=False), weights=True)


def test_resolve_model_refuses_to_convert_a_model() -> None:
    with pytest.raises(UsageError, match=r"convert it first: model\.to\(torch\.float64\)"):
        resolve_model(tiny("llama"), weights=True, dtype=torch.float64)


def test_resolve_model_refuses_other_types() -> None:
    with pytest.raises(UsageError, match="found  : int"):
        resolve_model(3, weights=False)
