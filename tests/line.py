"""A line to a server of HTTP that breaks where a test says so."""

import socket
import threading
from contextlib import suppress

CHUNK = 1 << 16


class Line:
    """Listens at `port` and passes what comes to the server and back.

    fault: asked of each request that has a body, with its first line; None: it is passed. "cut": half of its body is,
    then both ends are closed. "refuse": it is answered with 500. Anything else is called, when half of the body is
    passed, and then both ends are closed.
    """

    def __init__(self, server, fault):
        self.server, self.fault, self.faults = server, fault, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self):
        self.listener.close()

    def _listen(self):
        with suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with suppress(OSError), client, socket.create_connection(("127.0.0.1", self.server)) as server:
            threading.Thread(target=_pump, args=(server, client), daemon=True).start()
            with client.makefile("rb") as requests:
                while line := requests.readline():
                    head = [line]
                    while (field := requests.readline()) not in (b"\r\n", b""):
                        head.append(field)
                    length = next((int(f.split(b":")[1]) for f in head if f.lower().startswith(b"content-length:")), 0)
                    fault = self.fault(line.decode().strip()) if length else None
                    if fault:
                        self.faults.append(line.decode().strip())
                    if fault == "refuse":
                        requests.read(length)
                        client.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
                        continue
                    server.sendall(b"".join(head) + b"\r\n")
                    _copy(requests, server, length // 2 if fault else length)
                    if fault:
                        if callable(fault):
                            fault()
                        return
            server.shutdown(socket.SHUT_WR)


def _copy(source, target, length):
    while length and (data := source.read(min(length, CHUNK))):
        target.sendall(data)
        length -= len(data)


def _pump(source, target):
    with suppress(OSError):
        while data := source.recv(CHUNK):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)
