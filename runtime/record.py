"""Results so far, in a file, so that a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from spdcompile import __version__
from spdcompile.errors import SaveError, UsageError
from spdcompile.files import write_whole
from spdcompile.runtime.executor import Executor
from spdcompile.runtime.fingerprint import fingerprint

_FORMAT = "spdcompile-record-1"


class Record:
    """Results by name, written after each of them.

    Args:
        directory: where the file is; None keeps nothing. Runs of other settings have files of
            their own there.
        key: what tells these results from those of other runs; see `key_of`.

    Raises:
        UsageError: the file is there and holds something else.
    """

    def __init__(self, directory: str | Path | None, key: str) -> None:
        self._path = None if directory is None else Path(directory) / f"{key[:16]}.json"
        self._key = key
        self._results: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            self._results = _read(self._path, key)

    def get(self, name: str) -> Any | None:
        """What an earlier run found under a name, as JSON data."""
        return self._results.get(name)

    def put(self, name: str, result: Any) -> None:
        """Adds a result and writes all of them, whole or not at all.

        Raises:
            SaveError: the file cannot be written.
        """
        self._results[name] = result
        document = {"format": _FORMAT, "key": self._key, "results": self._results}
        self._write(self._path, (json.dumps(document, indent=1) + "\n").encode)

    def get_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors that were put under a name; None if there are none.

        Raises:
            UsageError: their file cannot be read.
        """
        path = self._path_of(name)
        if path is None or not path.exists():
            return None
        try:
            return load(path.read_bytes())
        except (OSError, ValueError, SafetensorError) as error:
            raise UsageError(
                "The tensors of an earlier run cannot be read.",
                where=str(path),
                found=f"{type(error).__name__}: {error}",
                fix="remove the file",
            ) from error

    def put_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors, whole or not at all.

        Raises:
            SaveError: the file cannot be written.
        """
        on_cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        self._write(self._path_of(name), lambda: save(on_cpu))

    def remove_tensors_but(self, name: str) -> None:
        """Removes the tensors of all other names."""
        if self._path is not None:
            files = set(self._path.parent.glob(f"{self._path.stem}-*.safetensors"))
            for file in files - {self._path_of(name)}:
                file.unlink(missing_ok=True)

    def _path_of(self, name: str) -> Path | None:
        """Where the tensors of a name are."""
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        path = self._path
        return path and path.with_name(f"{path.stem}-{digest}.safetensors")

    def _write(self, path: Path | None, content: Callable[[], bytes]) -> None:
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content())
        except OSError as error:
            raise SaveError(
                "The results so far cannot be written.", where=str(path), found=str(error)
            ) from error


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if (document["format"], document["key"]) == (_FORMAT, key):
            return dict(document["results"])
        found = f"format {document['format']!r}, key {document['key']!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise UsageError(
        "The results of an earlier run cannot be read.",
        where=str(path),
        found=found,
        needed=f"format {_FORMAT!r}, key {key!r}",
        fix="remove the file to begin anew",
    )


def key_of(executor: Executor, tokens: Tensor, settings: Mapping[str, Any]) -> str:
    """SHA-256 of what results depend on: the weights, how they are split, the tokens, versions.

    Args:
        tokens: int64 [chunks, length].
        settings: the rest, as JSON data.
    """
    program = executor.program
    split = {
        f"{part.name}.{region}": assignment
        for part in program.parts
        for region, assignment in part.assignments.items()
    }
    facts = {
        "versions": [__version__, torch.__version__, transformers.__version__],
        "device": str(executor.device),
        "backend": executor.backend.value,
        "weights": fingerprint(executor.tensors),
        "tp": program.tp,
        "split": split,
        "shape": list(tokens.shape),
        "settings": dict(settings),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(tokens.to(torch.int64).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
