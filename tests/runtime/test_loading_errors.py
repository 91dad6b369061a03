"""A checkpoint that does not fit is an error that names the file and the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import spdcompile
from spdcompile.errors import CheckpointError, UsageError
from spdcompile.loading import load_model
from tests.models import tiny
from tests.runtime.checkpoints import INDEX, SINGLE, edit, edit_config, saved
from tests.zoo import models as zoo

SIZES = {"layers": 1, "hidden": 32, "heads": 4, "intermediate": 48, "vocab": 97}
UP = "model.layers.0.mlp.up_proj.weight"
EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in one file."""
    return saved(tiny("llama", **SIZES), tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A Llama in several files."""
    return saved(tiny("llama", **SIZES), tmp_path / "sharded", files=3)


def _nan(tensors: Tensors) -> None:
    tensors[UP][3, 5] = torch.nan


# what is wrong -> what is done to the tensors, and what the message says of it
SPOILED: dict[str, tuple[Callable[[Tensors], object], str, str]] = {
    "missing": (lambda t: t.pop(UP), f"{UP} is missing", "where  : {file}"),
    "extra": (
        lambda t: t.update({"model.extra.weight": torch.ones(3)}),
        "model.extra.weight is in the checkpoint but not in the model.",
        "where  : model.extra.weight in {file}",
    ),
    "misshapen": (
        lambda t: t.update({UP: torch.ones(47, 32)}),
        f"{UP} has another shape than the model.",
        f"where  : {UP} in {{file}}\n  found  : [47, 32]\n  needed : [48, 32]",
    ),
    "NaN": (_nan, "A tensor of the checkpoint is not finite.", f"where  : {UP} in {{file}}"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_tensor_is_an_error_that_names_it(kind: str, folder: Path) -> None:
    change, summary, where = SPOILED[kind]
    edit(folder, change)
    with pytest.raises(CheckpointError) as caught:
        spdcompile.compile(folder, tp=2, backend="eager")
    assert summary in str(caught.value)
    assert where.format(file=folder / SINGLE) in str(caught.value)


def test_value_that_the_dtype_cannot_hold_is_an_error(folder: Path) -> None:
    edit(folder, lambda tensors: tensors[UP].fill_(1e30))
    with pytest.raises(CheckpointError, match=r"found  : infinity as torch\.float16") as caught:
        spdcompile.compile(folder, tp=2, backend="eager", dtype=torch.float16)
    assert f"{UP} in {folder / SINGLE}" in str(caught.value)
    load_model(folder, torch.float32)


def test_nan_in_a_tensor_that_transformers_loads_is_an_error(tmp_path: Path) -> None:
    folder = saved(zoo.build("inkling2_text"), tmp_path)
    names = []

    def spoil(tensors: Tensors) -> None:
        names.append(next(name for name in tensors if name.endswith("norm.weight")))
        tensors[names[0]][0] = torch.nan

    edit(folder, spoil)
    with pytest.raises(CheckpointError, match="not finite") as caught:
        load_model(folder, None)
    assert str(folder) in str(caught.value)


def test_tensor_that_the_index_misplaces_is_an_error(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text(encoding="utf-8"))
    place = index["weight_map"][UP]
    edit(sharded, lambda tensors: tensors.pop(UP), place)
    with pytest.raises(CheckpointError, match="A tensor is missing") as caught:
        load_model(sharded, None)
    assert f"{UP} in {sharded / place}" in str(caught.value)


@pytest.mark.parametrize("name", [None, "../model-00001-of-00003.safetensors"])
def test_file_that_the_index_names_in_vain_is_an_error(name: str | None, sharded: Path) -> None:
    path = sharded / INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    if name is None:
        name = index["weight_map"][UP]
        (sharded / name).unlink()
    index["weight_map"][UP] = name
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match="A file of the checkpoint is missing") as caught:
        load_model(sharded, None)
    assert name in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [4, 40, -100])
def test_file_that_is_cut_short_is_an_error(keep: int, folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:keep])
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, None)
    assert str(folder / SINGLE) in str(caught.value)


def test_file_cut_short_after_it_was_opened_is_an_error(folder: Path) -> None:
    loaded = load_model(folder, None)
    size = (folder / SINGLE).stat().st_size
    with (folder / SINGLE).open("r+b") as file:
        file.truncate(size - 16)
    with pytest.raises(CheckpointError, match="cut short"):
        for tensor in loaded.tensors.values():
            tensor.whole(torch.float32)


def test_index_that_is_no_json_is_an_error(sharded: Path) -> None:
    (sharded / INDEX).write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_model(sharded, None)
    assert str(sharded / INDEX) in str(caught.value)


def test_directory_without_a_model_file_is_an_error(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match="has no checkpoint") as caught:
        load_model(folder, None)
    assert "consolidated.safetensors" in str(caught.value)


def test_experts_of_different_shapes_are_an_error(tmp_path: Path) -> None:
    folder = saved(zoo.build("qwen2_moe"), tmp_path)
    edit(folder, lambda tensors: tensors.update({EXPERT: torch.ones(3, 5)}))
    with pytest.raises(CheckpointError, match="different shapes") as caught:
        load_model(folder, None)
    assert f"{EXPERT} in {folder / SINGLE}" in str(caught.value)


def test_an_expert_too_few_is_an_error(tmp_path: Path) -> None:
    folder = saved(zoo.build("qwen2_moe"), tmp_path)
    edit(folder, lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(CheckpointError):
        load_model(folder, None)


def test_dtype_for_a_loaded_model_is_refused() -> None:
    with pytest.raises(UsageError, match="not that of the model"):
        spdcompile.compile(tiny("llama", **SIZES), tp=2, dtype=torch.bfloat16)


def test_quantized_checkpoint_is_refused_by_name(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "no such method"})
    with pytest.raises(UsageError, match="quantized by no such method"):
        load_model(folder, None)


class Codes(torch.Tensor):
    """Stands for the weights of a quantization library, which are a class of tensors."""


def test_weights_that_are_no_plain_tensors_are_refused_by_name() -> None:
    model = tiny("llama", **SIZES)
    up = model.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight.data.as_subclass(Codes), requires_grad=False)
    with pytest.raises(UsageError, match=r"up_proj\.weight, a Codes"):
        spdcompile.compile(model, tp=2, backend="eager")
