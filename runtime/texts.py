"""Calibration text out of a file, a directory of files or a data set."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spdcompile.errors import UsageError
from spdcompile.log import Component, get_logger
from spdcompile.runtime.data import chunks_of

LENGTH, COUNT = 2048, 128
"""The paper's calibration data: 128 samples of 2,048 tokens."""

_LOG = get_logger(Component.RUNTIME)
_BETWEEN = "\n\n"  # between documents, as the GPTQ protocol joins WikiText


def calibration_tokens(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int | None = None,
    count: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Chunks of a calibration text.

    Args:
        source: a UTF-8 text file; a directory, of which all *.txt are read, in order of their
            paths; or a data set of the library `datasets`, as NAME[:CONFIG[:SPLIT]].
        length: tokens a chunk; the paper's 2,048 if the text and the model allow it, else as many
            as they do, with a notice.
        count: chunks, evenly spaced over the text; the paper's 128 or as many as there are, with a
            notice.
        max_length: the longest input of the model.

    Returns: int64 [chunks, length].

    Raises:
        UsageError: the text is not there, is empty, not UTF-8 or shorter than what was asked for.
    """
    text = read_text(source)
    available = len(tokenizer(text, verbose=False).input_ids)
    if available < 2:
        raise UsageError(
            "The text is too short.",
            where=str(source),
            found=f"{available} tokens",
            needed="2 at least, to predict one from another",
        )
    longest = min(LENGTH, available, LENGTH if max_length is None else max_length)
    each = length or longest
    most = max(1, min(COUNT, available // each))
    if (length is None and each < LENGTH) or (count is None and most < COUNT):
        limit = "" if max_length is None else f", the model takes {max_length} at a time"
        _LOG.warning(
            "calibration on %d chunks of %d tokens, where the paper has %d of %d; the text has %d "
            "tokens%s",
            *(count or most, each, COUNT, LENGTH, available, limit),
        )
    return chunks_of(text, tokenizer, length=each, count=count or most)


def read_text(source: str | Path) -> str:
    """The text of a file, a directory of *.txt files, or a data set.

    Raises:
        UsageError: it is not there, is empty or not UTF-8.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        text = _BETWEEN.join(_read_file(file) for file in files)
        found = f"{len(files)} files *.txt without text in them" if files else "no file *.txt"
    elif path.exists():
        text, found = _read_file(path), f"{path.stat().st_size} bytes of white space"
    else:
        text, found = _BETWEEN.join(_rows(str(source))), "rows without text"
    if not text.strip():
        raise UsageError("The text is empty.", where=str(source), found=found, needed="some text")
    return text


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            "The text is not UTF-8.",
            where=str(path),
            found=f"byte {error.object[error.start]:#04x} at {error.start}",
            needed="a text in UTF-8",
            fix=f"convert it, for example: iconv -f latin1 -t utf-8 {path.name}",
        ) from error
    except OSError as error:
        raise UsageError("The text cannot be read.", where=str(path), found=str(error)) from error


def _rows(source: str) -> Iterable[str]:
    """The texts of a data set's rows."""
    name, config, split = (*source.split(":"), "", "")[:3]
    data = _load(source, name, config or None, split or "train")
    if "text" not in data.column_names:
        raise UsageError(
            "The data set has no texts.",
            where=source,
            found=f"columns {', '.join(data.column_names)}",
            needed="a column named text",
        )
    return data["text"]


def _load(source: str, name: str, config: str | None, split: str) -> Any:
    missing = {"where": source, "needed": "a text file, a directory with *.txt, or a data set"}
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError(
            "There is no such file, and data sets cannot be read.",
            found="no file or directory of this name, and no library `datasets`",
            fix="correct the path, or: pip install 'spdcompile[data]'",
            **missing,
        ) from error
    try:
        return library.load_dataset(name, config, split=split)
    except Exception as error:  # it raises what its loaders, file systems and the network raise
        raise UsageError(
            "There is no such file, and no such data set.",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="correct it; data sets are named NAME[:CONFIG[:SPLIT]]",
            **missing,
        ) from error
