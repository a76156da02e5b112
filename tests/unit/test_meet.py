"""Supervisors of several machines meet and talk: over real connections, within this process."""

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from sfumato.errors import UserError
from sfumato.launch import line as lines
from sfumato.launch.asked import Asked
from sfumato.launch.line import Line
from sfumato.launch.meet import meet
from sfumato.launch.nodes import At, Nodes
from sfumato.launch.pulse import Beat, hang
from sfumato.launch.supervise import Supervisor
from tests.engine.ranks import free_port

GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff\xfe\n",
    b"[" * 100_000 + b"\n",  # json raises RecursionError
    b"x" * 200_000,
    b"[]\n",
    b"1\n",
    *(
        json.dumps(each).encode() + b"\n"
        for each in (
            {"node": 1},
            {"node": 1, "nodes": 2, "ranks": "8", "host": "a", "facts": {}},
            {"node": 1, "nodes": 2, "ranks": 1, "host": "a", "facts": []},
            {"signal": 15},
            {"parent": True, "signal": 15},
            {"parent": "wrong", "signal": 15},
            {"parent": "", "signal": []},
        )
    ),
]
"""What strangers may say at the port of node 0."""


def come(number: int, port: int, nodes: int = 2, limit: float = 20, facts: Any = None, word: str = "") -> Any:
    """A node's supervisor until all have met; what it has then, or the error."""
    try:
        at = At(number, nodes, "127.0.0.1", port, limit, word)
        return meet(at, 1, facts or {}, 7, lambda: False)
    except UserError as error:
        return error


@pytest.fixture
def start() -> Iterator[Callable[..., Future[Any]]]:
    """Run something beside this."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit


def visit(port: int, content: bytes) -> socket.socket:
    """Connect to node 0, which may only now begin to listen, and say something."""
    end = time.monotonic() + 20
    while True:
        try:
            visitor = socket.create_connection(("127.0.0.1", port), timeout=20)
            visitor.sendall(content)
            return visitor
        except ConnectionRefusedError:
            assert time.monotonic() < end, "node 0 does not listen"
            time.sleep(0.02)


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of one connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        return server.accept()[0], theirs


def until(nodes: Nodes, what: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end, "it does not come so far"
        nodes.poll({})
        time.sleep(0.01)


def test_strangers_are_not_heard(start: Callable[..., Future[Any]]) -> None:
    """Neither while nodes are awaited nor later; a parent is, by its word, and its death is a signal."""
    port = free_port()
    hub = start(come, 0, port, word="w")
    visitors = [visit(port, content) for content in GARBAGE] + [visit(port, b"")]
    time.sleep(0.2)
    assert not hub.done(), hub.result()
    node = start(come, 1, port).result(20)
    nodes = hub.result(20)
    assert isinstance(nodes, Nodes) and isinstance(node, Nodes), (nodes, node)
    assert nodes.world == node.world == 2 and node.port == 7

    visitors += [visit(port, content) for content in GARBAGE]
    parent = visit(port, b'{"parent": "w"}\n{"signal": 10}\n{"signal": 9}\n')
    until(nodes, lambda: bool(nodes.signals))
    assert nodes.signals == [signal.SIGUSR1]
    parent.close()
    until(nodes, lambda: len(nodes.signals) > 1)
    assert nodes.signals[1:] == [signal.SIGTERM] and not nodes.lost
    for each in (*visitors, nodes, node):
        each.close()


def test_a_parents_first_words_may_end_the_waiting(start: Callable[..., Future[Any]]) -> None:
    """The signal comes with the greeting where it was sent before node 0 listened."""
    port = free_port()
    hub = start(come, 0, port, word="w")
    with visit(port, b'{"parent": "w"}\n{"signal": 15}\n'):
        assert hub.result(20) is None


def test_what_does_not_fit_is_refused_on_all(start: Callable[..., Future[Any]]) -> None:
    port = free_port()
    one, other = start(come, 0, port, facts={"torch": "1"}), start(come, 1, port, facts={"torch": "2"})
    assert str(one.result(20)) == str(other.result(20)) and "torch: 1 on " in str(one.result())

    port = free_port()
    every = [start(come, number, port, 3) for number in (0, 1, 1)]
    assert all("as node 1\nfound: " in str(each.result(20)) for each in every)

    port = free_port()
    one, other = start(come, 0, port, 2), start(come, 1, port, 3)
    assert "it says it is node 1 of 3" in str(one.result(20)) and str(one.result()) == str(other.result(20))


def test_who_is_missing_is_named(start: Callable[..., Future[Any]]) -> None:
    port = free_port()
    one, other = (start(come, number, port, 3, 1) for number in (0, 2))
    expected = "asked: 3 nodes\nfound: node 1 of 3 did not come within 1 s; 2 ranks did\n"
    assert str(one.result(20)).startswith(expected)
    assert str(other.result(20)) == str(one.result()), "the other one that came is told the same"

    port = free_port()
    error = str(come(1, port, limit=0.6))
    assert f"asked: node 0 at 127.0.0.1:{port}\nfound: after 0.6 s Connection refused" in error
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        error = str(come(0, port))
    assert f"asked: port {port} of this machine, node 0" in error and "Address already in use" in error


def test_one_who_talks_without_an_end_does_not_hold_us_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "AT_ONCE", 1 << 16)
    ours, theirs = connected()
    line = Line(ours)

    def flood() -> None:
        try:
            while True:
                theirs.sendall(b"x" * 4096)
        except OSError:
            return

    thread = threading.Thread(target=flood)
    thread.start()
    end = time.monotonic() + 20
    while not line.closed:
        assert line.take() == [] and time.monotonic() < end
        assert len(line.unread) <= lines.GREETING + (1 << 18) + lines.AT_ONCE
    line.close()
    thread.join(20)
    theirs.close()
    assert not thread.is_alive()


@pytest.fixture
def hub() -> Iterator[tuple[Nodes, list[Line]]]:
    """Node 0 of three with a rank each, and the ends of the two others."""
    pairs = [(Line(ours), Line(theirs)) for ours, theirs in (connected(), connected())]
    nodes = Nodes(At(0, 3, "a", 1), ["a", "b", "c"], [1, 1, 1], 7, {1: pairs[0][0], 2: pairs[1][0]})
    yield nodes, [theirs for _, theirs in pairs]
    for pair in pairs:
        for each in pair:
            each.close()


def ended(ago: float, **more: Any) -> dict[str, Any]:
    """What a node says whose rank has ended."""
    how = {"number": 1, "code": 1, "log": "l", "ago": ago} | more
    return {"endings": [how], "stop": None, "hung": None}


def test_an_end_is_dated_by_when_it_was_told(hub: tuple[Nodes, list[Line]]) -> None:
    """However long node 0 itself goes on: else the first failure would look like the last."""
    nodes, others = hub
    before = time.time()
    others[0].send(end=ended(2.0))
    until(nodes, lambda: bool(nodes.ends))
    told = time.time()
    time.sleep(0.5)
    assert before - 2.1 < nodes.endings[0].when < told - 1.9


def test_ranks_that_have_ended_are_not_blamed_for_a_hang(hub: tuple[Nodes, list[Line]]) -> None:
    nodes, others = hub
    others[0].send(beats={1: [2.0, 9, 3, "training"]})
    others[0].send(end=ended(0.0, code=0))
    others[1].send(beats={2: [2.0, 8, 3, "training"]})
    until(nodes, lambda: 1 in nodes.ends and len(nodes.beats) == 2)
    assert list(nodes.unheard()) == [2], "node 1 has ended; node 2 has not answered"
    text = hang({0: Beat(2.0, 9, 3, "saving"), **nodes.unheard()}, {0: ""}, 2.0, world=3)
    assert text.startswith("rank 2 of 3 hangs at step 3, training: it does not answer")


def test_a_thousand_ranks_that_do_not_answer_are_a_few_lines() -> None:
    text = hang({rank: Beat(2.0, 9, 3, "training") for rank in range(1000)}, {}, 2.0)
    assert len(text.splitlines()) < 12 and "992 more ranks hang" in text


@pytest.mark.parametrize("lost", [True, False])
def test_the_others_hear_of_it(
    lost: bool, hub: tuple[Nodes, list[Line]], start: Callable[..., Future[Any]]
) -> None:
    """That a machine is lost, or that node 0 was asked to stop when its own ranks had ended."""
    nodes, others = hub
    asked = Asked()
    watching = start(Supervisor([], asked, nodes).watch)
    if lost:
        others[1].close()
    else:
        others[1].send(end=ended(0.0, number=2, code=75))
        asked.note(signal.SIGTERM)
    heard: list[dict[str, Any]] = []
    end = time.monotonic() + 20
    while not any("stop" in each for each in heard):
        assert time.monotonic() < end, "node 1 does not hear of it"
        heard += others[0].take()
        time.sleep(0.01)
    others[0].send(end=ended(0.0, code=75))
    while not (told := [each["verdict"] for each in heard if "verdict" in each]):
        assert time.monotonic() < end, "there is no verdict"
        heard += others[0].take()
        time.sleep(0.01)
    others[0].close()
    others[1].close()
    code, text = watching.result(20)
    assert code == told[0][0] == 75 and ("rank 2 of 3 is lost" in (text or "")) == lost
