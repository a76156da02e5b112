"""`sfumato bench faults`: a run that is killed again and again, beside one that nobody disturbed.

The dict that `storm` gives, and `run` writes as JSON, format 1:

    format, seed, ranks, steps, seconds
    kills        how many at which moment: {"starting", "training", "saving"}
    damage       how many checkpoints were spoilt in which way: {"flipped", "cut", "deleted", "pickle"}
    announced    checkpoints that a start of the run told of
    lost         those of them that were gone, or not whole, after a kill (and that nobody spoilt)
    repeated, missing     steps told more than once, or never; or whose samples are not those of that step
    differing    tensors of the last checkpoint that are not, bit by bit, the undisturbed run's
"""

import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sfumato.bench.fire import Command, Started, spoil, strike, world, write_config
from sfumato.engine import checkpoint
from sfumato.errors import UserError

LIMIT = 300.0  # seconds that any start may take to its next step, its end, or its death
STEPS_AHEAD = 1_000_000  # more than any storm reaches
LAST = 5  # steps after the last kill
MOMENTS = ("starting", "training", "training", "saving", "saving")
SPOILT = 0.25
"""Share of the kills after which the newest checkpoint is damaged too."""


def run(kills: int, ranks: int, out: Path | None) -> dict[str, Any]:
    """A storm in a scratch folder with real commands; shown as a table, written to `out` as JSON.

    Raises UserError if the folder of `out` is not there.
    """
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--json {out}", f"no folder {out.parent}", "make it, or name another file")
    log = Console(stderr=True)
    log.print(f"{kills} kills; each start takes some seconds.")
    with tempfile.TemporaryDirectory(prefix="sfumato-storm-") as scratch:
        place = Path(scratch)
        world(place)

        def start(steps: int, name: str) -> Started:
            return Command(write_config(place, name), steps, ranks)

        found = storm(place, start, kills, ranks, seed=0, tell=log.print)
    table = Table("", "", title="A run under fire", title_justify="left")
    for key, value in found.items():
        table.add_row(key, str(value))
    Console().print(table)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def good(found: dict[str, Any]) -> bool:
    """Whether a storm did no harm."""
    return not any(found[key] for key in ("lost", "repeated", "missing", "differing"))


@dataclass
class Storm:
    """What happened so far to the run in a folder."""

    folder: Path
    draw: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    damage: Counter[str] = field(default_factory=Counter)
    announced: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    spoilt: set[int] = field(default_factory=set)
    """Steps whose checkpoint was damaged here, and is perhaps not set aside yet."""

    def blow(self, start: Callable[[int, str], Started]) -> str:
        """Start the run, kill a rank or all at a random instant, perhaps spoil a checkpoint; the moment."""
        moment, reached = self.draw.choice(MOMENTS), last_step(self.folder)
        going = start(reached + STEPS_AHEAD, self.folder.name)
        wait_for(going, self.folder, moment, reached, self.draw)
        self.listen()
        victims = going.ranks()
        if self.draw.random() < 0.5 or not victims:
            going.end()
        else:
            strike(self.draw.choice(victims))
        if going.wait(LIMIT) is None:
            going.end()
            raise RuntimeError(f"killed while {moment}, the run did not end in {LIMIT:.0f} s")
        self.kills[moment] += 1
        self.listen()
        self.lost |= {step for step in newest(self.announced) if not whole(self.folder, step)}
        steps = sorted(published(self.folder))
        if len(steps) > 1 and self.draw.random() < SPOILT:
            spoilt = checkpoint.path_of(self.folder / "checkpoints", steps[-1])
            self.damage[spoil(spoilt, self.draw)] += 1
            self.announced.discard(steps[-1])
            self.spoilt.add(steps[-1])
        return moment

    def listen(self) -> None:
        """Take note of what is published. One of a spoilt step counts once it was written again."""
        now = published(self.folder)
        self.spoilt = {step for step in self.spoilt & now if not whole(self.folder, step)}
        self.announced |= now - self.spoilt


def storm(
    place: Path,
    start: Callable[[int, str], Started],
    kills: int,
    ranks: int,
    seed: int,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Start a run, kill it at a random instant, and again; then let it end, and compare.

    start: (steps, name) -> the run of that name, started or going on, to that many steps.
    Raises RuntimeError where a start does not go on.
    """
    began = time.monotonic()
    folder, calm = place / "runs" / "storm", place / "runs" / "calm"
    seen = Storm(folder, random.Random(seed))
    for number in range(kills):
        moment = seen.blow(start)
        tell(f"kill {number + 1} of {kills}, {moment}: step {last_step(folder)}")
    end = last_step(folder) + LAST
    for name in (folder.name, calm.name):
        going = start(end, name)
        code = going.wait(LIMIT + end)
        if code != 0:
            going.end()
            raise RuntimeError(f"the run {name} did not end well: {code}")
    repeated, missing = told_wrong(folder, calm, end)
    return {
        "format": 1,
        "seed": seed,
        "ranks": ranks,
        "steps": end,
        "kills": dict(seen.kills),
        "damage": dict(seen.damage),
        "announced": len(seen.announced) + sum(seen.damage.values()),
        "lost": len(seen.lost),
        "repeated": repeated,
        "missing": missing,
        "differing": differing(folder, calm),
        "seconds": round(time.monotonic() - began, 1),
    }


def wait_for(going: Started, folder: Path, moment: str, reached: int, draw: random.Random) -> None:
    """Return at a random instant of a kind. RuntimeError if the run ends by itself, or does not go on."""
    end = time.monotonic() + LIMIT
    if moment == "starting":
        time.sleep(draw.uniform(0, 2))
        return
    while last_step(folder) <= reached:
        if (code := going.wait(0.02)) is not None or time.monotonic() > end:
            raise RuntimeError(f"after step {reached} it did not go on in {LIMIT:.0f} s; exit code {code}")
    if moment == "training":
        time.sleep(draw.uniform(0, 0.5))
        return
    while not [*(folder / "checkpoints").glob(".step-*")] and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.03))


def last_step(folder: Path) -> int:
    """The last step that the run told, 0 before the first."""
    return max((int(line["step"]) for line in lines(folder)), default=0)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of the run's metrics."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def published(folder: Path) -> set[int]:
    """Steps whose checkpoint has its name."""
    return set(checkpoint.steps_in(folder / "checkpoints"))


def newest(announced: set[int]) -> list[int]:
    """The steps of the two newest checkpoints, which no pruning may have taken."""
    return sorted(announced)[-2:]


def whole(folder: Path, step: int) -> bool:
    """Whether a checkpoint is there with all that its manifest lists."""
    try:
        return not checkpoint.Saved(checkpoint.path_of(folder / "checkpoints", step)).problems()
    except UserError:
        return False


def told_wrong(folder: Path, calm: Path, end: int) -> tuple[int, int]:
    """How many steps of a run were told twice, and how many never or with other samples than the calm one."""
    times = Counter(line["step"] for line in lines(folder))
    samples = {line["step"]: line["samples"] for line in lines(folder)}
    right = {line["step"]: line["samples"] for line in lines(calm)}
    repeated = sum(count - 1 for count in times.values())
    return repeated, sum(samples.get(step) != right[step] for step in range(1, end + 1))


def differing(folder: Path, calm: Path) -> int:
    """How many tensors of the last checkpoints differ between two runs, in any bit."""
    one, other = (
        checkpoint.Saved(checkpoint.path_of(run / "checkpoints", max(published(run))))
        for run in (folder, calm)
    )
    assert one.kinds == other.kinds and one.step == other.step, "the runs ended in different states"
    pairs = [(kind, name) for kind in sorted(one.kinds) for name in one.parameters]
    return sum(not torch.equal(one.whole(*pair), other.whole(*pair)) for pair in pairs)
