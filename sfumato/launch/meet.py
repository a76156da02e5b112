"""Where the supervisors of several machines find each other, before any rank is started."""

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from sfumato.errors import UserError
from sfumato.launch.interface import resolved
from sfumato.launch.line import LONGEST, Line
from sfumato.launch.nodes import At, Nodes, accepted, said_by_parent

LOOK = 0.05  # seconds between two looks
SAY = 10.0  # seconds after which it is said for whom one waits
ANSWER = 30.0  # seconds that a node waits longer than node 0, which tells it who is missing
BACKLOG = 1024  # nodes that come at one instant
HELLO = {"node": int, "nodes": int, "ranks": int, "host": str, "facts": dict}
"""What a node says first. Who says anything else is a stranger, and goes unheard."""

Interrupted = Callable[[], bool]
Came = dict[int, tuple[Line, Mapping[str, Any]]]
"""By node: the connection to it, and what it said first."""


def meet(at: At, ranks: int, facts: Mapping[str, str], port: int, interrupted: Interrupted) -> Nodes | None:
    """Wait until all nodes have come; None if a signal ended that, here or on another one.

    facts: what must be the same everywhere, by name. port: where the ranks shall meet, of node 0.
    Raises UserError, on all that have come, if one is missing after `at.limit` seconds or does not fit.
    """
    hello = {"node": at.number, "nodes": at.count, "ranks": ranks, "host": socket.gethostname()}
    hello["facts"] = dict(facts)
    if not resolved(at.host, at.port):
        raise UserError(
            f"--master {at.host}", "no address is known by that name here", "name node 0 by its address"
        )
    return gather(at, hello, port, interrupted) if at.number == 0 else join(at, hello, interrupted)


def listen(at: At) -> socket.socket:
    """The socket at which node 0 waits for the others."""
    try:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(
                ("", at.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
            )
        else:
            server = socket.create_server(("", at.port), backlog=BACKLOG)
    except OSError as error:
        raise UserError(
            f"port {at.port} of this machine, node 0, for the other nodes",
            error.strerror or str(error),
            f"end what listens there, or name another port on all nodes: --master {at.host}:{at.port + 1}",
        ) from None
    server.setblocking(False)
    return server


def gather(at: At, hello: Mapping[str, Any], port: int, interrupted: Interrupted) -> Nodes | None:
    """On node 0: wait for the others."""
    came: Came = {}
    visitors: list[Line] = []
    begun, said = time.monotonic(), False
    with contextlib.ExitStack() as held:
        server = held.enter_context(listen(at))
        while len(came) < at.count - 1:
            visitors += accepted(server)
            if interrupted() or greet(visitors, at, hello, came):
                for line, _ in came.values():
                    line.send(stop=True)
                return None
            came = {number: each for number, each in came.items() if not gone(each[0])}
            missing = [number for number in range(1, at.count) if number not in came]
            waited = time.monotonic() - begun
            if waited > SAY and not said:
                said = True
                print(f"node 0 waits at port {at.port} for {named(missing)}", file=sys.stderr, flush=True)
            if waited > at.limit:
                there = int(hello["ranks"]) + sum(each["ranks"] for _, each in came.values())
                found = (
                    f"{named(missing)} of {at.count} did not come within {at.limit:g} s; {there} ranks did"
                )
                do = f"start it there with its own --node-rank; it must reach {at.host}:{at.port}"
                refuse(came, (f"{at.count} nodes", found, do))
            time.sleep(LOOK)
        every = [hello, *(came[number][1] for number in range(1, at.count))]
        hosts, shares = [each["host"] for each in every], [each["ranks"] for each in every]
        for line, _ in came.values():
            line.send(hosts=hosts, shares=shares, port=port)
        held.pop_all()
    lines = {number: line for number, (line, _) in came.items()}
    return Nodes(at, hosts, shares, port, lines, server, visitors)


def named(numbers: list[int]) -> str:
    """The nodes of these numbers, in words."""
    words = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"node{'s' if len(numbers) > 1 else ''} {words}"


def gone(line: Line) -> bool:
    """Whether a node that had come has left; it may come again."""
    line.take()
    return line.closed


def refuse(came: Came, parts: tuple[str, str, str]) -> None:
    """Tell the nodes that have come why it does not begin, and raise the same here."""
    for line, _ in came.values():
        line.send(refused=parts)
    raise UserError(*parts)


def greet(visitors: list[Line], at: At, hello: Mapping[str, Any], came: Came) -> bool:
    """Hear who visitors are; nodes become some of `came`. Whether a parent wants an end, or has gone."""
    ends = False
    for line in list(visitors):
        for message in line.take():
            ends |= bool(said_by_parent(line, message, at.word))
            if all(isinstance(message.get(name), kind) for name, kind in HELLO.items()):
                visitors.remove(line)
                receive(line, message, at, hello, came)
                break
        else:
            if line.closed:
                visitors.remove(line)
                line.close()
                ends |= line.parent
    return ends


def receive(line: Line, message: Mapping[str, Any], at: At, hello: Mapping[str, Any], came: Came) -> None:
    """A node has come. Raises UserError, on all that have, if it does not fit."""
    number, host = message["node"], message["host"]
    parts = None
    if message["nodes"] != at.count or not 0 < number < at.count or message["ranks"] < 1:
        found = f"it says it is node {number} of {message['nodes']}"
        parts = (f"{host} as one of {at.count} nodes", found, "say the same --nodes everywhere")
    elif number in came:
        found = f"{came[number][1]['host']} has come as that"
        parts = (f"{host} as node {number}", found, "give each machine a --node-rank of its own")
    if parts:
        line.send(refused=parts)
        refuse(came, parts)
    line.longest = LONGEST
    came[number] = (line, message)
    for name, mine in hello["facts"].items():
        theirs = message["facts"].get(name)
        if theirs != mine:
            found = f"{name}: {mine} on {hello['host']} (node 0), {theirs} on {host} (node {number})"
            do = "start the same command with the same files and packages on all nodes"
            refuse(came, ("one run on several nodes", found, do))


def join(at: At, hello: Mapping[str, Any], interrupted: Interrupted) -> Nodes | None:
    """On another node: find node 0, and hear from it when all have come."""
    begun, said, why = time.monotonic(), False, "nobody listens there"
    line: Line | None = None
    while True:
        if interrupted():
            if line is not None:
                line.close()
            return None
        waited = time.monotonic() - begun
        if waited > SAY and not said:
            said = True
            what = "the other nodes" if line else f"node 0 at {at.host}:{at.port}: {why}"
            print(f"node {at.number} waits for {what}", file=sys.stderr, flush=True)
        if waited > at.limit + (ANSWER if line else 0):
            do = "start node 0 there; if it runs, see that it has that address, and no firewall is between"
            raise UserError(f"node 0 at {at.host}:{at.port}", f"after {at.limit:g} s {why}", do)
        if line is None:
            try:
                line = Line(socket.create_connection((at.host, at.port), timeout=5))
                line.longest = LONGEST
                line.send(**hello)
                why = "it does not say that all have come"
            except OSError as error:
                why = error.strerror or str(error)
                time.sleep(0.5)
            continue
        for message in line.take():
            if "refused" in message:
                raise UserError(*message["refused"])
            if "stop" in message:
                line.close()
                return None
            if "hosts" in message:
                return Nodes(at, message["hosts"], message["shares"], message["port"], {0: line})
        if line.closed:  # node 0 has ended, or is about to be started anew
            line.close()
            line, why = None, "it hung up"
            time.sleep(0.5)
        time.sleep(LOOK)
