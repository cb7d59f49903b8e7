"""A port of 127.0.0.1 whose connections go on to another one, until it is closed; or whose answers get lost."""

from __future__ import annotations

import socket
from contextlib import suppress
from threading import Thread


class Forwarder:
    """Before `target`, another port of 127.0.0.1. It can be closed and opened again, at the same port."""

    def __init__(self, target: int) -> None:
        self.lose = b""  # the answer to the next request that begins so; it is done, and nobody is told
        self._target, self._open = target, set[socket.socket]()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._listen()

    def open(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self.port))
        self._listen()

    def close(self) -> None:
        """Connections are refused, and those that are there cut off."""
        for one in (self._server, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def _listen(self) -> None:
        Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = server.accept()
                Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        far = socket.create_connection(("127.0.0.1", self._target))
        self._open |= {near, far}
        first = near.recv(1 << 16)
        lost = bool(self.lose) and first.startswith(self.lose)
        self.lose = b"" if lost else self.lose
        with suppress(OSError):
            far.sendall(first)
        Thread(target=self._pass, args=(near, far), daemon=True).start()
        if lost:
            far.recv(1)
        else:
            self._pass(far, near)
        for one in (near, far):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
