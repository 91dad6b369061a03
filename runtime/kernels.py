"""Compiled kernels, kept from one start to the next in a directory that is the user's alone.

What Inductor writes is code that runs when it is read, and it reads whatever lies in its cache
directory. So each process gives it an empty one, copies there what was kept for the program that
is to run, each file once its digest is found right, and keeps what is compiled in addition. A file
that changed, or that was made by other versions or for other hardware, is never copied.

    <root>/kept/<program>-<conditions>/kept.json, files
    <root>/work/<random>/                   Inductor's own, gone with the process

Inductor's own names are digests of what it compiles, inputs included.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from spdcompile.files import write_whole
from spdcompile.log import Component, get_logger
from spdcompile.passes.base import Program
from spdcompile.runtime._torch import (
    on_compilation,
    skip_probing_vector_instructions,
    vector_instructions_work,
)
from spdcompile.runtime.kernel_directory import (
    MANIFEST,
    WorkDirectory,
    locked,
    make_private,
    work_directory,
)

_LOG = get_logger(Component.RUNTIME)
_DAMAGES = (OSError, ValueError, KeyError, TypeError, AttributeError)


class Kernels:
    """The kernels of one program.

    Args:
        program: its graphs, in which its plan shows, tell it from others.
        device: where it runs.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self._program, self._device = program, device
        self._kept: Path | None = None

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Around a run: what was kept is there, what is compiled is kept afterwards."""
        work = work_directory()
        if work is None:
            yield
            return
        with work.in_use():
            if self._kept is None:
                self._kept = self._fetch(work)
            on_compilation(work.note, _nothing)
            yield
            if work.compiled:
                work.compiled = False
                try:
                    self._keep(work, self._kept)
                except OSError as error:
                    _LOG.warning("Compiled kernels are not kept: %s", error)

    def _fetch(self, work: WorkDirectory) -> Path:
        """Copies what was kept for this program, and says where that is."""
        made_by = conditions(self._device)
        program = _digest(*_texts(self._program))[:32]
        kept = work.kept / f"{program}-{_digest(json.dumps(made_by))[:32]}"
        try:
            with locked(kept):
                manifest = _manifest_of(kept)
                contents = _verified(kept, manifest, made_by)
            if manifest["vector_instructions_work"] is True:
                skip_probing_vector_instructions()
        except FileNotFoundError:
            _tell_of_others(kept, program, made_by)
        except _DAMAGES as error:
            _LOG.warning("Compiled anew, since kept kernels are damaged: %s", error)
            shutil.rmtree(kept, ignore_errors=True)
        else:
            with suppress(OSError):  # a full disk: then some are compiled again
                for file, content in contents.items():
                    work.add(file, content)
        return kept

    def _keep(self, work: WorkDirectory, kept: Path) -> None:
        """Keeps the files that are new in the work directory."""
        made_by = conditions(self._device)
        with locked(kept):
            make_private(kept)
            try:
                files = dict(_manifest_of(kept)["files"])
            except _DAMAGES:
                files = {}
            for file, content in work.new_files():
                if file not in files:
                    write_whole(kept / _flat(file), content)
                    files[file] = _digest(content)
            manifest = {
                "made_by": made_by,
                "vector_instructions_work": vector_instructions_work(),
                "files": files,
            }
            write_whole(kept / MANIFEST, json.dumps(manifest, indent=1))


def conditions(device: torch.device) -> dict[str, str]:
    """What kernels are made by and for, beside the program: versions, sources, hardware."""
    made_by = {
        "spdcompile": f"sources {_sources()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_cpu()}",
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        made_by["gpu"] = f"{found.name} {found.major}.{found.minor}, CUDA {torch.version.cuda}"
    return made_by


@cache
def _cpu() -> str:
    """The first processor's model and features, as a digest."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = [platform.processor()]
        wanted = ("",)
    return _digest(*(line for line in lines if line.startswith(wanted)))[:16]


@cache
def _sources() -> str:
    """This package's, as a digest: what it gives Inductor to compile changes with them."""
    walk = sorted(os.walk(Path(__file__).parents[1], followlinks=True))
    files = [Path(root, name) for root, _, names in walk for name in sorted(names)]
    return _digest(*(file.read_bytes() for file in files if file.suffix == ".py"))[:16]


def _texts(program: Program) -> Iterator[str]:
    """The code of each graph that a program runs."""
    yield str(program.tp)
    for name in dict.fromkeys(part.graph for part in program.parts):
        yield program.graphs[name].module.code


def _verified(
    kept: Path, manifest: Mapping[str, Any], made_by: Mapping[str, str]
) -> dict[str, bytes]:
    """The contents of the files that were kept, by name.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: not as they were left.
    """
    if manifest["made_by"] != made_by:
        raise ValueError(f"{kept / MANIFEST} is of {manifest['made_by']}")
    contents = {}
    for file, digest in manifest["files"].items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError(f"{kept / MANIFEST} names {file!r}")
        path = kept / _flat(file)
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        contents[file] = path.read_bytes()
        if _digest(contents[file]) != digest:
            raise ValueError(f"{path} has changed")
    os.utime(kept / MANIFEST)  # it is used still
    return contents


def _manifest_of(kept: Path) -> dict[str, Any]:
    """What a manifest says.

    Raises:
        FileNotFoundError: nothing was kept.
        PermissionError, ValueError: somebody else may write there; no JSON data.
    """
    text = (kept / MANIFEST).read_text(encoding="utf-8")
    make_private(kept)
    return json.loads(text)


def _tell_of_others(kept: Path, program: str, made_by: Mapping[str, str]) -> None:
    """Says why the kernels of an earlier start are not used."""
    for other in kept.parent.glob(f"{program}-*/{MANIFEST}"):
        with suppress(*_DAMAGES):
            found = _manifest_of(other.parent)["made_by"]
            changed = [name for name in made_by if found.get(name) != made_by[name]]
            listing = "; ".join(f"{name} {found.get(name)}" for name in changed)
            _LOG.warning("Compiled anew, since kept kernels were made by or for %s", listing)
            return


def _digest(*contents: str | bytes) -> str:
    digest = hashlib.sha256()
    for content in contents:
        data = content.encode() if isinstance(content, str) else content
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _flat(file: str) -> str:
    """The name of a kept file; Inductor's own lie in directories."""
    return file.replace("/", "+")


def _nothing(_: object) -> None:
    """What happens when a compilation ends."""
