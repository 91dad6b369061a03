"""Exported checkpoints: Hugging Face reads them, and the plan beside them fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

import spdcompile
from spdcompile.errors import PlanError, SaveError, UsageError
from spdcompile.plan import PLAN_FILE, Plan
from tests.fuzz import mutated
from tests.models import tiny, token_ids
from tests.runtime.checkpoints import saved

TP = 2
PLAN = Plan(TP, 2, frozenset({(0, "attn")}), {1: ((1, 0), (3, 2))}, {"perplexity": 9.5})


def _same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("family", ["llama_gqa", "mixtral", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_hugging_face_reads_what_distillation_changed(
    family: str, in_memory: bool, tmp_path: Path
) -> None:
    model = tiny(family, layers=2)
    name = next(name for name in model.state_dict() if name.endswith("weight") and ".1." in name)
    new = {name: torch.randn_like(model.state_dict()[name])}
    source = model if in_memory else saved(model, tmp_path / "source", files=3)
    plan = Plan(TP, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spdcompile.export_hf(source, tmp_path / "out", plan=plan, tensors=new)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
    model.load_state_dict({**before, **new})
    _same(read, model)
    assert Plan.load(tmp_path / "out") == plan
    assert not list((tmp_path / "out").glob(".*"))


def test_compiling_what_was_exported_gives_the_same_logits(tmp_path: Path) -> None:
    model = tiny("llama_gqa", layers=2)
    plan = Plan(TP, 2, frozenset({(0, "attn")}), {1: ((1, 3), (0, 2))})
    compiled = spdcompile.compile(model, tp=TP, spd_mask=plan, backend="eager")
    name = "model.layers.0.mlp.down_proj.weight"
    changed = compiled.with_weights({name: 2 * model.state_dict()[name]})
    changed.export_hf(tmp_path)
    again = spdcompile.compile(tmp_path, tp=TP, spd_mask=Plan.load(tmp_path), backend="eager")
    ids = token_ids(length=7)
    assert torch.equal(again(ids).logits, changed(ids).logits)
    assert not torch.equal(again(ids).logits, compiled(ids).logits)


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    model = tiny("gpt2", layers=2)
    assert model.config.tie_word_embeddings
    new = torch.randn_like(model.lm_head.weight)
    spdcompile.export_hf(model, tmp_path, plan=Plan(TP, 2), tensors={"lm_head.weight": new})
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read.lm_head.weight, new)
    assert torch.equal(read.transformer.wte.weight, new)


def test_files_of_a_directory_are_copied_with_their_dtype(tmp_path: Path) -> None:
    source = saved(tiny("llama", layers=2).bfloat16(), tmp_path / "source", files=2)
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling_own.py").write_text("raise RuntimeError")
    spdcompile.export_hf(source, tmp_path / "out", plan=Plan(TP, 2))
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    read = {file.name: file.read_bytes() for file in source.iterdir()}
    assert written.pop(PLAN_FILE)
    assert read.pop("modeling_own.py")
    assert written == read


def test_plan_that_is_not_applied_is_mentioned(tmp_path: Path, notices: list[str]) -> None:
    spdcompile.export_hf(tiny("llama", layers=2), tmp_path, plan=Plan(TP, 2))
    spdcompile.compile(tmp_path, tp=TP, backend="eager")
    spdcompile.compile(tmp_path, tp=TP, backend="eager", spd_mask=[False, False])
    assert notices == [f"{tmp_path} holds a plan, which is not applied: no spd_mask"]


@pytest.mark.parametrize(
    ("tensors", "needed"),
    [
        ({"model.norm.bias": torch.zeros(1)}, "a tensor of that name"),
        ({"model.norm.weight": torch.zeros(3)}, "[64]"),
    ],
)
def test_tensor_that_does_not_fit_is_an_error_and_nothing_is_written(
    tensors: dict[str, torch.Tensor], needed: str, tmp_path: Path
) -> None:
    model = tiny("llama", layers=2)
    with pytest.raises(UsageError) as caught:
        spdcompile.export_hf(model, tmp_path / "out", plan=Plan(TP, 2), tensors=tensors)
    assert caught.value.needed == needed
    assert not list((tmp_path / "out").iterdir())


def test_plan_of_another_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="made for something else"):
        spdcompile.export_hf(tiny("llama", layers=3), tmp_path, plan=Plan(TP, 2))


def test_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"another model's")
    with pytest.raises(UsageError, match="not empty"):
        spdcompile.export_hf(tiny("llama", layers=2), tmp_path, plan=Plan(TP, 2))


def test_failing_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    model = tiny("llama", layers=2)
    monkeypatch.setattr("spdcompile.plan.write_whole", full)
    with pytest.raises(SaveError, match="cannot be written"):
        spdcompile.export_hf(model, tmp_path / "out", plan=Plan(TP, 2))
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    PLAN.save(folder / PLAN_FILE)
    return folder / PLAN_FILE


_FUZZ = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))


def _is_plan_or_error(path: Path) -> None:
    try:
        found = Plan.load(path)
    except PlanError:
        return
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@_FUZZ
@given(st.data())
def test_mutated_data_of_a_plan_file(plan_file: Path, data: st.DataObject) -> None:
    path = plan_file.with_name("mutated.json")
    path.write_text(json.dumps(mutated(PLAN.to_dict(), data)))
    _is_plan_or_error(path)


@_FUZZ
@given(st.data())
def test_mutated_bytes_of_a_plan_file(plan_file: Path, data: st.DataObject) -> None:
    content = bytearray(plan_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    path = plan_file.with_name("mutated.json")
    path.write_bytes(bytes(content))
    _is_plan_or_error(path)


def test_deep_or_huge_plan_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / PLAN_FILE
    path.write_text("[" * 200_000)
    with pytest.raises(PlanError):
        Plan.load(tmp_path)
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(PlanError, match="more than any plan's"):
        Plan.load(tmp_path)
