"""A connection between two supervisors: JSON lines both ways, and nobody ever waits in it."""

import json
import socket
from typing import Any

from sfumato.launch.pulse import Stillness

LONGEST, GREETING = 64 << 20, 1 << 16
"""Bytes of a line after which the other end is no supervisor: of one that is known, and of a stranger."""
AT_ONCE = 8 << 20
"""Bytes that are read in one look; who sends without an end must not keep us from everything else."""


class Line:
    """One end of it. `closed`: the other end has gone, or is none of ours."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.unread, self.unsent = connection, bytearray(), b""
        self.closed = False
        self.longest = GREETING
        self.parent = False
        """Whether the other end is none of the nodes but a parent of all."""
        self.heard = 0
        self.still = Stillness(awake=1.0)

    def send(self, **message: Any) -> None:
        """Say something, as far as the other end takes it now; `take` goes on with the rest."""
        self.unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what is still to be sent, as far as that goes."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.closed, self.unsent = True, b""

    def take(self) -> list[dict[str, Any]]:
        """What has come since. Nothing comes of one who sends anything but JSON objects."""
        self.flush()
        new = self._read()
        if b"\n" not in new:
            self.unread += new
            self.closed |= len(self.unread) > self.longest
            return []
        *lines, rest = bytes(self.unread + new).split(b"\n")
        self.unread = bytearray(rest)
        messages = []
        for line in lines:
            try:
                message = json.loads(line) if len(line) <= self.longest else None
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                self.closed = True
                break
            messages.append(message)
        self.heard += len(messages)
        return messages

    def _read(self) -> bytearray:
        """What is there to be read, up to a bound."""
        new = bytearray()
        try:
            while len(new) < AT_ONCE:
                content = self.socket.recv(1 << 18)
                if not content:
                    self.closed = True
                    break
                new += content
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        return new

    @property
    def silent(self) -> float:
        """Seconds without a word, in which this process was awake."""
        return self.still.look(self.heard)

    def close(self) -> None:
        """Hang up."""
        self.closed = True
        self.socket.close()
