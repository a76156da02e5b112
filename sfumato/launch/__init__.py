"""Start ranks on this machine, or this machine's part of them, and see them end together.

    code = run([sys.executable, "-m", "sfumato", "train", "my.toml"], 8, Path("runs/my/logs"))

The supervisor is our own, not torch.distributed.elastic: that one takes seconds to import, reports one
crash in three places, and waits half a minute for ranks that hang in a collective. Here the parent imports
no torch, every rank is the leader of its own session (so that its loader workers end with it, and Ctrl-C
reaches it once, through us), and of all that the ranks say when one breaks only the cause is shown.

Rank 0's output goes to our own streams and to its log, the other ranks' to their logs only. A rank
tells its error through a file (`report`), because only the supervisor knows which error came first, and its
steps through memory that both see (`pulse_here`), so that one that dies or hangs is told with its last step.

With several machines each has a supervisor, started by the user, srun or `hosts`. They meet before any rank
is started (`meet`), talk while the ranks run (`nodes`), and end with one verdict.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sfumato import tuning
from sfumato.errors import CONTINUE, UserError
from sfumato.launch import interface
from sfumato.launch.asked import PATIENCE, REPEATED, signals
from sfumato.launch.inside import (
    ERROR_FILE,
    LIFELINE,
    follow_supervisor,
    is_echo,
    pulse_here,
    report,
    say,
    supervised,
)
from sfumato.launch.meet import meet
from sfumato.launch.nodes import At, Nodes
from sfumato.launch.process import Rank, guarded, held_port, kill, pipe, start
from sfumato.launch.supervise import Supervisor

__all__ = ["ERROR_FILE", "PATIENCE", "REPEATED", "At"]
__all__ += ["follow_supervisor", "is_echo", "pulse_here", "report", "run", "say", "supervised"]


def run(
    command: Sequence[str],
    ranks: int,
    logs: Path,
    environment: Mapping[str, str] | None = None,
    at: At | None = None,
    facts: Mapping[str, str] | None = None,
) -> int:
    """Run `command` as `ranks` ranks of this machine until all have ended; the shell's exit code.

    logs: folder for rank-N.log; a log that is there is continued. environment: variables that the ranks get,
    over ours. at: which of several machines this is; then its ranks are counted on from those of the machines
    before it, and facts are what must be the same on all of them, by name.
    One rank's failure ends the others; its error is shown and its exit code kept (128 + n for signal n). A
    rank that hangs ends all; then it is 1. SIGINT, SIGTERM and SIGHUP reach the ranks as SIGTERM, SIGUSR1 as
    it is; if they stop for it in good order it is their 75, else 128 + n. A second one ends them at once.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {logs}", f"it cannot be made: {error.strerror}", "set another `output`"
        ) from None
    with (
        tempfile.TemporaryDirectory(prefix="sfumato-") as scratch,
        signals() as asked,
        held_port() as port,
        pipe() as lifeline,
        guarded() as register,
        contextlib.ExitStack() as held,
    ):
        others: Nodes | None = None
        if at is not None:
            others = meet(at, ranks, facts or {}, port, lambda: asked.any)
            if others is None:
                print("stopped before all nodes had come; the same command goes on", file=sys.stderr)
                return CONTINUE
            held.callback(others.close)
        env = tuning.given(os.environ, ranks, environment or {})
        env |= meeting_point(port, others, env) | {"PYTHONUNBUFFERED": "1", LIFELINE: str(lifeline)}
        numbers = others.ranks(others.at.number) if others is not None else range(ranks)
        env |= {"WORLD_SIZE": str(others.world if others else ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        started: list[Rank] = []
        try:
            for local, number in enumerate(numbers):
                log = logs / f"rank-{number}.log"
                started.append(start(command, number, local, env, log, Path(scratch)))
                register(started[-1])
            code, text = Supervisor(started, asked, others).watch()
        finally:
            for rank in started:
                kill(rank)
                rank.process.wait()
                for thread in rank.copies:
                    thread.join(1)
    if text:
        print(text, file=sys.stderr, flush=True)
    return code


def meeting_point(port: int, others: Nodes | None, env: Mapping[str, str]) -> dict[str, str]:
    """Where the ranks find each other, and by which interface."""
    if others is None:
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = {"MASTER_ADDR": others.at.host, "MASTER_PORT": str(others.port)}
    return found | interface.variables(env, others.own())
