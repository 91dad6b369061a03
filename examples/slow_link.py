"""A link of a given rate and delay between two network namespaces of this machine; for root.

Without a delay it is a virtual cable. With one it is a pair of tunnels, between which a thread of
this process carries the packets; that adds some tenths of a millisecond of its own.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Event, Thread
from typing import NamedTuple

ADDRESSES = ("10.213.77.1", "10.213.77.2")
_BURST = "128kb"  # that passes before the rate holds
_PACKET = 65000  # bytes that a tunnel takes at once: a thread cannot carry many packets
_TUNNEL_REQUEST, _TUNNEL_FLAGS = 0x400454CA, 0x1001  # <linux/if_tun.h>: IP packets, nothing else


class End(NamedTuple):
    """One of the two machines that a namespace stands for."""

    namespace: str
    interface: str
    address: str


@contextmanager
def slow_link(rate: str, delay: float = 0.0) -> Iterator[tuple[End, End]]:
    """The link's ends; everything is removed afterwards.

    Args:
        rate: as `tc` has it: 200mbit.
        delay: one-way, in seconds.
    """
    tag = f"spd{os.getpid() % 10000}"
    first, second = ends = tuple(
        End(f"{tag}{side}", f"{tag}{side}0", address)
        for side, address in zip("ab", ADDRESSES, strict=True)
    )
    with ExitStack() as stack:
        for end in ends:
            ip("netns", "add", end.namespace)
            stack.callback(ip, "netns", "delete", end.namespace)
        if delay:
            tunnels = [tunnel(end.interface) for end in ends]
            for file in tunnels:
                stack.callback(os.close, file)
            for end in ends:
                ip("link", "set", end.interface, "netns", end.namespace)
                ip("-n", end.namespace, "link", "set", end.interface, "mtu", str(_PACKET))
        else:
            peer = ("peer", "name", second.interface, "netns", second.namespace)
            place = ("netns", first.namespace, "type", "veth")
            ip("link", "add", first.interface, *place, *peer)
        for end in ends:
            inside = ("-n", end.namespace)
            ip(*inside, "addr", "add", f"{end.address}/24", "dev", end.interface)
            ip(*inside, "link", "set", end.interface, "up")
            ip(*inside, "link", "set", "lo", "up")
            shape = ("rate", rate, "burst", _BURST, "latency", "50ms")
            run("tc", *inside, "qdisc", "add", "dev", end.interface, "root", "tbf", *shape)
        if delay:
            stop = Event()
            relay = Thread(target=carry, args=(*tunnels, delay, stop))
            relay.start()
            stack.callback(relay.join)
            stack.callback(stop.set)
        yield ends


def tunnel(interface: str) -> int:
    """A network interface whose packets this process reads and writes: the file for that."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", interface.encode(), _TUNNEL_FLAGS)
    fcntl.ioctl(file, _TUNNEL_REQUEST, request)
    return file


def carry(left: int, right: int, delay: float, stop: Event) -> None:
    """Carries packets between two tunnels, each so many seconds after it came."""
    other = {left: right, right: left}
    under_way: deque[tuple[float, int, bytes]] = deque()  # equal delays: they arrive in order
    while not stop.is_set():
        until = under_way[0][0] - time.perf_counter() if under_way else 0.05
        ready, _, _ = select.select(other, (), (), max(until, 0.0))
        now = time.perf_counter()
        for file in ready:
            under_way.append((now + delay, other[file], os.read(file, 2 * _PACKET)))
        while under_way and under_way[0][0] <= now:
            _, file, packet = under_way.popleft()
            os.write(file, packet)


def ip(*arguments: str) -> None:
    run("ip", *arguments)


def run(*command: str) -> None:
    subprocess.run(command, check=True)
