"""A run under fire: killed at random instants, checkpoints damaged, and still the run nobody disturbed."""

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from sfumato.bench import faults, fire
from sfumato.engine import checkpoint
from tests.engine import runs
from tests.engine.ranks import as_users_start_it, fork_server, free_port

GRACE = 0.5  # seconds from a rank's death to the others', as a launcher gives them


class Forked:
    """The ranks of a run, started from the fork server: the same code as a command's, without its imports."""

    def __init__(self, values: dict[str, Any], world: int) -> None:
        port = free_port()
        places = [(values, rank, world, port) for rank in range(world)]
        self.processes = [fork_server().Process(target=rank_of, args=place) for place in places]
        for process in self.processes:
            process.start()

    def ranks(self) -> list[int]:
        return [process.pid for process in self.processes if process.exitcode is None and process.pid]

    def end(self) -> None:
        for process in self.processes:
            fire.strike(process.pid or 0) if process.pid else None
            process.kill()

    def wait(self, limit: float) -> int | None:
        end = time.monotonic() + limit
        while any(process.exitcode is None for process in self.processes):
            if any(process.exitcode for process in self.processes):
                time.sleep(GRACE)
                self.end()
            if time.monotonic() > end:
                return None
            time.sleep(0.01)
        return max(abs(process.exitcode or 0) for process in self.processes)


def rank_of(values: dict[str, Any], rank: int, world: int, port: int) -> None:
    """Train as one rank, in a session of its own."""
    os.setsid()
    as_users_start_it()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    jump(random.Random(port + rank))
    runs.without_exports()
    runs.train_here(values)
    os._exit(0)


def jump(draw: random.Random) -> None:
    """Have the clock leap, a second after the start and again, by up to a day forth or back, on each rank."""
    real, leaps = time.time, [draw.uniform(-86400, 86400) for _ in range(10)]
    born = time.monotonic()
    time.time = lambda: real() + leaps[int(time.monotonic() - born) % len(leaps)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storm")
    fire.world(folder)
    return folder


@pytest.mark.timeout(600)
def test_ten_kills_lose_nothing(place: Path) -> None:
    def start(steps: int, name: str) -> Forked:
        return Forked(fire.values(place, name) | {"steps": steps, "micro_batch_size": 2}, 2)

    found = faults.storm(place, start, 10, 2, seed=1)
    assert sum(found["kills"].values()) == 10
    assert faults.good(found), found
    assert found["announced"] > 0 and found["steps"] >= 10
    check_that_damage_is_seen(place / "runs" / "storm")


def check_that_damage_is_seen(folder: Path) -> None:
    """Each way to spoil a checkpoint counts as lost, unless the storm itself did it."""
    seen, draw = faults.Storm(folder, random.Random(0)), random.Random(0)
    seen.listen()
    step = max(seen.announced)
    kept, ways = checkpoint.path_of(folder / "checkpoints", step), set()
    while len(ways) < 4:
        shutil.copytree(kept, folder / "kept")
        assert faults.whole(folder, step)
        ways.add(fire.spoil(kept, draw))
        assert not faults.whole(folder, step), ways
        shutil.rmtree(kept)
        (folder / "kept").rename(kept)
    fire.spoil(kept, draw)
    seen.announced.discard(step)
    seen.spoilt.add(step)
    seen.listen()
    assert step not in seen.announced and seen.announced


def test_the_comparison_sees_what_a_storm_could_do(place: Path) -> None:
    """A line told twice, one that is missing, another sample, a bit of a weight."""
    runs_of = place / "verdict"
    for name, lines in (("calm", (1, 2, 3)), ("storm", (1, 2, 2))):
        (runs_of / name).mkdir(parents=True)
        text = "".join(f'{{"step": {step}, "samples": [{step}]}}\n' for step in lines)
        (runs_of / name / "metrics.jsonl").write_text(text)
    assert faults.told_wrong(runs_of / "storm", runs_of / "calm", 3) == (1, 1)
    other = (runs_of / "storm" / "metrics.jsonl").read_text().replace("[1]", "[9]")
    (runs_of / "storm" / "metrics.jsonl").write_text(other)
    assert faults.told_wrong(runs_of / "storm", runs_of / "calm", 3) == (1, 2)
    for key in ("lost", "repeated", "missing", "differing"):
        assert not faults.good({"lost": 0, "repeated": 0, "missing": 0, "differing": 0} | {key: 1})
