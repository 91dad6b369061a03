"""Collectives of ranks on several hosts, over a TCP connection between any two (sockets.cpp).

A rank listens for a moment and tells the others where; who connects proves by a secret, which went
through the process group, that it is one of them. A rank is reached at the address from which it
reaches MASTER_ADDR, or, on that host, at MASTER_ADDR; at that of an interface if
GLOO_SOCKET_IFNAME names one.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import struct
import time
from contextlib import ExitStack, suppress
from typing import Any

import torch.distributed as dist

from spdcompile.runtime.direct import Direct, agreed, operators

_NAMESPACE = "spd_sockets"
_CONNECT_S, _HELLO_S = 10.0, 1.0  # for all connections; for one to say whose it is
_SECRET, _HELLO = 16, 20  # bytes; a hello is the secret and a rank
_QUEUE = 128  # of connections that are not accepted yet
_ADDRESS_OF = 0x8915  # SIOCGIFADDR of <linux/sockios.h>


def _open(group: dist.ProcessGroup, timeout: float, not_built: str) -> str:
    """Connects all ranks with each other."""
    rank, size, wrong = dist.get_rank(group), dist.get_world_size(group), not_built
    with ExitStack() as stack:
        offer = ("", 0)
        try:
            host = _own_address()
            listener = stack.enter_context(_listening(host))
            offer = (host, listener.getsockname()[1])
        except (OSError, KeyError) as error:
            wrong = wrong or f"rank {rank} has no address: {error!r}"
        secret = [secrets.token_bytes(_SECRET)]
        dist.broadcast_object_list(secret, group=group, group_src=0)
        offers: list[Any] = [None] * size
        dist.all_gather_object(offers, (*offer, wrong), group=group)
        if why := next((error for *_, error in offers if error), ""):
            return why
        found: dict[int, socket.socket] = {}
        try:
            _connect(found, secret[0], rank, [offer[:2] for offer in offers], listener)
        except OSError as error:
            wrong = f"rank {rank} has no connection to all others: {error}"
        if why := agreed(group, wrong):
            for connection in found.values():
                connection.close()
            return why
    own = operators(_NAMESPACE)
    own.close_mesh(group.group_name)  # of a group of that name that is gone
    connections = [found[other].detach() if other != rank else -1 for other in range(size)]
    own.open_mesh(group.group_name, connections, rank, timeout)
    return ""


def _listening(host: str) -> socket.socket:
    """A port at an address, or at all addresses of this host."""
    if host or not socket.has_dualstack_ipv6():
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, 0), family=family, backlog=_QUEUE)
    return socket.create_server(
        ("", 0), family=socket.AF_INET6, backlog=_QUEUE, dualstack_ipv6=True
    )


def _own_address() -> str:
    """Where other hosts reach this one; "" for at MASTER_ADDR."""
    if interfaces := os.environ.get("GLOO_SOCKET_IFNAME"):
        interface = interfaces.split(",")[0]  # gloo takes several
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            answer = fcntl.ioctl(asked, _ADDRESS_OF, struct.pack("16s16x8x", interface.encode()))
        return socket.inet_ntoa(answer[20:24])
    place = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(place[0], socket.SOCK_DGRAM) as asked:
        asked.connect(place[4])  # sends nothing
        own = asked.getsockname()[0]
    return "" if own in (place[4][0], "127.0.0.1", "::1") else own


def _connect(
    found: dict[int, socket.socket],
    secret: bytes,
    rank: int,
    offers: list[tuple[str, int]],
    listener: socket.socket,
) -> None:
    """Adds to `found` a connection to each other rank: made to those before, accepted from others.

    Raises:
        OSError: there is none with one of them within 10 s.
    """
    until = time.monotonic() + _CONNECT_S
    for other, (host, port) in enumerate(offers[:rank]):
        place = (host or os.environ["MASTER_ADDR"], port)
        found[other] = socket.create_connection(place, timeout=_left(until))
        found[other].sendall(secret + struct.pack("!I", rank))
    while len(found) < len(offers) - 1:
        listener.settimeout(_left(until))
        connection, _ = listener.accept()
        said = _hello(connection, min(until, time.monotonic() + _HELLO_S))
        other = struct.unpack("!I", said[_SECRET:])[0] if len(said) == _HELLO else -1
        if secrets.compare_digest(said[:_SECRET], secret) and rank < other < len(offers):
            found[other] = connection
        else:
            connection.close()  # a stranger
    for connection in found.values():
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _left(until: float) -> float:
    """Seconds until then, at least a moment."""
    return max(until - time.monotonic(), 0.01)


def _hello(connection: socket.socket, until: float) -> bytes:
    """What a connection says first, as far as it comes in time."""
    said = b""
    with suppress(OSError):
        while len(said) < _HELLO:
            connection.settimeout(_left(until))
            piece = connection.recv(_HELLO - len(said))
            if not piece:
                break
            said += piece
    return said


SOCKETS = Direct(_NAMESPACE, "sockets", _open)
