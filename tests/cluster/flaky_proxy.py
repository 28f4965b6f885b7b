"""A reverse proxy for HTTP that cuts, resets, delays and answers 502 at random moments."""

from __future__ import annotations

import random
import re
import select
import socket
import time
from collections import Counter

from tests.unit.relays import Listener, read_head, reset

BAD_GATEWAY = (
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: 24\r\nConnection: close\r\n\r\n"
    b"<h1>502 Bad Gateway</h1>"
)
FAULTS = (
    # The request does not reach the server.
    "502, request dropped",
    "reset, request dropped",
    # The server handles the request, and its response gets lost.
    "502, response dropped",
    "reset, response dropped",
    # Some seconds after the request: in the middle of a response, or between two.
    "cut later",
    "reset later",
    "delay of the request",
    "delay of the response",
)
# The most seconds of a delay, and of the time until a cut.
MAX_DELAY = 4.0
CONTENT_LENGTH = re.compile(rb"^content-length: *(\d+)", re.IGNORECASE | re.MULTILINE)


class FlakyProxy(Listener):
    """
    Passes requests on to a server, and some of them not as they came.

    :param port: the server's.
    :param seed: for the random numbers. Threads take them in turn, so a seed does not repeat a run exactly.
    :param share: how many of the requests get one of :data:`FAULTS`.
    :ivar faults: how many requests got which.
    """

    def __init__(self, port: int, seed: int, share: float) -> None:
        super().__init__()
        self._port = port
        self._random = random.Random(seed)
        self._share = share
        self.faults: Counter[str] = Counter()

    def serve(self, client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._port)) as server:
            while (request := _read_request(client)) and self._exchange(client, server, request):
                pass

    def _exchange(self, client: socket.socket, server: socket.socket, request: bytes) -> bool:
        """Pass one request on, and what comes back; return whether both connections go on."""
        fault = self._random.choice(FAULTS) if self._random.random() < self._share else ""
        seconds = self._random.uniform(0.0, MAX_DELAY)
        if fault:
            self.faults[fault] += 1
        if "request dropped" in fault:
            _end(client, fault)
            return False
        if fault == "delay of the request":
            time.sleep(seconds)
        server.sendall(request)
        until = time.monotonic() + seconds if "later" in fault else None
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            ready, _, _ = select.select([client, server], [], [], left)
            if not ready:
                _end(client, fault)
                return False
            if client in ready:
                # The next request, or the end.
                return True
            piece = server.recv(65536)
            if not piece:
                return False
            if "response dropped" in fault:
                _end(client, fault)
                return False
            if fault == "delay of the response":
                time.sleep(seconds)
                fault = ""
            client.sendall(piece)


def _read_request(client: socket.socket) -> bytes:
    head, body = read_head(client)
    length = CONTENT_LENGTH.search(head)
    while length and len(body) < int(length[1]):
        piece = client.recv(65536)
        if not piece:
            return b""
        body += piece
    return head + body


def _end(client: socket.socket, fault: str) -> None:
    if fault.startswith("reset"):
        reset(client)
    elif fault.startswith("502"):
        client.sendall(BAD_GATEWAY)
