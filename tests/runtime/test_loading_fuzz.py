"""Checkpoint files with one thing wrong: a clear error, or what a whole file would have given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spdcompile.errors import CheckpointError
from spdcompile.runtime.checkpoint import ConversionError, stored_tensors
from tests.fuzz import mutated
from tests.models import tiny
from tests.runtime.checkpoints import INDEX, SINGLE, saved

SIZES = {"layers": 1, "hidden": 8, "heads": 2, "intermediate": 8, "vocab": 16}
_MANY = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny("llama", **SIZES), tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny("llama", **SIZES), tmp_path_factory.mktemp("pieces"), files=3)


def _read(folder: Path) -> None:
    """Reads all of it, unless something says clearly why not."""
    try:
        tensors = stored_tensors(folder)
    except (CheckpointError, ConversionError):
        return
    for tensor in tensors.values():
        assert tensor.whole(tensor.dtype).shape == tensor.shape


@given(st.data())
@_MANY
def test_mutated_header(folder: Path, tmp_path_factory: pytest.TempPathFactory, data) -> None:
    content = (folder / SINGLE).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(mutated(json.loads(content[8:end]), data)).encode()
    target = tmp_path_factory.getbasetemp() / "header"
    target.mkdir(exist_ok=True)
    (target / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    _read(target)


@given(st.data())
@_MANY
def test_changed_bytes(folder: Path, tmp_path_factory: pytest.TempPathFactory, data) -> None:
    content = bytearray((folder / SINGLE).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    target = tmp_path_factory.getbasetemp() / "bytes"
    target.mkdir(exist_ok=True)
    (target / SINGLE).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    _read(target)


@given(st.data())
@_MANY
def test_mutated_index(pieces: Path, data) -> None:
    path = pieces / INDEX
    good = path.read_bytes()
    path.write_text(json.dumps(mutated(json.loads(good), data)), encoding="utf-8")
    try:
        _read(pieces)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("text", ["[" * 100_000, "", "1", '{"a": NaN}'])
def test_other_headers(tmp_path: Path, text: str) -> None:
    header = text.encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError):
        stored_tensors(tmp_path)
