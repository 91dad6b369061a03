"""The public face: what a caller may get wrong, and the text that tells so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, PreTrainedModel, T5Config

import spdcompile
from spdcompile import CompiledModel, Plan
from spdcompile.errors import PlanError, RefusalError, UsageError
from spdcompile.runtime import launch
from tests.models import tiny, token_ids

TP = 2
SIZES = {"layers": 2, "hidden": 16, "heads": 4, "intermediate": 24}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama", **SIZES)


@pytest.fixture(scope="module")
def compiled(model: PreTrainedModel) -> CompiledModel:
    return _compile(model)


def _compile(model: Any, **settings: Any) -> CompiledModel:
    return spdcompile.compile(
        model, **{"tp": TP, "executor": "local", "backend": "eager"} | settings
    )


def _text_of(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        ([True], "1 entries"),
        ([True, False, True], "3 entries"),
        ([], "0 entries"),
        ([1, 0], "entries of type int"),
        ([None, True], "entries of type NoneType"),
        ("10", "a str"),
        ({0: True}, "a dict"),
        (True, "a bool"),
        (torch.ones(2, dtype=torch.bool), "a Tensor"),
    ],
)
def test_mask_that_does_not_fit_is_refused(model: PreTrainedModel, mask: Any, found: str) -> None:
    text = _text_of(UsageError, lambda: _compile(model, spd_mask=mask))
    assert text.startswith("The spd_mask does not fit the model.")
    assert f"found  : {found}" in text
    assert "2 bools, one a decoder layer" in text


@pytest.mark.parametrize("tp", (0, -1, 2.0, True, "2", None))
def test_tp_that_is_no_number_of_ranks_is_refused(model: PreTrainedModel, tp: Any) -> None:
    text = _text_of(UsageError, lambda: _compile(model, tp=tp))
    assert text.startswith(f"tp={tp!r} is no number of ranks.")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"backend": "onnx"}, r"There is no backend 'onnx'.[\s\S]*'eager' or 'inductor'"),
        ({"executor": "ray"}, r"There is no executor 'ray'.[\s\S]*'local', 'distributed' or None"),
        ({"executor": "distributed"}, r"WORLD_SIZE=1 but tp=2[\s\S]*--nproc-per-node 2"),
    ],
)
def test_choice_that_does_not_exist_is_refused(
    model: PreTrainedModel, settings: dict[str, str], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        _compile(model, **settings)


def test_world_size_that_is_not_tp_is_refused(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert launch.launched_world_size({"WORLD_SIZE": "3"}) == 3
    text = _text_of(UsageError, lambda: _compile(model, executor=None))
    assert text.startswith("WORLD_SIZE=3 but tp=2.")
    assert "pass executor='local'" in text


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        ({0: [[0, 1], [2]]}, "2 lists of sizes [2, 1] over units [0, 1, 2]"),
        ({0: [[0, 1], [1, 2]]}, "over units [0, 1, 1, 2]"),
        ({0: [[0], [1, 2, 3]]}, "2 lists of sizes [1, 3]"),
        ({0: [[0, 1, 2, 3]]}, "1 lists of sizes [4]"),
        ({0: [[0, 1], [2, 4]]}, "over units [0, 1, 2, 4]"),
    ],
)
def test_head_groups_that_do_not_fit_are_refused(
    model: PreTrainedModel, groups: dict[int, list[list[int]]], found: str
) -> None:
    text = _text_of(UsageError, lambda: _compile(model, head_groups=groups))
    assert text.startswith("The head groups of layer 0 do not fit.")
    assert found in text and "2 lists of at most 2 units" in text


def test_head_groups_of_an_unknown_layer_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match=r"layers \[7\][\s\S]*layers 0\.\.1"):
        _compile(model, head_groups={7: [[0, 1], [2, 3]]})


@pytest.mark.parametrize(
    ("family", "mask", "reason"),
    [
        ("gpt_neox", [True, False], "it is merged into layers.0.mlp"),
        ("gemma2", [False, True], "layers.1.post_attention_layernorm acts on the sum before"),
        ("mixtral", [True, False], "as the routing of a mixture of experts does"),
    ],
)
def test_point_that_cannot_be_dropped_is_named_with_its_reason(
    family: str, mask: list[bool], reason: str
) -> None:
    with pytest.raises(RefusalError) as caught:
        _compile(tiny(family, **SIZES), spd_mask=mask)
    layer = mask.index(True)
    assert caught.value.point == f"layers.{layer}.attn"
    assert reason in caught.value.reason
    assert str(caught.value).startswith(f"The sync point layers.{layer}.attn cannot be dropped.")


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ((1, "mlp"), "it is the last one"),
        ((2, "attn"), "the model has no such layer"),
        ((0, "norm"), "layer 0 has no sync point 'norm'"),
    ],
)
def test_point_that_does_not_exist_is_refused(
    model: PreTrainedModel, point: tuple[int, str], reason: str
) -> None:
    plan = Plan(TP, 2, dropped=frozenset({point}))
    assert reason in _text_of(RefusalError, lambda: _compile(model, spd_mask=plan))


@pytest.mark.parametrize("plan", (Plan(4, 2), Plan(TP, 3)))
def test_plan_for_something_else_is_refused(model: PreTrainedModel, plan: Plan) -> None:
    text = _text_of(PlanError, lambda: _compile(model, spd_mask=plan))
    assert f"a plan for tp={plan.tp} and {plan.num_layers} layers" in text
    assert "tp=2 and 2 layers" in text


def test_plan_and_head_groups_together_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="A Plan brings its own head groups"):
        _compile(model, spd_mask=Plan(TP, 2), head_groups={0: [[0, 1], [2, 3]]})


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("input_ids", torch.ones(5, dtype=torch.long), "int64 [5]"),
        ("input_ids", torch.ones(1, 5), "float32 [1, 5]"),
        ("input_ids", torch.ones(2, 0, dtype=torch.long), "int64 [2, 0]"),
        ("attention_mask", torch.ones(2, 5, dtype=torch.long), "int64 [2, 5]"),
        ("attention_mask", torch.ones(2, 12), "float32 [2, 12]"),
        ("position_ids", torch.ones(1, 12, dtype=torch.long), "int64 [1, 12]"),
    ],
)
def test_input_that_does_not_fit_is_refused(
    compiled: CompiledModel, name: str, value: torch.Tensor, found: str
) -> None:
    given = {"input_ids": token_ids(), name: value}
    text = _text_of(UsageError, lambda: compiled(**given))
    assert text.startswith(f"{name} does not fit.")
    assert found in text


def test_output_is_that_of_hugging_face(compiled: CompiledModel, model: PreTrainedModel) -> None:
    out = compiled(token_ids())
    assert out.logits.shape == (2, 12, 96) and out.logits.dtype == model.dtype
    assert not out.logits.requires_grad
    assert compiled.config is model.config
    assert compiled.plan == Plan(TP, 2)


def test_directory_runs_as_the_model_does(
    compiled: CompiledModel, model: PreTrainedModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    for given in (tmp_path, str(tmp_path)):
        assert torch.equal(_compile(given)(token_ids()).logits, compiled(token_ids()).logits)


def test_directory_without_weights_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    assert "no *.safetensors" in _text_of(UsageError, lambda: _compile(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    text = _text_of(UsageError, lambda: _compile(tmp_path))
    assert "pickle files, which are never read" in text


def test_what_holds_no_causal_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    T5Config().save_pretrained(tmp_path / "t5")
    cases = {
        "nowhere": "nowhere is not a directory",
        "empty": "empty has no config.json",
        "t5": "This is not a causal language model.",
    }
    for name, text in cases.items():
        with pytest.raises(UsageError, match=text):
            _compile(tmp_path / name)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    bert = BertModel(BertConfig(num_hidden_layers=1, **sizes))
    with pytest.raises(UsageError, match=r"not a causal language model[\s\S]*BertModel"):
        _compile(bert)
    with pytest.raises(UsageError, match="A configuration alone cannot be run"):
        _compile(LlamaConfig())
    with pytest.raises(UsageError, match=r"type that cannot be read[\s\S]*int"):
        _compile(7)
