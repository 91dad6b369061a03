"""The link that `measure_link.py` measures on has the delay that it is asked for."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SLOW_LINK = Path(__file__).parent.parent / "examples" / "slow_link.py"
ASK = """
import socket, sys, time
took = []
for _ in range(10):
    began = time.perf_counter()
    refused = socket.socket().connect_ex((sys.argv[1], 9))  # nobody listens: one way and back
    took.append(time.perf_counter() - began)
    assert refused
print(min(took))
"""


def test_packets_take_the_delay_each_way() -> None:
    tools = shutil.which("ip") and shutil.which("tc") and os.access("/dev/net/tun", os.W_OK)
    if not tools or os.getuid() != 0:
        pytest.skip("a link needs root, /dev/net/tun and the commands ip and tc")
    slow_link = runpy.run_path(str(SLOW_LINK))["slow_link"]
    delay, trips = 0.005, []
    for asked in (0.0, delay):
        with slow_link("100mbit", asked) as (here, there):
            command = (sys.executable, "-c", ASK, there.address)
            trips.append(float(run("ip", "netns", "exec", here.namespace, *command)))
        assert here.namespace not in run("ip", "netns")
    assert trips[0] < 2 * delay <= trips[1]


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
