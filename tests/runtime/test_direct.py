"""Collectives of this package's own: exact, in the order of the ranks, and bounded.

Whole programs over them are in test_distributed.py and test_two_nodes.py, ranks that end or stall
in test_faults.py.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, combinations
from pathlib import Path
from threading import Thread, Timer
from typing import Any

import pytest
import torch

from spdcompile.runtime import native, sockets
from tests.runtime.direct_worker import PIECE

WORKER = "tests.runtime.direct_worker"
GROUPS = 4
SECRET = b"between us only!"
ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@contextmanager
def segments(ranks: int) -> Iterator[list[list[list[int]]]]:
    """Four segments: group -> rank -> its descriptor."""
    files = [os.memfd_create(f"test-{group}") for group in range(GROUPS)]
    try:
        for file in files:
            os.ftruncate(file, torch.ops.spd_shared_memory.segment_bytes(ranks, PIECE))
        yield [[[file]] * ranks for file in files]
    finally:
        for file in files:
            os.close(file)


@contextmanager
def connections(ranks: int) -> Iterator[list[list[list[int]]]]:
    """Sockets between all ranks: group -> rank -> the descriptors of its ends."""
    with ExitStack() as stack:
        groups = [[[-1] * ranks for _ in range(ranks)] for _ in range(GROUPS)]
        for group in groups:
            for first, second in combinations(range(ranks), 2):
                ends = [stack.enter_context(end) for end in socket.socketpair()]
                group[first][second], group[second][first] = (end.fileno() for end in ends)
        yield groups


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize(
    ("namespace", "opened"), [("spd_shared_memory", segments), ("spd_sockets", connections)]
)
def test_ranks_get_exact_sums_and_joins(
    namespace: str, opened: Callable[[int], Any], ranks: int
) -> None:
    native.load_library()
    with opened(ranks) as groups:
        started = [
            _start(namespace, rank, ranks, [group[rank] for group in groups])
            for rank in range(ranks)
        ]
    ended = [process.communicate(timeout=240) for process in started]
    assert [out for out, _ in ended] == ["ok\n"] * ranks, "".join(error for _, error in ended)


def _start(namespace: str, rank: int, ranks: int, groups: list[list[int]]) -> subprocess.Popen[str]:
    texts = (",".join(map(str, files)) for files in groups)
    return subprocess.Popen(
        [sys.executable, "-m", WORKER, namespace, str(rank), str(ranks), *texts],
        cwd=ROOT,
        pass_fds=[file for files in groups for file in files if file >= 0],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def _met(
    *secrets: bytes, visit: Callable[[ExitStack, list[tuple[str, int]]], object] = lambda *_: None
) -> Iterator[list[tuple[dict[int, socket.socket], OSError | None]]]:
    """What each rank of a mesh has, and what went wrong, if they have these secrets.

    Args:
        visit: connects to the ranks before they do.
    """
    with ExitStack() as stack:
        listeners = [stack.enter_context(sockets._listening("127.0.0.1")) for _ in secrets]
        offers = [("127.0.0.1", listener.getsockname()[1]) for listener in listeners]
        found: list[dict[int, socket.socket]] = [{} for _ in secrets]
        wrong: list[OSError | None] = [None for _ in secrets]

        def meet(rank: int) -> None:
            try:
                sockets._connect(found[rank], secrets[rank], rank, offers, listeners[rank])
            except OSError as error:
                wrong[rank] = error

        visit(stack, offers)
        threads = [Thread(target=meet, args=[rank]) for rank in range(len(secrets))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        try:
            yield list(zip(found, wrong, strict=True))
        finally:
            for connection in chain.from_iterable(each.values() for each in found):
                connection.close()


def test_ranks_connect_with_each_other() -> None:
    with _met(SECRET, SECRET, SECRET) as met:
        assert all(wrong is None for _, wrong in met)
        for (first, (one, _)), (second, (other, _)) in combinations(enumerate(met), 2):
            one[second].sendall(bytes([first, second]))
            assert other[first].recv(2) == bytes([first, second])


def test_strangers_do_not_keep_ranks_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_HELLO_S", 0.2)

    def visit(stack: ExitStack, offers: list[tuple[str, int]]) -> None:
        """One says nothing, one too little, one resets the connection, one says who it is not."""
        for said in (b"", SECRET, None, b"x" * 16 + bytes([0, 0, 0, 1])):
            stranger = stack.enter_context(socket.create_connection(offers[0]))
            if said is None:
                reset = struct.pack("ii", 1, 0)
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                stranger.close()
            else:
                stranger.sendall(said)

    with _met(SECRET, SECRET, visit=visit) as ((first, wrong), (second, also_wrong)):
        assert wrong is None and also_wrong is None
        first[1].sendall(b"you")
        assert second[0].recv(3) == b"you"


def test_a_hello_may_come_in_pieces() -> None:
    one, other = socket.socketpair()
    with one, other:
        one.sendall(SECRET)
        Timer(0.1, one.sendall, [bytes([0, 0, 0, 1])]).start()
        said = sockets._hello(other, time.monotonic() + 20)
    assert said == SECRET + bytes([0, 0, 0, 1])


def test_ranks_do_not_take_a_stranger_for_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_CONNECT_S", 1.0)
    with _met(SECRET, SECRET, b"somebody else's.") as ((first, wrong), (second, also_wrong), _):
        assert set(first) == {1} and set(second) == {0}
        assert isinstance(wrong, TimeoutError) and isinstance(also_wrong, TimeoutError)


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, ""),
        ({"MASTER_ADDR": "localhost"}, ""),
        ({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}, "127.0.0.1"),
        ({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo,other"}, "127.0.0.1"),
    ],
)
def test_a_rank_on_the_first_host_is_reached_where_that_is(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], address: str
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sockets._own_address() == address


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
