"""A web server on loopback that serves a folder by ranged reads, and misbehaves as it is told."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class HttpStore:
    """What is served and how. `faults` maps a file's name to what befalls its next requests, one each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.faults: dict[str, list[str]] = {}
        self.always: dict[str, str] = {}  # file's name -> what befalls every request for it
        self.asked: Counter[str] = Counter()  # GET requests by the file's name

    def fault(self, name: str) -> str:
        """What befalls this request: "", or `500`, `503`, `429`, `403`, `404` (status), `stall`, `short`, `cut`,
        `flip`, `whole` (the range is ignored)."""
        planned = self.faults.get(name)
        return planned.pop(0) if planned else self.always.get(name, "")


def _handler(store: HttpStore, stop: threading.Event) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            name = self.path.removeprefix("/")
            path = store.folder / name
            fault = store.fault(name) if body else ""
            store.asked[name] += body
            if fault == "stall":
                stop.wait(60.0)
                self.close_connection = True
                return
            if fault.isdigit() or not path.is_file():
                self.send_response(int(fault or 404))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            size = len(data)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted and fault != "whole":
                begin, end = int(wanted[1]), min(int(wanted[2] or size - 1) + 1, size)
                if begin >= size:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{size}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = data[begin:end]
            if fault == "short":  # fewer bytes than asked, and the answer says so
                data, end = data[: len(data) // 2], begin + len(data) // 2
            if fault == "flip":
                data = data[:-1] + bytes([data[-1] ^ 1])
            self.send_response(206 if wanted and fault != "whole" else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data)))
            if wanted and fault != "whole":
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.end_headers()
            if body:
                self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
            if fault == "cut":  # the connection breaks in the middle of the answer
                self.close_connection = True

    return Handler


@contextmanager
def serve(folder: Path) -> Iterator[HttpStore]:
    """`folder` at `.url` while the context lasts."""
    store, stop = HttpStore(folder), threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(store, stop))
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join(10.0)
