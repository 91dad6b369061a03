"""Collectives through shared memory: exact, in the order of the ranks, and bounded.

Whole programs over shared memory are in test_distributed.py, ranks that end or stall in
test_faults.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spdcompile.runtime import native
from tests.runtime.shared_memory_worker import PIECE

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.mark.parametrize("ranks", (2, 4))
def test_ranks_get_exact_sums_and_joins(ranks: int) -> None:
    native.load_library()
    descriptors = [os.memfd_create(f"test-{place}") for place in range(4)]
    try:
        for fd in descriptors:
            os.ftruncate(fd, torch.ops.spd_shared_memory.segment_bytes(ranks, PIECE))
        command = [sys.executable, "-m", "tests.runtime.shared_memory_worker"]
        started = [
            subprocess.Popen(
                [*command, *map(str, (rank, ranks, *descriptors))],
                cwd=ROOT,
                pass_fds=descriptors,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        ended = [process.communicate(timeout=240) for process in started]
    finally:
        for fd in descriptors:
            os.close(fd)
    assert [out for out, _ in ended] == ["ok\n"] * ranks, "".join(error for _, error in ended)


def _load_anew(environment: dict[str, str]) -> str:
    """What a new process says of the library."""
    script = (
        "from spdcompile.runtime import native\n"
        "try:\n    native.load_library()\n"
        "except native.CannotBuildError as error:\n    print(error)\n"
        "else:\n    print('loaded')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    return done.stdout


def test_library_is_built_once_and_what_a_killed_build_left_does_not_matter(
    tmp_path: Path,
) -> None:
    place = {"SPD_CACHE_DIR": str(tmp_path)}
    (tmp_path / "native" / "tmpkilled").mkdir(parents=True)
    (tmp_path / "native" / "tmpkilled" / "lock").touch()
    os.chmod(tmp_path / "native", 0o700)
    assert _load_anew(place) == "loaded\n"
    (library,) = (tmp_path / "native").glob("*.so")
    made = library.stat().st_mtime_ns
    # Found where it is, without a compiler.
    assert _load_anew({**place, "PATH": "/nowhere"}) == "loaded\n"
    assert library.stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("environment", "words"),
    [({"CXX": "no-such-compiler"}, "no-such-compiler"), ({"CXX": "false"}, "false")],
)
def test_without_a_compiler_it_says_so(
    tmp_path: Path, environment: dict[str, str], words: str
) -> None:
    said = _load_anew({"SPD_CACHE_DIR": str(tmp_path), **environment})
    assert words in said and not list((tmp_path / "native").glob("*.so"))
