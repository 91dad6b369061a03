"""Two machines, which here are two network namespaces: a torchrun in each, one rank in each."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import spdcompile
from tests.compare import rel_err
from tests.runtime.launching import TORCHRUN, Launch, launched
from tests.runtime.replica_worker import model, requests

PORT = 29411
F32_BOUND = 1e-5
TIMEOUT_S = 5
LIMIT_S = 250

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


class Node(NamedTuple):
    """A network namespace with one interface to the other."""

    name: str
    address: str
    interface: str


def ip(*arguments: str) -> str:
    """Runs `ip`; returns what it said if it failed."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    return done.stderr.strip() or "failed" if done.returncode else ""


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    """Two namespaces joined by a virtual cable; removed afterwards."""
    if shutil.which("ip") is None or os.getuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    tag = f"spd{os.getpid() % 100000}"
    pair = (
        Node(f"{tag}a", "10.211.77.1", f"{tag}va"),
        Node(f"{tag}b", "10.211.77.2", f"{tag}vb"),
    )
    first, second = pair
    steps = [("netns", "add", node.name) for node in pair]
    steps += [("link", "add", first.interface, "netns", first.name, "type", "veth")]
    steps[-1] += ("peer", "name", second.interface, "netns", second.name)
    for node in pair:
        inside = ("-n", node.name)
        steps += [
            (*inside, "addr", "add", f"{node.address}/24", "dev", node.interface),
            (*inside, "link", "set", node.interface, "up"),
            (*inside, "link", "set", "lo", "up"),
        ]
    try:
        for step in steps:
            if trouble := ip(*step):
                pytest.skip(f"no network namespaces here: ip {' '.join(step)}: {trouble}")
        yield pair
    finally:
        for node in pair:
            ip("netns", "delete", node.name)  # takes its interface with it


def command(node: Node, host: Node, *worker: str) -> list[str]:
    """torchrun on one of two machines, as docs/launching.md has it."""
    return [
        *("ip", "netns", "exec", node.name, *TORCHRUN),
        *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "two-nodes"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host.address}:{PORT}"),
        *("--rdzv-conf", f"is_host={int(node == host)}", "--local-addr", node.address),
        *("-m", *worker),
    ]


def start(stack: ExitStack, nodes: tuple[Node, Node], *worker: str) -> list[Launch]:
    """A launch on each machine."""
    launches = []
    for node in nodes:
        names = {"GLOO_SOCKET_IFNAME": node.interface, "SPD_TIMEOUT": str(TIMEOUT_S)}
        line = command(node, nodes[0], *worker)
        launches.append(stack.enter_context(launched(line, names)))
    return launches


def test_two_nodes_equal_one_process(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    with ExitStack() as stack:
        worker = ("tests.runtime.replica_worker", str(tmp_path), "2")
        for launch in start(stack, nodes, *worker):
            ended = launch.wait(LIMIT_S)
            assert ended.code == 0, ended.output
    local = spdcompile.compile(model(), tp=2, executor="local", backend="eager")
    for rank in range(2):
        found = torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True)
        assert found["replica"] == [0, 1] and found["transport"] == "sockets"
        for logits, ids in zip(found["logits"], requests(), strict=True):
            assert rel_err(logits, local(ids).logits) < F32_BOUND


@pytest.mark.slow
def test_cut_cable_ends_the_ranks_of_both_nodes(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    with ExitStack() as stack:
        worker = ("tests.runtime.fault_worker", "torchrun killed", str(tmp_path))
        launches = start(stack, nodes, *worker)
        deadline = time.time() + LIMIT_S
        while not (tmp_path / "began").exists() and time.time() < deadline:
            time.sleep(0.1)
        ip("-n", nodes[0].name, "link", "set", nodes[0].interface, "down")
        pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
        allowed = time.time() + TIMEOUT_S + 10
        try:
            while any(pid in launch.processes() for launch in launches for pid in pids):
                assert time.time() < allowed, "ranks are left"
                time.sleep(0.1)
        finally:
            ip("-n", nodes[0].name, "link", "set", nodes[0].interface, "up")
        ends = [launch.wait(60) for launch in launches]
    assert all(ended.code != 0 for ended in ends)
    said = [message for ended in ends for message in ended.messages]
    assert len(said) == 2, ends  # one on each side, which cannot hear each other
    assert "Rank 1 has not been heard of" in said[0] and "lost the store" in said[1]
