"""Kept kernels: there at the next start if nothing about them changed, and else never used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spdcompile
from spdcompile.passes.base import Program
from spdcompile.runtime import kernel_directory, kernels
from spdcompile.runtime.kernel_directory import INDUCTOR_VARIABLE, MANIFEST, work_directory
from spdcompile.runtime.kernels import Kernels
from tests.models import tiny
from tests.runtime.launching import ROOT

CPU = torch.device("cpu")
FILES = {"ab/cab.so": b"\x7fELF", "fxgraph/x/y/entry": b"graph"}


@pytest.fixture(scope="module")
def program() -> Program:
    model = tiny("llama", layers=1, hidden=16, heads=2, intermediate=16)
    return spdcompile.compile(model, tp=2, backend="eager").program


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(INDUCTOR_VARIABLE, raising=False)
    monkeypatch.setattr(kernel_directory, "_work", None)
    return tmp_path / "cache"


def _start(monkeypatch: pytest.MonkeyPatch, program: Program) -> tuple[Path, Kernels]:
    """A new process' work directory after its first run, during which nothing was compiled."""
    monkeypatch.setattr(kernel_directory, "_work", None)
    own = Kernels(program, CPU)
    with own.at_hand():
        pass
    work = work_directory()
    assert work is not None
    return work.path, own


def _compile(own: Kernels, files: dict[str, bytes]) -> None:
    """A run during which Inductor writes files."""
    with own.at_hand():
        work = kernel_directory._work
        assert os.environ[INDUCTOR_VARIABLE] == str(work.path)
        for name, content in files.items():
            (work.path / name).parent.mkdir(parents=True, exist_ok=True)
            (work.path / name).write_bytes(content)
        work.note(None)


def _found(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


def _kept(root: Path) -> Path:
    (manifest,) = (root / "kept").glob(f"*/{MANIFEST}")
    return manifest.parent


@pytest.fixture
def kept(root: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files of a first start were kept."""
    path, own = _start(monkeypatch, program)
    assert not _found(path)
    _compile(own, {**FILES, "locks/cab.lock": b"", "ab/half.tmp": b"half"})
    return _kept(root)


def test_next_start_has_what_was_compiled(
    kept: Path, program: Program, monkeypatch: pytest.MonkeyPatch, notices: list[str]
) -> None:
    first = Path(kernel_directory._work.path)
    second, _ = _start(monkeypatch, program)
    assert second != first
    assert _found(second) == FILES
    assert INDUCTOR_VARIABLE not in os.environ, "only while a program runs"
    assert not notices


def test_later_compilations_are_added(
    kept: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, own = _start(monkeypatch, program)
    _compile(own, {"cd/more.so": b"more"})
    assert _found(_start(monkeypatch, program)[0]) == {**FILES, "cd/more.so": b"more"}


def test_another_program_gets_none(
    kept: Path, program: Program, monkeypatch: pytest.MonkeyPatch, notices: list[str]
) -> None:
    dropped = tiny("llama", layers=1, hidden=16, heads=2, intermediate=16)
    other = spdcompile.compile(dropped, tp=2, spd_mask=[True], backend="eager").program
    assert not _found(_start(monkeypatch, other)[0])
    assert not notices


@pytest.mark.parametrize("what", ["changed", "cut", "missing", "named outside", "no JSON", "data"])
def test_damaged_kernels_are_never_used(
    what: str, kept: Path, program: Program, monkeypatch: pytest.MonkeyPatch, notices: list[str]
) -> None:
    file, manifest = kept / "ab+cab.so", kept / MANIFEST
    data = json.loads(manifest.read_text())
    if what == "changed":
        file.write_bytes(b"\x7fELG")
    elif what == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif what == "missing":
        file.unlink()
    elif what == "named outside":
        data["files"]["../../escaped"] = data["files"].pop("ab/cab.so")
        manifest.write_text(json.dumps(data))
    elif what == "no JSON":
        manifest.write_text(manifest.read_text()[:-5])
    else:
        manifest.write_text(json.dumps({**data, "files": ["ab/cab.so"]}))
    path, own = _start(monkeypatch, program)
    assert not _found(path)
    (notice,) = notices
    assert notice.startswith("Compiled anew, since kept kernels are damaged: ")
    _compile(own, FILES)
    assert _found(_start(monkeypatch, program)[0]) == FILES


def test_kernels_of_other_versions_are_not_used(
    kept: Path, program: Program, monkeypatch: pytest.MonkeyPatch, notices: list[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.0.0")
        assert not _found(_start(monkeypatch, program)[0])
    assert notices == [
        f"Compiled anew, since kept kernels were made by or for torch {torch.__version__}"
    ]


def test_renamed_kernels_of_other_hardware_are_not_used(
    kept: Path, program: Program, monkeypatch: pytest.MonkeyPatch, notices: list[str]
) -> None:
    data = json.loads((kept / MANIFEST).read_text())
    data["made_by"]["cpu"] = "another"
    (kept / MANIFEST).write_text(json.dumps(data))
    assert not _found(_start(monkeypatch, program)[0])
    assert "is of" in notices[0]


def test_each_condition_is_part_of_the_key() -> None:
    made_by = kernels.conditions(CPU)
    assert made_by["torch"] == torch.__version__
    assert set(made_by) == {"spdcompile", "torch", "transformers", "python", "cpu"}
    assert len(kernels._sources()) == 16


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_directory_that_others_may_write_to_is_not_used(
    mode: int, kept: Path, root: Path, monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    root.chmod(mode)
    monkeypatch.setattr(kernel_directory, "_work", None)
    assert work_directory() is None
    root.chmod(0o700)
    kept.chmod(mode)
    assert not _found(_start(monkeypatch, program)[0])


def test_directory_of_the_users_choice_is_left_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    monkeypatch.setenv(INDUCTOR_VARIABLE, str(tmp_path / "own"))
    with Kernels(program, CPU).at_hand():
        assert os.environ[INDUCTOR_VARIABLE] == str(tmp_path / "own")
    assert not root.exists()


def test_directory_is_in_the_users_cache_by_default(tmp_path: Path) -> None:
    found = kernel_directory.root_directory({"XDG_CACHE_HOME": str(tmp_path)})
    assert found == tmp_path / "spdcompile"
    assert kernel_directory.root_directory({}) == Path.home() / ".cache" / "spdcompile"


def test_what_a_killed_process_left_is_removed_and_no_more(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import os; from spdcompile.runtime.kernel_directory import work_directory; "
        "print(work_directory().path, flush=True); os._exit(1)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    living = work_directory()
    assert living is not None
    left = Path(killed.stdout.strip())
    assert left.parent == living.path.parent
    assert not left.exists(), "removed by the next process"
    monkeypatch.setattr(kernel_directory, "_work", None)
    another = work_directory()
    assert another is not None
    assert living.path.exists(), "its process lives"
    assert another.path != living.path


_START = """
import torch, spdcompile
from spdcompile.runtime import compiled_function
from tests.models import tiny, token_ids

count, compile_ahead = 0, compiled_function.compile_ahead

def counted(*arguments):
    global count
    count += 1
    return compile_ahead(*arguments)

compiled_function.compile_ahead = counted
model = tiny("llama", layers=1, hidden=16, heads=2, intermediate=16)
compiled = spdcompile.compile(model, tp=2, executor="local")
for length in (5, 6):
    ids = token_ids(length=length)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
print("compiled", count, "of", len(compiled.program.graphs))
"""


@pytest.mark.slow
def test_second_start_compiles_nothing(root: Path) -> None:
    def start() -> str:
        command = [sys.executable, "-c", _START]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.check_output(command, cwd=ROOT, env=environment, text=True).strip()

    assert start() == "compiled 3 of 3"
    assert start() == "compiled 0 of 3"
    assert not list((root / "work").iterdir())
