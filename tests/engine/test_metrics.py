"""A line of metrics tells of all samples of its steps on all ranks; between lines nothing is waited for."""

import json
import threading
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato import train
from sfumato.data.loader import Loader
from sfumato.engine.engine import Engine
from sfumato.report import tally
from sfumato.report.clock import Clock
from sfumato.report.telling import Telling
from tests.engine import runs
from tests.engine.ranks import run_ranks
from tests.unit import toy_source

PLANTED = "rolled"
"""A run whose fourth attempt at a step has an infinite loss."""
LATE = 0.2  # seconds that each micro-batch of rank 1 is late
WAITS = ("item", "tolist", "cpu", "numpy", "to", "__float__", "__int__", "__bool__", "__index__")


def recorded(jobs: list[dict[str, Any]], late: bool = False) -> list[dict[str, Any]]:
    """Train; the lines of each run, and this rank's losses and draws of each attempt at a step."""
    losses_of, metrics, next_batch = train.losses_of, Engine.metrics, Loader.next_batch
    runs.without_exports()
    found = []
    for values in jobs:
        attempts: dict[int, list[Any]] = defaultdict(list)  # DeepSpeed's count of batches -> samples
        broken = values["name"] == "broken"

        def watched(engine: Engine, method: Any, objective: Any, batch: Any) -> tuple[Tensor, Tensor]:
            attempt = engine.deepspeed.micro_steps // engine.accumulation
            losses, sums = losses_of(engine, method, objective, batch)
            if values["name"] == PLANTED and attempt == 3:  # noqa: B023
                losses = losses * torch.inf
            attempts[attempt] += [(engine.step_count + 1, losses.tolist(), batch.draws.timestep.tolist())]  # noqa: B023
            return losses, sums

        def last_micro(engine: Engine, more: Tensor | None = None) -> dict[str, Any]:
            """T18: what other trainers log: rank 0's last micro-batch."""
            return metrics(engine, more) | {"loss": float(engine.losses[-1].mean())}

        def slow(loader: Loader, *told: Any) -> Any:
            time.sleep(LATE * loader.rank)
            return next_batch(loader, *told)

        train.losses_of = watched
        Engine.metrics = last_micro if broken else metrics  # type: ignore[method-assign]
        Loader.next_batch = slow if late else next_batch  # type: ignore[method-assign]
        try:
            run = runs.train_here(values).parent
        finally:
            train.losses_of, Engine.metrics = losses_of, metrics  # type: ignore[method-assign]
            Loader.next_batch = next_batch  # type: ignore[method-assign]
        found.append({"lines": runs.metrics(run), "attempts": dict(attempts), "run": run})
    return found


def check_lines(lines: list[dict[str, Any]], ranks: list[dict[int, list[Any]]], begun: int = 0) -> None:
    """T18. lines: of metrics.jsonl; ranks: what each recorded. The last attempt at a step counts."""
    steps: dict[int, tuple[list[float], list[float]]] = {}
    for attempt in sorted(ranks[0]):
        several = [sample for rank in ranks for sample in rank[attempt]]
        losses, u = ([x for one in several for x in one[part]] for part in (1, 2))
        if np.isfinite(losses).all():
            steps[several[0][0]] = losses, u
    before = begun
    for line in lines:
        span = range(before + 1, line["step"] + 1)
        losses = np.concatenate([steps[step][0] for step in span])
        quarter = np.floor(np.concatenate([steps[step][1] for step in span]) * 4)
        assert len(losses) == 4 * len(span), "the harness lacks samples"
        assert line["loss"] == pytest.approx(losses.mean(), rel=1e-6), f"the loss of step {line['step']}"
        for part, told in enumerate(line["loss_by_timestep"]):
            own = losses[quarter == part]
            assert told == (pytest.approx(own.mean(), rel=1e-6) if len(own) else None), f"quarter {part}"
        before = line["step"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_place(tmp_path_factory.mktemp("metrics"), "sd")


def jobs(place: Path, world: int) -> list[dict[str, Any]]:
    asked: dict[str, Any] = {"steps": 5, "log__every": 2, "checkpoint__export": False}
    if world == 2:
        asked |= {"engine__zero_stage": 2, "log__weights_every": 5, "micro_batch_size": 1}
    found = [runs.settings(place, name=f"{world}-ranks", **asked)]
    if world == 1:
        found.append(runs.settings(place, name="broken", **asked | {"steps": 2}))
        rolled = {"bad_numbers__policy": "rollback", "checkpoint__every": 2, "log__every": 3, "steps": 6}
        found.append(runs.settings(place, name=PLANTED, **asked | rolled))
    return found


@pytest.fixture(scope="module")
def alone(place: Path) -> list[dict[str, Any]]:
    return run_ranks(recorded, 1, jobs(place, 1), timeout=280)[0]


@pytest.fixture(scope="module")
def pair(place: Path) -> list[list[dict[str, Any]]]:
    return run_ranks(recorded, 2, jobs(place, 2), True, timeout=280)


def test_t18_on_one_rank(alone: list[dict[str, Any]]) -> None:
    check_lines(alone[0]["lines"], [alone[0]["attempts"]])
    assert [line["step"] for line in alone[0]["lines"]] == [2, 4, 5]


def test_t18_on_two_ranks(pair: list[list[dict[str, Any]]]) -> None:
    check_lines(pair[0][0]["lines"], [rank[0]["attempts"] for rank in pair])


def test_t18_catches_the_last_micro_batch_of_the_first_rank(alone: list[dict[str, Any]]) -> None:
    with pytest.raises(AssertionError, match="the loss of step 2"):
        check_lines(alone[1]["lines"], [alone[1]["attempts"]])


def test_a_rollback_is_forgotten(alone: list[dict[str, Any]]) -> None:
    """Step 3 was told and undone with the bad attempt at 4; its second time is the one in the file."""
    run = alone[2]
    assert [line["step"] for line in run["lines"]] == [3, 6]
    check_lines(run["lines"], [run["attempts"]], begun=2)
    assert [line["skipped"] for line in run["lines"]] == [pytest.approx(1 / 2), 0.0]
    first = run["lines"][0]
    useful = (first["seconds_per_step"] - first["data_seconds"]) / 2
    assert first["useful_seconds"] == pytest.approx(useful), "the bad attempt was of use"


def test_the_distance_of_the_average(pair: list[list[dict[str, Any]]]) -> None:
    """Against the whole tensors of the checkpoint, from shards on two ranks, once in five steps."""
    lines, run = pair[0][0]["lines"], pair[0][0]["run"]
    assert ["ema_distance" in line for line in lines] == [False, False, True]
    weights, average = runs.tensors_of(run), runs.tensors_of(run, "ema")
    size = sum(float(part.double().square().sum()) for part in weights.values()) ** 0.5
    apart = sum(float((average[name] - weights[name]).double().square().sum()) for name in weights) ** 0.5
    assert lines[-1]["weight_norm"] == pytest.approx(size, rel=1e-5)
    assert lines[-1]["ema_distance"] == pytest.approx(apart / size, rel=1e-4) and apart > 0


def test_the_slowest_rank_is_the_wait_of_all(pair: list[list[dict[str, Any]]]) -> None:
    for line, steps in zip(pair[0][0]["lines"], (2, 2, 1), strict=True):
        assert line["data_seconds"] >= 0.9 * LATE * 2 * steps and line["data_rank"] == 1


def test_starts_summary_and_goodput(pair: list[list[dict[str, Any]]]) -> None:
    run, lines = pair[0][0]["run"], pair[0][0]["lines"]
    begin, end = (json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines())
    assert (begin["step"], begin["world"], begin["device"]) == (0, 2, "cpu")
    assert (end["step"], end["end"]) == (5, "done")
    told = json.loads((run / "summary.json").read_text())
    assert (told["steps"], told["window"], told["window_asked"]) == (5, [1, 5], [100, 199])
    assert told["final_loss"] == lines[-1]["loss"]
    useful = sum(
        (line["seconds_per_step"] * steps - line["data_seconds"])
        for line, steps in zip(lines, (2, 2, 1), strict=True)
    )
    assert lines[-1]["useful_seconds"] == pytest.approx(useful)
    assert 0 < told["goodput"] == pytest.approx(useful / told["end_to_end_seconds"], rel=0.01)
    assert (run / "report.html").is_file()


def counting(values: dict[str, Any], how: str) -> list[int]:
    """How often a run waits for a tensor's numbers before each of its steps is over.

    how: "ours", "none" (nothing is tallied) or "broken" (a loss is read at each step).
    """
    counts, now = defaultdict[int, int](int), [0]
    sums, trained, kept = tally.sums, Telling.trained, {name: getattr(Tensor, name) for name in WAITS}

    def reading(*told: Any) -> Tensor:
        told[1].mean().item()
        return sums(*told)

    def turned(self: Telling, batches: Any) -> None:
        now[0] = self.engine.step_count
        if how != "none":
            trained(self, batches)

    def counted(name: str) -> Any:
        def call(*told: Any, **more: Any) -> Any:
            # Those of other threads, such as a checkpoint's, are behind the training.
            counts[now[0]] += threading.current_thread() is threading.main_thread()
            return kept[name](*told, **more)

        return call

    tally.sums = {"ours": sums, "none": lambda *told: torch.ones(12), "broken": reading}[how]
    Telling.trained = turned  # type: ignore[method-assign]
    for name in WAITS:
        setattr(Tensor, name, counted(name))
    try:
        runs.train_here(values | {"name": f"waits-{how}"})
    finally:
        for name in WAITS:
            setattr(Tensor, name, kept[name])
        tally.sums, Telling.trained = sums, trained  # type: ignore[method-assign]
    return [counts[step] for step in (1, 2)]


def counts(values: dict[str, Any]) -> dict[str, list[int]]:
    runs.without_exports()
    return {how: counting(values, how) for how in ("none", "ours", "broken")}


def test_no_wait_for_the_device_between_two_lines(place: Path) -> None:
    """Steps 2 and 3 of four, of which the last is told: the loop's own waits, and none more."""
    values = runs.settings(place, steps=4, log__every=4, checkpoint__export=False, micro_batch_size=4)
    found = run_ranks(counts, 1, values, timeout=280)[0]
    assert found["ours"] == found["none"] and found["none"][0] > 0, found
    assert found["broken"] == [count + 1 for count in found["none"]], "a wait was not counted"


def check_stall(line: dict[str, Any], seconds: float) -> None:
    """Two steps, of four pictures each that took so long to open."""
    assert line["data_seconds"] >= 0.95 * 8 * seconds, "the wait for data is not seen"
    both = 2 * line["seconds_per_step"]
    assert line["data_stall"] == pytest.approx(line["data_seconds"] / both)
    rate = line["images_per_second"] / line["images_per_second_without_data_wait"]
    assert rate == pytest.approx(1 - line["data_stall"]) and line["data_stall"] > 0.02


def slow_source(values: dict[str, Any]) -> list[dict[str, Any]]:
    """A source that sleeps, and then with a clock that stands still."""
    toy_source.install()
    runs.without_exports()
    found = [runs.metrics(runs.train_here(values).parent)[-1]]
    Clock.waiting = lambda self: nullcontext()  # type: ignore[method-assign,assignment,return-value]
    return [*found, runs.metrics(runs.train_here(values | {"name": "still"}).parent)[-1]]


def test_a_slow_source_is_a_data_stall(place: Path, tmp_path: Path) -> None:
    folder = toy_source.fill(tmp_path / "slow", 5)
    for number, picture in enumerate(sorted(folder.glob("*.img"))):
        picture.write_bytes(toy_source.encoded((64 + number, 70)))
    values = runs.settings(place, name="slow", steps=2, log__every=2, checkpoint__export=False)
    values["data"] |= {"source": str(folder), "store": str(tmp_path / "store")}
    values["output"] = str(tmp_path / "runs")
    (folder / ".slow").write_text("0.3")
    slow, still = run_ranks(slow_source, 1, values, timeout=280)[0]
    check_stall(slow, 0.3)
    with pytest.raises(AssertionError, match="not seen"):
        check_stall(still, 0.3)


def profiled(values: dict[str, Any]) -> Path:
    return runs.train_here(values).parent


def test_profilers(place: Path) -> None:
    """torch's trace of the second and third step, DeepSpeed's count of the second's, and its breakdown."""
    values = runs.settings(
        place, name="profiled", steps=4, checkpoint__export=False, micro_batch_size=4,
        profile={"start": 1, "steps": 2, "flops": 2, "breakdown": True},
    )  # fmt: skip
    folder = run_ranks(profiled, 1, values, timeout=280)[0] / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        "breakdown.jsonl", "flops.txt", "step-000001.json.gz",
    ]  # fmt: skip
    text = (folder / "flops.txt").read_text()
    assert "Profile Summary at step 2" in text and "MACs" in text
    lines = [json.loads(line) for line in (folder / "breakdown.jsonl").read_text().splitlines()]
    assert any(line["milliseconds"].get("bwd", 0) > 0 for line in lines)
    assert len(folder.joinpath("step-000001.json.gz").read_bytes()) > 10_000
