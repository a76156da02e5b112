"""A connection between two supervisors: JSON lines both ways, and nobody ever waits in it."""

import json
import socket
from typing import Any

from sfumato.launch.pulse import Stillness

LONGEST = 64 << 20
"""Bytes of a line after which the other end is no supervisor."""


class Line:
    """One end of it. `closed`: the other end has gone, or is none of ours."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.unread, self.unsent = connection, b"", b""
        self.closed = False
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
        """What has come since."""
        self.flush()
        try:
            while content := self.socket.recv(1 << 16):
                self.unread += content
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self.unread = self.unread.split(b"\n")
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict):
                self.closed = True
                break
            messages.append(message)
        self.closed |= len(self.unread) > LONGEST
        self.heard += len(messages)
        return messages

    @property
    def silent(self) -> float:
        """Seconds without a word, in which this process was awake."""
        return self.still.look(self.heard)

    def close(self) -> None:
        """Hang up."""
        self.closed = True
        self.socket.close()
