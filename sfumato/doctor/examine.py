"""The order of the checks, and what becomes of their lines."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil

import sfumato
from sfumato.config import Config
from sfumato.device import accelerator, kind
from sfumato.doctor import (
    VERDICT,
    company,
    disks,
    hardware,
    kernels,
    machine,
    nvme,
    parity,
    speed,
    sums,
    twin,
    versions,
)
from sfumato.doctor.lines import ORDER, Line, Verdict, bad, show, summary, unseen, warning
from sfumato.doctor.rounds import Answer, Rounds, trouble
from sfumato.engine import ranks
from sfumato.engine.engine import Engine
from sfumato.engine.ranks import Ranks
from sfumato.errors import Lost, UserError
from sfumato.launch import supervised
from sfumato.models.loading import DTYPES

SECONDS = 115.0
"""For all checks, from the start of this process; with --real, more."""
REAL = 900.0
BEYOND = 60.0  # seconds of the process group's own timeout beyond all that: its error names nobody
FORMAT = 1


class Report:
    """The lines so far; on the first rank each is shown as it comes."""

    def __init__(self, first: bool) -> None:
        self.first, self.lines = first, list[Line]()
        self.out = sys.stdout  # libraries may write to another in between

    def add(self, lines: Iterable[Line]) -> None:
        """Take some, and show them on the first rank."""
        for line in lines:
            self.lines.append(line)
            if self.first:
                show(line, self.out)
                self.out.flush()

    @property
    def is_bad(self) -> bool:
        """Whether something is bad."""
        return any(line.verdict is Verdict.BAD for line in self.lines)

    def write(self, file: Path, place: Ranks, seconds: float) -> None:
        """The lines as JSON, with what was measured."""
        said = {
            "format": FORMAT,
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "sfumato": sfumato.__version__,
            "ranks": place.world,
            "device": str(place.device),
            "seconds": round(seconds, 1),
            "good": not self.is_bad,
            "lines": [line.plain() for line in self.lines],
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def examine(
    config: Config | None,
    real: bool = False,
    file: Path | None = None,
    make: Callable[..., Engine] = Engine,
) -> int:
    """Look at everything and tell it, on all ranks together; 1 if something is bad, else 0.

    real: try the gradient on the config's own model. file: for the lines as JSON. make: makes the engine;
    tests give broken ones.
    """
    began = psutil.Process().create_time()
    limit = REAL if real else SECONDS
    report = Report(os.environ.get("RANK", "0") == "0")
    with ExitStack() as held:
        # Before the ranks meet: in a group transformers writes on the first one alone.
        toy, note = toy_of(config, real, Path(held.enter_context(tempfile.TemporaryDirectory())), report)
        place = meet(report)
        until = time.monotonic() + limit - (time.time() - began)
        rounds = Rounds(place, store(), until, partial(enter, place))
        try:
            look(rounds, report, config, toy, real, make, note)
        except Lost as lost:
            print(lost, file=sys.stderr)
            rounds.stuck = True
        rounds.leave()
        if place.first:
            seconds = time.time() - began
            print(f"\n{summary(report.lines, seconds)}", file=report.out, flush=True)
            if file is not None:
                report.write(file, place, seconds)
        code = ended(report, place)
    if rounds.stuck or rounds.gone:
        # A thread that waits for another rank would keep this process for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def ended(report: Report, place: Ranks) -> int:
    """The exit code; where a launcher of ours wants to hear it otherwise, a rank that was heard ends well."""
    if not place.first:
        return 0
    told = os.environ.get(VERDICT)
    if told and supervised():
        Path(told).write_text("bad" if report.is_bad else "good", encoding="utf-8")
        return 0
    return int(report.is_bad)


def toy_of(config: Config | None, real: bool, folder: Path, report: Report) -> tuple[Path | None, str]:
    """The folder of the toy model, and the family's name; none where it cannot be known."""
    try:
        family, doubt = twin.family_of(config) if config is not None else ("sd", "")
        toy = None if real else twin.write(family, folder / "toy")
    except UserError as error:
        report.add([bad("model", f"{error.asked}: {error.found}", error.do)])
        return None, ""
    return toy, f"{family}: {doubt}" if doubt else family


def meet(report: Report) -> Ranks:
    """This process's place among the ranks. Raises Lost where the others do not come."""
    try:
        return ranks.start(SECONDS + REAL + BEYOND)
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        text = str(error).strip().splitlines()[0]
        report.add([bad("ranks", f"they do not meet: {text}", "see that all are started, and MASTER_ADDR")])
        raise Lost("the ranks do not meet") from error


def store() -> Any:
    """A connection of our own to where the ranks found each other: one serves one thread at a time."""
    from torch.distributed.distributed_c10d import _get_default_store

    found = _get_default_store()
    return found.clone() if hasattr(found, "clone") else found


def enter(place: Ranks) -> None:
    """Let a thread compute on this rank's device: which one is current is kept by thread."""
    if place.device.type != "cpu":
        accelerator().set_device(place.device.index)


def look(
    rounds: Rounds,
    report: Report,
    config: Config | None,
    toy: Path | None,
    real: bool,
    make: Callable[..., Engine],
    family: str,
) -> None:
    """Every check in turn; all ranks call it together."""
    place, world = rounds.place, rounds.place.world
    config = None if config is None else config.on(world)
    tried = config if config is not None else twin.default(world)
    low = DTYPES[tried.engine.precision]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    name = family.partition(":")[0]
    facts = kernels.facts_at_hand(config)
    timing = partial(kernels.measure, config, name, facts, place.device, 8.0)
    steps: list[tuple[str, Callable[[], list[Line]]]] = [
        ("versions", lambda: versions.lines(versions.found())),
        ("device", lambda: hosts(rounds, "device", lambda: hardware.lines(config, place.device), 20)),
        ("memory", lambda: hosts(rounds, "memory", lambda: machine.lines(config, local), 20)),
        ("disks", lambda: hosts(rounds, "disks", lambda: disks.lines(config), 30)),
        ("disk nvme", lambda: hosts(rounds, "disk nvme", lambda: nvme.lines(config, world, local), 40)),
        ("settings", lambda: versions.settings(config, world, kind())),
        ("data", lambda: company.data(rounds, config)),
        ("ranks", lambda: company.look(rounds, config)),
        ("one folder", lambda: company.shared(rounds, config)),
        ("sums", lambda: sums.look(rounds, low)),
        ("clocks", lambda: company.clocks(rounds)),
        ("bandwidth", lambda: speed.look(rounds)),
        ("attention", lambda: hosts(rounds, "attention", timing, 30)),
        ("gradient", lambda: tried_engine(rounds, tried, toy, real, make, family)),
    ]
    for name, step in steps:
        if rounds.over:
            report.add([unseen(name, "the time was over")])
            continue
        try:
            report.add(step())
        except (Lost, KeyboardInterrupt):
            raise
        except Exception as error:
            # Only the first rank reads answers: the others are already at the next question.
            report.add([bad(name, f"the check itself failed: {type(error).__name__}: {error}", "report it")])
    if rounds.over:
        text = "it was over before all was looked at: this machine has much else to do, or is slow"
        report.add([warning("time", text, "end other work, and start the doctor again")])


def tried_engine(
    rounds: Rounds, config: Config, toy: Path | None, real: bool, make: Callable[..., Engine], family: str
) -> list[Line]:
    """The engine's lines, unless nothing can be tried."""
    if toy is None and not real:
        return [unseen("gradient", "the model's family is not known")]
    found = parity.look(rounds, config, toy, make)
    if ":" in family and found:
        found.append(unseen("model", family.partition(": ")[2]))
    return found


def hosts(
    rounds: Rounds, name: str, work: Callable[[], Sequence[Line | dict[str, Any]]], limit: float
) -> list[Line]:
    """What one rank of each machine says, as one: the worst of each line, with its machine."""
    mine = os.environ.get("LOCAL_RANK", "0") == "0"

    def told() -> Any:
        if not mine:
            return None
        return [line.plain() if isinstance(line, Line) else line for line in work()]

    answers = rounds.ask(told, limit)
    return trouble(name, answers) + worst_of(answers) if rounds.first else []


def worst_of(answers: Sequence[Answer]) -> list[Line]:
    """Of each line the one that asks most for attention; where machines differ, which one says so."""
    said = {answer.rank: [Line.of(plain) for plain in answer.said] for answer in answers if answer.said}
    names = dict.fromkeys(line.name for lines in said.values() for line in lines)
    found = []
    for name in names:
        several = {rank: line for rank, lines in said.items() for line in lines if line.name == name}
        rank, worst = max(several.items(), key=lambda pair: (ORDER.index(pair[1].verdict), -pair[0]))
        text = worst.text
        if len(said) > 1:
            alike = sum(line.verdict is worst.verdict for line in several.values())
            text += f" (machine of rank {rank}; {alike} of {len(said)} machines are {worst.verdict.value})"
        found.append(
            Line(name, worst.verdict, text, worst.do, {"by rank": {r: several[r].figures for r in several}})
        )
    return found
