"""An object server that answers wrongly as often as it is told, in ways that libraries for tests do not offer."""

import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

FAULTS = {
    "busy": b"HTTP/1.1 503 Slow Down\r\nContent-Length: 4\r\n\r\nslow",
    "failing": b"HTTP/1.1 500 Internal\r\nContent-Length: 0\r\n\r\n",
    "reset": None,
    "closed": None,
    "reset in the body": None,
    "closed in the body": None,
    "closed before the body": None,
    "stalled in the body": None,
    "less than it says": None,
    "less, and says so": None,
}


@dataclass
class FaultyServer:
    """Answers ``data`` for each key, after the fault, ``left`` times."""

    data: bytes
    url: str = ""
    fault: str = ""
    left: int = 0
    requests: int = 0
    closing: threading.Event = field(default_factory=threading.Event)

    def serve(self, connection: socket.socket) -> None:
        """Answer all requests of one connection."""
        buffer = b""
        with connection, suppress(OSError):
            while True:
                while b"\r\n\r\n" not in buffer:
                    more = connection.recv(1 << 16)
                    if not more:
                        return
                    buffer += more
                head, _, buffer = buffer.partition(b"\r\n\r\n")
                self.requests += 1
                found = re.search(rb"(?i)range: bytes=(\d+)-(\d+)", head)
                start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, len(self.data))
                if not self.answer(connection, start, min(stop, len(self.data)), found is not None):
                    return

    def answer(self, connection: socket.socket, start: int, stop: int, partial: bool) -> bool:
        """Whether the connection may go on."""
        fault, half = "", start + (stop - start) // 2
        if self.left:
            self.left, fault = self.left - 1, self.fault
        if fault.startswith("reset"):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in ("reset", "closed"):
            return False
        if FAULTS.get(fault):
            connection.sendall(FAULTS[fault] or b"")
            return True
        said, given = stop - start, stop
        if fault == "less than it says":
            said, given = half - start, half
        if fault == "less, and says so":
            said, given, stop = half - start, half, half
        lines = [b"HTTP/1.1 206 Partial Content" if partial else b"HTTP/1.1 200 OK"]
        lines += [b"Content-Range: bytes %d-%d/%d" % (start, stop - 1, len(self.data))] * partial
        lines += [b'ETag: "x"', b"Last-Modified: Wed, 21 Oct 2015 07:28:00 GMT", b"Content-Length: %d" % said]
        connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n")
        if fault.endswith("the body"):
            connection.sendall(self.data[start:half] if " in " in fault else b"")
            if fault.startswith("stalled"):
                self.closing.wait(30)
            return False
        connection.sendall(self.data[start:given])
        return True


@contextmanager
def serving(data: bytes) -> Iterator[FaultyServer]:
    """A server that runs until the block is left."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = FaultyServer(data, f"http://127.0.0.1:{listening.getsockname()[1]}")

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=server.serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
