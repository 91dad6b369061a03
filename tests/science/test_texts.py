"""Calibration texts: files, directories and data sets, and what is wrong with them."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import spdcompile
from spdcompile.errors import UsageError
from spdcompile.runtime.texts import read_text

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
WORDS = "In the beginning the server reads its configuration. "


@cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def _tokens(source: str | Path, **settings: Any) -> torch.Tensor:
    return spdcompile.calibration_tokens(source, _tokenizer(), **settings)


def _ids(text: str) -> torch.Tensor:
    return torch.tensor(_tokenizer()(text, verbose=False).input_ids)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 100, encoding="utf-8")
    return path


def test_file_is_cut_into_chunks(text_file: Path) -> None:
    tokens = _tokens(text_file, length=32, count=4)
    ids = _ids(WORDS * 100)
    assert tokens.shape == (4, 32)
    assert torch.equal(tokens[0], ids[:32])
    step = len(ids) // 32 // 4
    assert torch.equal(tokens[1], ids[32 * step : 32 * (step + 1)])


def test_directory_is_read_in_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, text in (("b.txt", "two"), ("deep/a.txt", "three"), ("a.txt", "one"), ("c.md", "x")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_text(tmp_path) == "one\n\ntwo\n\nthree"


def test_papers_sizes_are_the_default_where_the_text_allows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(WORDS * 30_000, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert _tokens(path).shape == (128, 2048)
    assert not caplog.records


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (1, 901)),
        ({"max_length": 256}, (3, 256)),
        ({"length": 64}, (14, 64)),
        ({"count": 1, "max_length": 100}, (1, 100)),
    ],
)
def test_shorter_text_or_model_gets_less_and_a_notice(
    text_file: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, int],
    shape: tuple[int, int],
) -> None:
    available = len(_ids(WORDS * 100))
    assert available == 901, "what the shapes here are made for"
    with caplog.at_level(logging.WARNING):
        assert _tokens(text_file, **settings).shape == shape
    (record,) = caplog.records
    notice = record.getMessage()
    assert f"{shape[0]} chunks of {shape[1]} tokens, where the paper has 128 of 2048" in notice
    assert "the text has 901 tokens" in notice


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "The text is empty"),
        (b" \n\t ", "The text is empty"),
        (b"na\xefve text", r"not UTF-8[\s\S]*0xef at 2[\s\S]*iconv"),
        (b"a", r"too short[\s\S]*1 tokens"),
    ],
)
def test_text_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        _tokens(path)
    assert str(path) in str(error.value)


def test_text_shorter_than_what_was_asked_for_is_refused(text_file: Path) -> None:
    with pytest.raises(UsageError, match=r"too short[\s\S]*901 tokens, 1 chunks of 500[\s\S]*3"):
        _tokens(text_file, length=500, count=3)


def test_directory_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"empty[\s\S]*no file \*\.txt"):
        _tokens(tmp_path)


# ---- data sets


def _library(rows: dict[str, list[str]], calls: list[tuple[Any, ...]]) -> SimpleNamespace:
    """The library `datasets`, as far as it is used here: one function."""

    class Rows(dict[str, list[str]]):
        column_names = tuple(rows)

    def load_dataset(name: str, config: str | None, *, split: str) -> Rows:
        calls.append((name, config, split))
        if name == "missing/one":
            raise ConnectionError("no such data set\nand more")
        return Rows(rows)

    return SimpleNamespace(load_dataset=load_dataset)


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:config", ("org/name", "config", "train")),
        ("org/name:config:test", ("org/name", "config", "test")),
        ("org/name::test", ("org/name", None, "test")),
    ],
)
def test_data_set_is_named_with_config_and_split(
    monkeypatch: pytest.MonkeyPatch, source: str, call: tuple[Any, ...]
) -> None:
    calls: list[tuple[Any, ...]] = []
    library = _library({"text": ["one", "", "two"]}, calls)
    monkeypatch.setattr(importlib, "import_module", lambda name: library)
    assert read_text(source) == "one\n\n\n\ntwo"
    assert calls == [call]


def test_data_set_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _library({"question": ["?"], "answer": ["!"]}, [])
    monkeypatch.setattr(importlib, "import_module", lambda name: library)
    with pytest.raises(UsageError, match=r"no texts[\s\S]*columns question, answer"):
        read_text("org/name")
    with pytest.raises(UsageError, match=r"no such data set[\s\S]*ConnectionError: no such"):
        read_text("missing/one")


def test_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UsageError, match=r"no such file[\s\S]*pip install 'spdcompile\[data\]'"):
        read_text("nowhere.txt")
