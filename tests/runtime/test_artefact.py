"""Artefacts: the same bits after a restart that captured nothing, and what is not used."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spdcompile
from spdcompile.errors import ArtefactError, SaveError, SpdCompileError, UsageError
from spdcompile.manifest import MANIFEST, PROGRAMS
from spdcompile.passes import pipeline
from spdcompile.passes.base import Program
from spdcompile.passes.written import from_data, to_data
from spdcompile.plan import Plan
from tests.fuzz import mutated
from tests.models import left_padded, tiny, token_ids
from tests.runtime.checkpoints import saved
from tests.zoo.models import build

TP = 3
FAMILIES = ("llama_gqa", "mixtral", "opt", "gemma2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: saved(tiny(family), folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def artefact(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a Llama with a dropped sync point, its weights included."""
    folder = tmp_path_factory.mktemp("artefact")
    _compile(checkpoints["llama_gqa"], [True, False]).save(folder, weights="included")
    return folder


@pytest.fixture
def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model was captured")

    monkeypatch.setattr(pipeline, "start", refuse)


def _compile(source: Any, mask: list[bool] | None = None) -> spdcompile.CompiledModel:
    return spdcompile.compile(source, tp=TP, spd_mask=mask, backend="eager", executor="local")


def _load(folder: Path) -> spdcompile.CompiledModel:
    return spdcompile.load(folder, backend="eager", executor="local")


def _assert_same(found: spdcompile.CompiledModel, expected: spdcompile.CompiledModel) -> None:
    ids, mask = left_padded(token_ids())
    assert torch.equal(found(ids, mask).logits, expected(ids, mask).logits)
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(found.generate(ids, **settings), expected.generate(ids, **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_without_a_capture(
    checkpoints: dict[str, Path], family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    mask = [True, False] if family in ("llama_gqa", "opt") else None
    compiled = _compile(checkpoints[family], mask)
    compiled.save(tmp_path)
    assert not list(tmp_path.glob("model*"))
    request.getfixturevalue("no_capture")
    _assert_same(_load(tmp_path), compiled)


@pytest.mark.usefixtures("no_capture")
def test_included_weights_need_nothing_else(artefact: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(artefact, moved)
    _assert_same(_load(moved), _load(artefact))


def test_model_in_memory_is_saved_with_its_weights(tmp_path: Path) -> None:
    compiled = _compile(tiny("llama", tie_word_embeddings=True))
    with pytest.raises(UsageError, match="weights='included'"):
        compiled.save(tmp_path)
    compiled.save(tmp_path, weights="included")
    _assert_same(_load(tmp_path), compiled)


def test_restored_model_takes_other_masks(artefact: Path, checkpoints: dict[str, Path]) -> None:
    restored = _load(artefact)
    expected = _compile(checkpoints["llama_gqa"])
    _assert_same(restored.with_mask(None), expected)
    assert restored.plan.dropped == {(0, "attn")}
    assert "attn" in str(restored.report)


def test_split_vocabulary_stays_split(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    compiled = spdcompile.compile(
        checkpoints["llama_gqa"], tp=TP, vocab="split", backend="eager", executor="local"
    )
    compiled.save(tmp_path)
    restored = _load(tmp_path)
    _assert_same(restored, compiled)
    names = [
        point.name for point in restored.program.graph_of(restored.program.parts[0]).sync_points
    ]
    assert names == ["embed"]
    assert (
        restored.with_mask(None).program.parts[0].shards.keys()
        == compiled.program.parts[0].shards.keys()
    )


def _changed(artefact: Path, folder: Path, **changes: Any) -> Path:
    """A copy whose manifest says something else."""
    shutil.copytree(artefact, folder)
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_programs_of_other_versions_are_not_used(
    artefact: Path, tmp_path: Path, notices: list[str]
) -> None:
    stale = _changed(artefact, tmp_path / "stale", versions={"torch": "1.0"})
    _assert_same(_load(stale), _load(artefact))
    assert len(notices) == 1 and notices[0].startswith("Captured anew: saved with {'torch': '1.0'}")


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_programs_are_not_used(
    artefact: Path, tmp_path: Path, notices: list[str], damage: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(artefact, damaged)
    path = damaged / PROGRAMS
    text = path.read_text()
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(text[:-9] if damage == "cut" else text.replace('"silu', '"relu', 1) + " ")
    _assert_same(_load(damaged), _load(artefact))
    assert len(notices) == 1 and notices[0].startswith("Captured anew: ")


def test_other_weights_are_refused(artefact: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(artefact, other)
    saved(tiny("llama_gqa", seed=1), other)
    with pytest.raises(ArtefactError, match="another weights"):
        _load(other)
    saved(tiny("llama_gqa", rms_norm_eps=1e-3), other)
    with pytest.raises(ArtefactError, match="another configuration"):
        _load(other)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', "[" * 100_000, '{"format": 1, "plan": 3}']
)
def test_other_files_are_no_artefact(tmp_path: Path, text: str) -> None:
    with pytest.raises(ArtefactError, match="no artefact"):
        _load(tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ArtefactError, match="no artefact"):
        _load(tmp_path)


def test_replaced_weights_are_not_saved(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    compiled = _compile(checkpoints["llama_gqa"]).with_weights({})
    with pytest.raises(UsageError, match="weights were replaced"):
        compiled.save(tmp_path)


def test_what_cannot_be_written_is_a_message(artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be saved"):
        _load(artefact).save(tmp_path / "file", weights="included")


def test_code_that_no_graph_holds_is_captured_at_each_start(
    tmp_path: Path, notices: list[str]
) -> None:
    compiled = _compile(build("falcon_mamba"))
    compiled.save(tmp_path, weights="included")
    assert "Saved without its programs" in notices[0]
    assert not (tmp_path / PROGRAMS).exists()
    ids = token_ids()
    assert torch.equal(_load(tmp_path)(ids).logits, compiled(ids).logits)


# ---- data from elsewhere


@pytest.fixture(scope="module")
def written(artefact: Path) -> tuple[list[Any], Program]:
    return json.loads((artefact / PROGRAMS).read_text()), _load(artefact).program


@given(st.data())
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_program_is_an_error_or_a_program(
    written: tuple[list[Any], Program], data: st.DataObject
) -> None:
    programs, good = written
    given_data = mutated(programs[data.draw(st.integers(0, 1))], data)
    try:
        program = from_data(given_data, good.constants)
    except ArtefactError:
        return
    assert isinstance(program, Program)
    to_data(program)


@given(st.data())
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_plan_is_an_error_or_a_plan(artefact: Path, data: st.DataObject) -> None:
    plan = json.loads((artefact / MANIFEST).read_text())["plan"]
    try:
        found = Plan.from_dict(mutated(plan, data))
    except SpdCompileError:
        return
    Plan.from_dict(found.to_dict())


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default",
        "aten.add_.Tensor",
        "spd.call.default",
        "operator.methodcaller",
        "os.system",
        "aten.__class__.__init__",
        "aten.add.__globals__",
        "prim.device.default",
    ],
)
def test_program_may_not_call_what_has_side_effects(
    written: tuple[list[Any], Program], name: str
) -> None:
    data = copy.deepcopy(written[0][0])
    nodes = data["graphs"]["block"]["nodes"]
    call = next(node for node in nodes if "call" in node)
    call["call"] = name
    with pytest.raises(ArtefactError, match="not a program"):
        from_data(data, written[1].constants)
