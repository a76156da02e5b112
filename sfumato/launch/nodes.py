"""The supervisors of several machines, as one of them sees the others.

Each one talks to that of node 0 only, which passes on what concerns all: a signal, a failure, a hang, and in
the end one verdict, so that every machine's command ends with the same code and says why. A word a second is
a sign of life.

    node N -> 0   beats of its ranks; stop, failed, hangs; stacks; end (how its ranks ended)
    node 0 -> N   beats of its ranks; stop, failed; stacks (please); verdict
    parent -> 0   signal (from `--hostfile`, which watches from elsewhere, and whose end is one, too)
"""

import contextlib
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from sfumato.launch.interface import loopback
from sfumato.launch.line import Line
from sfumato.launch.pulse import Beat
from sfumato.launch.verdict import Ending

EVERY = 1.0  # seconds between two signs of life
MISSED = 5.0  # seconds without one, after which a node is to blame where ranks hang
FAREWELL = 3.0  # seconds in which the verdict has to reach the others
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What a parent may pass on."""


@dataclass(frozen=True)
class At:
    """Which of `count` machines this is, and where node 0 listens.

    limit: seconds until all have come, and of silence after which one is lost. word: what a parent says to be
    known as one; "" where there is none.
    """

    number: int
    count: int
    host: str
    port: int
    limit: float = 600.0
    word: str = ""


@dataclass
class Nodes:
    """The others, and what they said. lines: to all of them (node 0), or to node 0 alone."""

    at: At
    hosts: Sequence[str]
    shares: Sequence[int]
    """By node: how its machine is called, and how many ranks it has."""
    port: int
    """Where the ranks meet, on node 0."""
    lines: dict[int, Line]
    server: socket.socket | None = None
    visitors: list[Line] = field(default_factory=list)
    """Who has come to node 0 and is no node: a parent, strangers."""
    beats: dict[int, Beat] = field(default_factory=dict)
    stop: int | None = None
    """The signal by which another node was asked to stop; 0 if its ranks stop by themselves."""
    again: int | None = None
    failed: bool = False
    hangs: bool = False
    stacks_wanted: bool = False
    stacks: dict[int, dict[str, Any]] = field(default_factory=dict)
    ends: dict[int, dict[str, Any]] = field(default_factory=dict)
    endings: list[Ending] = field(default_factory=list)
    """How the ranks of those nodes ended, by this machine's clock."""
    verdict: tuple[int, str | None] | None = None
    lost: dict[int, str] = field(default_factory=dict)
    """By node: why it is believed to be gone."""
    signals: list[int] = field(default_factory=list)
    """What the parent was told, not yet obeyed."""
    told: set[str] = field(default_factory=set)
    next: float = 0.0

    @property
    def hub(self) -> bool:
        """Whether this is node 0."""
        return self.at.number == 0

    @property
    def world(self) -> int:
        """Ranks of all nodes."""
        return sum(self.shares)

    def ranks(self, node: int) -> range:
        """The ranks of a node."""
        first = sum(self.shares[:node])
        return range(first, first + self.shares[node])

    def own(self) -> str | None:
        """This machine's address by which it and the others talk; None where that is loopback.

        What node 0's name means may differ: on node 0 itself it is often 127.0.1.1.
        """
        for line in self.lines.values():
            address = str(line.socket.getsockname()[0]).removeprefix("::ffff:")
            if not loopback(address):
                return address
        return None

    def unheard(self) -> dict[int, Beat]:
        """The last beats of the ranks of nodes that have neither ended nor told their ranks' stacks."""
        nodes = [node for node in self.lines if node not in self.stacks and node not in self.ends]
        return {rank: self.beats[rank] for node in nodes for rank in self.ranks(node) if rank in self.beats}

    def tell(self, what: str, **message: Any) -> None:
        """Say something to all others, once."""
        if what not in self.told:
            self.told.add(what)
            for line in self.lines.values():
                line.send(**message)

    def poll(self, beats: Mapping[int, Beat]) -> None:
        """Hear what there is to hear, and give a sign of life. beats: of this machine's ranks."""
        now = time.monotonic()
        if now >= self.next:
            self.next = now + EVERY
            said = {rank: astuple(beat) for rank, beat in beats.items()}
            for line in self.lines.values():
                line.send(beats=said)
        for node, line in self.lines.items():
            for message in line.take():
                self._hear(node, message)
            if node in self.lost or self._done(node):
                continue
            if line.closed:
                self.lost[node] = "hung up: its `sfumato` was killed"
            elif line.silent > self.at.limit:
                self.lost[node] = self.mute(line)
        if self.server is not None:
            self._visitors()

    def mute(self, line: Line) -> str:
        """What is said of a node that gives no sign of life."""
        return f"gave no sign of life for {line.silent:.0f} s: it is down, or the network to it is cut"

    def blame(self) -> bool:
        """Where ranks hang: count those nodes as lost that give no sign of life; whether there are any."""
        for node, line in self.lines.items():
            if node not in self.lost and not self._done(node) and line.silent > MISSED:
                self.lost[node] = self.mute(line)
        return bool(self.lost)

    def _done(self, node: int) -> bool:
        return node in self.ends or self.verdict is not None

    def _hear(self, node: int, message: Mapping[str, Any]) -> None:
        for rank, beat in message.get("beats", {}).items():
            self.beats[int(rank)] = Beat(*beat)
        if "stop" in message:
            self.stop = message["stop"]
            self.tell("stop", stop=self.stop)
        if "again" in message:
            self.again = message["again"]
            self.tell("again", again=self.again)
        if "failed" in message:
            self.failed = True
            self.tell("failed", failed=True)
        if "stacks" in message:
            if self.hub:
                self.stacks[node] = message["stacks"]
            else:
                self.stacks_wanted = True
        self.hangs |= "hangs" in message
        if "end" in message:
            self.ends[node] = message["end"]
            for each in message["end"]["endings"]:
                when = time.time() - each.pop("ago")  # by the other's clock it may be any time
                self.endings.append(Ending(**each, when=when))
        if "verdict" in message:
            self.verdict = message["verdict"][0], message["verdict"][1]

    def _visitors(self) -> None:
        """On node 0: a parent that comes late or goes, and strangers."""
        assert self.server is not None, "nobody can come"
        self.visitors += accepted(self.server)
        for line in list(self.visitors):
            for message in line.take():
                self.signals += said_by_parent(line, message, self.at.word)
                if "node" in message:
                    line.send(refused=["to join as a node", "all nodes have come", "wait for that run's end"])
                    line.closed = True
            if line.closed:
                self.visitors.remove(line)
                line.close()
                self.signals += [signal.SIGTERM] if line.parent else []

    def describe(self) -> str | None:
        """What the user is told of lost nodes; None if there are none."""
        lines = []
        for node, why in sorted(self.lost.items()):
            ranks = self.ranks(node)
            named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
            verb = "is" if len(ranks) == 1 else "are"
            last = self.beats.get(ranks[0])
            seen = f", last seen {last}" if last is not None and last.count else ""
            place = f"node {node} ({self.hosts[node]})"
            lines.append(f"{named} of {self.world} {verb} lost{seen}: {place} {why}")
        lines += ["the last checkpoint is whole, the same command on all nodes goes on"] if lines else []
        return "\n".join(lines) or None

    def pronounce(self, code: int, text: str | None) -> None:
        """On node 0: tell all others how it ended, and see that they have heard it."""
        for node, line in self.lines.items():
            if node not in self.lost:
                line.send(verdict=[code, text])
        end = time.monotonic() + FAREWELL
        while time.monotonic() < end and not all(
            line.closed or node in self.lost for node, line in self.lines.items()
        ):
            for line in self.lines.values():
                line.take()
            time.sleep(0.02)

    def close(self) -> None:
        """Hang up on everybody."""
        for line in [*self.lines.values(), *self.visitors]:
            line.close()
        if self.server is not None:
            self.server.close()


def accepted(server: socket.socket) -> list[Line]:
    """Connections to all who have come since."""
    lines = []
    with contextlib.suppress(OSError):
        while True:
            lines.append(Line(server.accept()[0]))
    return lines


def said_by_parent(line: Line, message: Mapping[str, Any], word: str) -> list[int]:
    """The signal that a message passes on, if who sends it has said the word by which a parent is known."""
    line.parent |= bool(word) and message.get("parent") == word
    number = message.get("signal")
    return [number] if line.parent and number in SIGNALS else []
