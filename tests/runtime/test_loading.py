"""Ranks read their slices of a directory: the shards of the loaded model, and each byte once."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import spdcompile
from spdcompile.loading import Loaded, capture_loaded, load_model
from spdcompile.passes import pipeline
from spdcompile.passes.base import Program
from spdcompile.runtime.stored import Stored
from spdcompile.runtime.weights import bind, checkpoint_tensors, read_shared
from tests.models import tiny, token_ids
from tests.runtime.checkpoints import Reads, counted, edit, edit_config, same, saved
from tests.zoo import models as zoo

CPU = torch.device("cpu")
SIZES = {"layers": 2, "hidden": 32, "heads": 4, "intermediate": 48, "vocab": 97}
GROUPS = {0: ((3, 0), (2, 1))}
# name -> family, tp, head groups
CASES = {
    "llama, several files": ("llama", 2, {}),
    "llama, head groups": ("llama", 2, GROUPS),
    "llama, grouped heads shared and padded": ("llama_gqa", 3, {}),
    "gpt2, transposed and tied": ("gpt2", 2, {}),
    "opt, tied and padded": ("opt", 3, {}),
    "phi3, fused": ("phi3", 2, {}),
    "bloom, fused by head": ("bloom", 2, {}),
    "mixtral, stacked experts": ("mixtral", 2, {}),
}


@cache
def _model(family: str) -> PreTrainedModel:
    return tiny(family, **SIZES)


def _program(loaded: Loaded, tp: int, groups: dict | None = None) -> tuple[Loaded, Program]:
    loaded, captured = capture_loaded(loaded)
    return loaded, pipeline.advance(captured, pipeline.preserving(tp, groups or {})).program


def _bound(program: Program, tensors: object, rank: int | None) -> dict[tuple[str, str], Tensor]:
    """Every parameter of a rank, by part and placeholder."""
    here = read_shared(program, tensors)
    return {
        (part.name, name): tensor
        for part in program.parts
        for name, tensor in bind(program, part, here, CPU, rank).items()
    }


@pytest.mark.parametrize("name", CASES)
def test_rank_holds_what_the_loaded_model_gives_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, tp, groups = CASES[name]
    model = _model(family)
    files = 3 if name == "llama, several files" else 1
    loaded, program = _program(load_model(saved(model, tmp_path, files=files), None), tp, groups)
    assert loaded.in_files and loaded.model.device.type == "meta"
    tensors = checkpoint_tensors(model)
    for rank in (*range(tp), None):
        with counted(monkeypatch) as reads:
            here = _bound(program, loaded.tensors, rank)
        there = _bound(program, tensors, rank)
        assert here.keys() == there.keys()
        assert all(same(here[key], there[key]) for key in here)
        assert reads.twice == 0
        if rank is not None:
            assert reads.total <= _most_to_read(program, loaded, here)


def _most_to_read(program: Program, loaded: Loaded, bound: dict[tuple[str, str], Tensor]) -> int:
    """The bytes of a rank's tensors in files."""
    refs = [(part, name, ref) for part in program.parts for name, ref in part.params.items()]
    return sum(
        bound[part.name, name].nbytes
        for part, name, ref in refs
        if not ref.constant and isinstance(loaded.tensors[ref.fqn], Stored)
    )


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "mixtral"])
def test_compile_of_a_directory_gives_the_models_logits(family: str, tmp_path: Path) -> None:
    model, ids = _model(family), token_ids(vocab=97)
    compiled = spdcompile.compile(saved(model, tmp_path), tp=3, backend="eager")
    expected = spdcompile.compile(model, tp=3, backend="eager")
    assert same(compiled(ids).logits, expected(ids).logits)
    changed = {"lm_head.weight": torch.zeros_like(model.lm_head.weight)}
    assert not compiled.with_weights(changed)(ids).logits.any()
    settings = {"max_new_tokens": 3, "do_sample": False}
    assert same(compiled.generate(ids, **settings), expected.generate(ids, **settings))


def test_tied_tensor_is_read_once_and_held_once_where_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model("gpt2")
    loaded, program = _program(load_model(saved(model, tmp_path), None), 2)
    assert loaded.tensors["lm_head.weight"] is loaded.tensors["transformer.wte.weight"]
    with counted(monkeypatch) as reads:
        _bound(program, loaded.tensors, 0)
    wte = loaded.tensors["transformer.wte.weight"]
    assert isinstance(wte, Stored)
    assert reads.twice == 0 and _read_of(reads, wte) == model.lm_head.weight.nbytes


def _read_of(reads: Reads, tensor: Stored) -> int:
    first, last = tensor.offset, tensor.offset + 4 * tensor.shape[0] * tensor.shape[1]
    return sum(stop - start for _, start, stop in reads.ranges if first <= start < last)


def test_slices_that_do_not_lie_together_are_read_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, program = _program(load_model(saved(_model("llama"), tmp_path), None), 4)
    with counted(monkeypatch) as reads:
        bound = _bound(program, loaded.tensors, 1)
    down = [t for (_, name), t in bound.items() if "down_proj" in name]
    assert [tuple(t.shape) for t in down] == [(32, 12)] * 2
    runs = [stop - start for _, start, stop in reads.ranges if stop - start == 12 * 4]
    assert len(runs) == 2 * 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entry", ["llama", "mixtral", "deepseek_v3"])
def test_dtype_on_load_is_that_of_transformers(
    entry: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = saved(zoo.build(entry), tmp_path)
    _check_like_transformers(folder, dtype)


def test_dtype_is_that_of_the_config_or_else_of_the_files(tmp_path: Path) -> None:
    folder = saved(tiny("llama", **SIZES).to(torch.bfloat16), tmp_path)
    assert load_model(folder, None).model.dtype == torch.bfloat16
    edit_config(folder, dtype=None)
    assert load_model(folder, None).model.dtype == torch.bfloat16
    edit_config(folder, dtype="float32")
    assert load_model(folder, None).model.dtype == torch.float32
    compiled = spdcompile.compile(folder, tp=2, backend="eager", dtype=torch.float16)
    assert compiled(token_ids(vocab=97)).logits.dtype == torch.float16


def _check_like_transformers(folder: Path, dtype: torch.dtype) -> None:
    """Weights and buffers equal those of from_pretrained to the bit."""
    loaded = load_model(folder, dtype)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert loaded.in_files
    own, state = loaded.model.state_dict(), expected.state_dict()
    assert loaded.tensors.keys() == state.keys()
    for name, tensor in state.items():
        found = loaded.tensors[name]
        found = found.whole(own[name].dtype) if isinstance(found, Stored) else found
        assert same(found, tensor), name
    buffers = dict(loaded.model.named_non_persistent_buffers())
    for name, buffer in expected.named_non_persistent_buffers():
        assert same(buffers[name], buffer), name


# Rotary tables of several kinds, ALiBi, sinusoids, experts to be stacked, names to be converted.
LIKE_TRANSFORMERS = ("llama", "gpt_neo", "gptj", "xglm", "phi3", "gemma2", "qwen2_moe", "gpt_oss")


@pytest.mark.parametrize("entry", LIKE_TRANSFORMERS)
def test_weights_and_buffers_are_those_of_transformers(entry: str, tmp_path: Path) -> None:
    _check_like_transformers(saved(zoo.build(entry), tmp_path), torch.float32)


# transformers has no class to load these by.
NO_CLASS = ("emu3", "mllama")
# transformers 5.23 zeroes a row of the embedding that it has just loaded: youtu's own
# initialisation does so through a view, which does not know that it was loaded.
CLOBBERED = ("youtu",)
WHOLE = ("inkling2_text",)  # its experts are interleaved


@pytest.mark.slow
def test_weights_and_buffers_are_those_of_transformers_for_every_type(tmp_path: Path) -> None:
    differing = []
    for entry in zoo.entries():
        if zoo.model_type(entry) in (*NO_CLASS, *CLOBBERED, *WHOLE):
            continue
        try:
            _check_like_transformers(saved(zoo.build(entry), tmp_path / entry), torch.bfloat16)
        except AssertionError as error:
            differing.append(f"{entry}: {error}")
    assert not differing


def test_constants_of_the_program_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    model = zoo.build("gptj")
    _, program = _program(load_model(saved(model, tmp_path), None), 2)
    expected = pipeline.advance(pipeline.start(model), pipeline.preserving(2, {})).program
    assert program.constants and program.constants.keys() == expected.constants.keys()
    assert all(same(program.constants[k], v) for k, v in expected.constants.items())


def test_old_names_are_converted(tmp_path: Path) -> None:
    model = _model("gpt2")
    folder = saved(model, tmp_path)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # which transformers does not mind

    edit(folder, rename)
    loaded, program = _program(load_model(folder, None), 2)
    here = _bound(program, loaded.tensors, 1)
    there = _bound(program, checkpoint_tensors(model), 1)
    assert loaded.in_files and all(same(here[key], there[key]) for key in there)


def test_two_tensors_that_the_config_ties_are_both_used(tmp_path: Path) -> None:
    folder, head = saved(_model("gpt2"), tmp_path), torch.randn(97, 32)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    expected = AutoModelForCausalLM.from_pretrained(folder)
    assert same(expected.lm_head.weight, head)
    compiled, ids = spdcompile.compile(folder, tp=2, backend="eager"), token_ids(vocab=97)
    torch.testing.assert_close(compiled(ids).logits, expected(ids).logits)


def test_tie_is_found_from_the_tensor_that_is_there(tmp_path: Path) -> None:
    model = _model("gpt2")
    folder = saved(model, tmp_path)
    edit(folder, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    loaded = load_model(folder, None)
    found = loaded.tensors["transformer.wte.weight"]
    assert isinstance(found, Stored) and same(found.whole(torch.float32), model.lm_head.weight)


@pytest.mark.parametrize("entry", ["inkling2_text", "rwkv"])
def test_what_cannot_be_sliced_is_loaded_whole_and_says_so(
    entry: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = zoo.build(entry)
    with caplog.at_level(logging.WARNING, "spdcompile.runtime"):
        loaded, _ = capture_loaded(load_model(saved(model, tmp_path), None))
    assert not loaded.in_files and f"{tmp_path} is loaded whole on every rank: " in caplog.text
    if entry == "inkling2_text":
        state = model.state_dict()
        assert all(same(tensor, state[name]) for name, tensor in loaded.tensors.items())
