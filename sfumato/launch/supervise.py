"""Watching ranks until the last of them has ended, and those of other machines through their supervisors."""

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, replace
from typing import Any

from sfumato.errors import CONTINUE
from sfumato.launch.asked import PATIENCE, Asked
from sfumato.launch.nodes import MISSED, Nodes
from sfumato.launch.process import ANSWER, Rank, kill, stacks
from sfumato.launch.pulse import Beat, behind, guilty_lines, hang
from sfumato.launch.verdict import Ending, placed, verdict

POLL = 0.05  # seconds between two looks at the ranks
SETTLE = 1.0  # seconds from a rank's failure to the others' end, in which one may still tell the true cause
ECHO = 5.0  # the same from an echo, which has a cause somewhere
LEAVING = 20.0  # seconds from a rank's word that it failed to its end; a library's farewell may hang
TAIL = 20  # lines of a log that are shown for a rank that died without telling why


class Supervisor:
    """What is known of the ranks of this machine, and what is done about it.

    A failure, a hang, or a second signal ends those that are left; one that stops has the others stop too.
    """

    def __init__(self, ranks: Sequence[Rank], asked: Asked, others: Nodes | None = None) -> None:
        """others: the supervisors of the other machines, where there are any."""
        self.left, self.asked, self.others = list(ranks), asked, others
        self.known = list(ranks)
        self.world = others.world if others is not None else len(ranks)
        self.endings: list[Ending] = []
        self.hung: str | None = None
        self.kill_at = math.inf
        self.warned = 0
        self.stopping = False
        self.failing: dict[int, float] = {}  # rank -> since when its error is known

    def watch(self) -> tuple[int, str | None]:
        """Wait until all ranks have ended; the exit code, and what to tell the user."""
        while self.left:
            self._reap()
            if self.others is not None:
                self._hear(self.others)
            self._pass_on()
            wanted = self.others is not None and (self.others.hangs or self.others.stacks_wanted)
            if self.hung is None and self.kill_at > time.monotonic() + SETTLE:
                # Every rank is looked at, since a look also counts.
                if any([rank.hangs for rank in self.left]) or wanted:
                    self._hang()
            if time.monotonic() >= self.kill_at or self.asked.again:
                if self._gave_up():
                    self._late()
                for rank in self.left:
                    kill(rank)
            time.sleep(POLL)
        return self._end() if self.others is None else self._end_together(self.others)

    def beats(self) -> dict[int, Beat]:
        """What each rank of this machine last did."""
        return {rank.number: rank.pulse.read() for rank in self.known}

    def _reap(self) -> None:
        now = time.monotonic()
        for rank in [rank for rank in self.left if rank.process.poll() is not None]:
            self.left.remove(rank)
            kill(rank)  # its loader workers, which would wait for ever
            ended = ending(rank)
            if rank.killed and not rank.error.exists():
                continue
            self.endings.append(ended)
            if ended.code not in (0, CONTINUE):
                self.kill_at = min(self.kill_at, now + (ECHO if ended.echo else SETTLE))
                if self.others is not None:
                    self.others.tell("failed", failed=True)
        for rank in self.left:
            if rank.error.exists() and now > self.failing.setdefault(rank.number, now) + LEAVING:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.process.pid, signal.SIGKILL)

    def _pass_on(self) -> None:
        """Have the ranks hear what was asked."""
        if self.warned < self.asked.warnings:
            self.warned = self.asked.warnings
            for rank in self.left:
                rank.process.send_signal(signal.SIGUSR1)
        if not self.stopping and (self.asked.first or any(each.code == CONTINUE for each in self.endings)):
            self._stop()
            if self.others is not None:
                self.others.tell("stop", stop=self.asked.first or 0)
        if self.asked.again and self.others is not None:
            self.others.tell("again", again=self.asked.again)

    def _stop(self) -> None:
        self.stopping = True
        self.kill_at = min(self.kill_at, time.monotonic() + PATIENCE)
        for rank in self.left:
            rank.process.terminate()

    def _hear(self, others: Nodes) -> None:
        """What the other machines' supervisors say."""
        now = time.monotonic()
        others.poll(self.beats())
        for number in others.signals:
            self.asked.note(number)
        others.signals.clear()
        if others.again and not self.asked.again:
            self.asked.again = others.again
        if others.stop is not None and not self.stopping:
            self._stop()
        if others.failed:
            self.kill_at = min(self.kill_at, now + SETTLE)
        if others.lost and not self.stopping:
            # Ranks whose supervisor was killed save if they can; that takes all of them.
            self._stop()
            others.tell("stop", stop=0)
        if any("no sign" in why for why in others.lost.values()):
            self.kill_at = min(self.kill_at, now + SETTLE)
            others.tell("failed", failed=True)
        if others.verdict is not None:
            self.kill_at = now

    def _hang(self) -> None:
        """The beats of a rank stay away: find out whose fault that is, and end all."""
        others = self.others
        if others is not None and not others.blame():
            self.hung = self._hang_of_all(others)
        elif others is None:
            self.hung = self._hang_here()
        else:
            self.hung = waiting(self.beats())
        self.kill_at = time.monotonic()

    def _hang_here(self) -> str:
        found, notes = stacks(self.left)
        beats = {rank.number: rank.pulse.read() for rank in self.left}
        text = hang(beats, found, limit_of(beats), notes, world=self.world)
        return f"{text}\nthe stacks of all {self.world} ranks are in their logs, {self.left[0].log.parent}"

    def _hang_of_all(self, others: Nodes) -> str | None:
        """Ask all machines for their ranks' stacks; None where node 0 tells the rest of us.

        A machine that does not answer is lost.
        """
        others.tell("stacks", **({"stacks": True} if others.hub else {"hangs": True}))
        found, notes = stacks(self.left)
        beats = {rank.number: rank.pulse.read() for rank in self.left}
        if not others.hub:
            mine = {
                "found": found,
                "notes": notes,
                "beats": {rank: astuple(each) for rank, each in beats.items()},
            }
            others.tell("mine", stacks=mine)
        end = time.monotonic() + ANSWER + MISSED
        while time.monotonic() < end and others.verdict is None and not others.lost:
            others.poll(self.beats())
            if others.hub and set(others.lines) <= {*others.stacks, *others.ends}:
                break
            time.sleep(POLL)
        if not others.hub:
            return None if others.verdict or others.lost else self._hang_here()
        for said in others.stacks.values():
            found |= {int(rank): text for rank, text in said["found"].items()}
            notes |= {int(rank): text for rank, text in said["notes"].items()}
            beats |= {int(rank): Beat(*beat) for rank, beat in said["beats"].items()}
        if others.lost:
            return waiting(self.beats())
        beats = {**others.unheard(), **beats}
        text = hang(beats, found, limit_of(beats), notes, world=self.world)
        return f"{text}\nthe stacks of all {self.world} ranks are in their logs, {self.known[0].log.parent}"

    def _gave_up(self) -> bool:
        """Whether ranks ended only because others did not come, and these still run and tell nothing."""
        failed = [each for each in self.endings if each.code not in (0, CONTINUE)]
        quiet = self.left and not any(rank.error.exists() for rank in self.left)
        alone = self.others is None and not self.stopping and not self.asked.again and self.hung is None
        return bool(alone and quiet and failed and all(each.echo for each in failed))

    def _late(self) -> None:
        """Name the rank that the others waited for, which is in no beat before the loop."""
        found, notes = stacks(self.left)
        beats = {rank.number: rank.pulse.read() for rank in self.left}
        self._reap()
        if self._gave_up():
            first = next(each for each in self.endings if each.echo)
            said = (first.text or "").strip().rpartition("\n")[2]
            lines = guilty_lines(behind(beats, found), beats, found, notes, self.world)
            self.hung = "\n".join([*lines, f"rank {first.number} gave up waiting: {said}"])

    def _end(self) -> tuple[int, str | None]:
        stop, again = self._asked_by(), self.asked.again
        return verdict(self.endings, self.world, stop, again, self.hung, None, PATIENCE)[:2]

    def _asked_by(self) -> int | None:
        """The signal that asked this machine's ranks to stop."""
        return self.asked.first or (signal.SIGUSR1 if self.asked.warnings else None)

    def _end_together(self, others: Nodes) -> tuple[int, str | None]:
        """Wait for the other machines' ends; the same exit code on all of them."""
        if not others.hub:
            host = others.hosts[others.at.number]
            mine = [replaced(each, host) for each in self.endings]
            others.tell("end", end={"endings": mine, "stop": self._asked_by(), "hung": self.hung})
        while True:
            self._hear(others)
            self._pass_on()
            if self.asked.again:
                break
            if others.verdict is not None:
                return others.verdict
            if others.lost and not others.hub or set(others.lines) <= {*others.ends, *others.lost}:
                break
            time.sleep(POLL)
        stop = self._asked_by() or others.stop or None
        for end in others.ends.values():
            stop, self.hung = stop or end["stop"], self.hung or end["hung"]
        self.endings += others.endings
        again = self.asked.again
        code, text, cause = verdict(
            self.endings, self.world, stop, again, self.hung, others.describe(), PATIENCE
        )
        if others.hub:
            others.pronounce(code, short(code, text, cause, self.world))
        return code, text


def short(code: int, text: str | None, cause: Ending | None, world: int) -> str | None:
    """What the other machines' commands tell; node 0 tells the whole."""
    if cause is None:
        return text
    if code == 2:
        return f"rank {cause.number} of {world} met a mistake of the user's, which node 0 tells"
    return f"{placed(cause, world)}; node 0 tells the rest"


def replaced(each: Ending, host: str) -> dict[str, Any]:
    """An ending as JSON. Two machines' clocks may differ, so it says how long ago it was."""
    values = asdict(replace(each, host=host))
    return values | {"ago": time.time() - values.pop("when")}


def limit_of(beats: Mapping[int, Beat]) -> float:
    """How long ranks said that they may be still."""
    return max(beat.limit for beat in beats.values())


def waiting(beats: Mapping[int, Beat]) -> str:
    """What the ranks of this machine do while another one is lost."""
    said = "; ".join(f"rank {rank} {beat}" for rank, beat in sorted(beats.items())[:8])
    return f"here: {said}"


def ending(rank: Rank) -> Ending:
    """What an ended rank told, which also goes to its log."""
    code, beat = rank.process.returncode, rank.pulse.read()
    last, log = str(beat) if beat.count else "", str(rank.log)
    try:
        said = json.loads(rank.error.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Rank 0's words were seen as they came, and SIGKILL leaves no time for any.
        silent = rank.number == 0 or code in (0, CONTINUE, -signal.SIGKILL)
        tail = [] if silent else rank.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        return Ending(rank.number, code, time.time(), log, beat=last, tail=tail)
    with rank.log.open("a", encoding="utf-8") as file:
        file.write(said["text"] + "\n")
    # One that told why it ends, and had to be helped, has the code of its error.
    code = said["code"] if code < 0 else code
    return Ending(rank.number, code, said["when"], log, said["text"], said["echo"], last)
