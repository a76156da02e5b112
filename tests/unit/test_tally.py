"""The sums behind a line of metrics: exact, in one vector; starts and goodput; the summary at the end."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato import config
from sfumato.data.batch import Draws
from sfumato.objective import Objective
from sfumato.report import summary, tally
from sfumato.report.flops import peak_of
from sfumato.report.starts import Starts, counted, read
from sfumato.report.telling import useful_until


def micro_batches() -> list[tuple[Tensor, Tensor, Draws]]:
    """Losses, latents and draws of three micro-batches of two sizes; no timestep in the second quarter."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for side in (4, 8, 8):
        shape = (5, 4, side, side)
        noise, latents = (torch.randn(shape, generator=draw, dtype=torch.float32) for _ in range(2))
        u = torch.rand(5, generator=draw)
        u = torch.where((u >= 0.25) & (u < 0.5), u + 0.5, u)
        offset = torch.randn(5, 4, 1, 1, generator=draw)
        losses = torch.rand(5, generator=draw) * 10 ** (3 * u)
        found.append((losses, 0.7 * latents + 0.3, Draws(noise, noise, u, offset, None)))
    return found


def check_told(sums: Any) -> None:
    """Against plain float64 over all samples."""
    objective = Objective(config.Objective(noise_offset=0.1), {})
    every = micro_batches()
    told = tally.told(torch.stack([sums(objective, *one) for one in every]).sum(0).tolist())
    losses = torch.cat([losses for losses, *_ in every]).double()
    quarter = torch.cat([draws.timestep for *_, draws in every]).double().mul(4).long()
    for part in range(4):
        own = losses[quarter == part]
        found = told["loss_by_timestep"][part]
        assert found == (pytest.approx(float(own.mean()), rel=1e-6) if len(own) else None), f"quarter {part}"
    # A sample counts once, whatever its size.
    for name, several in (
        ("latent", [latents for _, latents, _ in every]),
        ("noise", [draws.noise + 0.1 * draws.offset for *_, draws in every]),
    ):
        means = torch.cat([one.double().flatten(1).mean(1) for one in several]).mean()
        squares = torch.cat([one.double().square().flatten(1).mean(1) for one in several]).mean()
        assert told[f"{name}_mean"] == pytest.approx(float(means), rel=1e-5, abs=1e-7), f"{name}'s mean"
        assert told[f"{name}_std"] == pytest.approx(float((squares - means**2).sqrt()), rel=1e-6), f"{name}'s"


def test_told_is_the_mean_over_all_samples() -> None:
    check_told(tally.sums)


@pytest.mark.parametrize("fault", ["boundary", "noise"])
def test_told_catches(fault: str) -> None:
    """Quarters of the uniform draw that are off by a half, and noise without its offset."""

    def broken(objective: Objective, losses: Tensor, latents: Tensor, draws: Draws) -> Tensor:
        if fault == "noise":
            objective = Objective(config.Objective(), {})
            return tally.sums(objective, losses, latents, draws)
        moved = Draws(draws.noise, draws.noise, (draws.timestep + 0.125) % 1, draws.offset, None)
        return tally.sums(objective, losses, latents, moved)

    with pytest.raises(AssertionError, match="quarter" if fault == "boundary" else "noise"):
        check_told(broken)


def test_a_part_of_the_schedule_without_samples_is_none_and_no_sums_tell_nothing() -> None:
    assert tally.told([]) == {}
    assert tally.told([1.0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1])["loss_by_timestep"] == [1.0, None, None, None]


START: dict[str, Any] = {"step": 0, "world": 1, "device": "cpu"}


def check_counted(count: Any) -> None:
    """A start that was stopped after 10 s, one killed, one that failed after 5 s; now it is 160."""
    lines = [
        {"time": 100.0, **START}, {"time": 110.0, "step": 4, "end": "stopped"},
        {"time": 120.0, **START},
        {"time": 130.0, **START}, {"time": 135.0, "step": 9, "end": "failed"},
    ]  # fmt: skip
    assert count(lines, 160.0) == 10 + 10 + 30, "the pauses are not counted as they should be"


def test_what_counts_of_earlier_starts() -> None:
    check_counted(counted)


def test_counted_catches_a_pause_that_was_asked_for() -> None:
    with pytest.raises(AssertionError, match="pauses"):
        check_counted(lambda lines, until: until - lines[0]["time"])


def test_starts_are_read_again_and_survive_a_torn_line(tmp_path: Path) -> None:
    first = Starts(tmp_path, 1000.0)
    first.start(0, 2, "cpu")
    with first.path.open("a") as file:
        file.write('{"time": 10')
    second = Starts(tmp_path, 1100.0)
    second.start(5, 1, "cpu")
    second.end(7, "done")
    assert second.before == pytest.approx(100.0)
    lines = read(first.path)
    assert [line.get("end") for line in lines] == [None, None, "done"] and lines[1]["step"] == 5


def test_a_disk_that_takes_no_line_ends_no_run(tmp_path: Path) -> None:
    told = list[str]()
    Starts(tmp_path / "not there", 0.0, told.append).end(3, "done")
    assert len(told) == 1 and "training goes on" in told[0]


def test_a_clock_that_is_set_back_makes_no_run_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day back in the middle of a start that lasts no time, and of one that lasted 40 s."""
    now = time.time()
    starts = Starts(tmp_path, now - 30)
    starts.start(0, 1, "cpu")
    monkeypatch.setattr(time, "time", lambda: now - 86400)
    assert 30 <= starts.elapsed() < 60
    starts.end(4, "stopped")
    assert 30 <= Starts(tmp_path, now - 80000).before < 60
    lines = [{"time": 100.0, **START}, {"time": 20.0, "seconds": 40.0, "step": 9, "end": "failed"}]
    assert counted(lines, 30.0) == 40.0 and counted([*lines, {"time": 30.0, **START}], 35.0) == 45.0


def line(step: int, each: float, stall: float, useful: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "seconds_per_step": each, "data_stall": stall, "useful_seconds": useful, **more}


def test_useful_seconds_go_on_where_the_file_ends(tmp_path: Path) -> None:
    """A checkpoint at step 25, behind the last line at 20: five steps of 2 s, a quarter of it waiting."""
    path = tmp_path / "metrics.jsonl"
    assert useful_until(path, 0) == 0.0
    path.write_text("".join(json.dumps(line(step, 2.0, 0.25, 1.5 * step)) + "\n" for step in (10, 20)))
    assert useful_until(path, 25) == pytest.approx(30 + 5 * 1.5)
    assert useful_until(path, 20) == pytest.approx(30)


def lines_of(steps: int, every: int = 1) -> list[dict[str, Any]]:
    """A slow first step, and a rate that rises with the step."""
    return [
        {"step": step, "steps": every, "images_per_second": 1.0 if step == 1 else float(step)}
        for step in range(every, steps + 1, every)
    ]


@pytest.mark.parametrize(
    ("steps", "every", "window", "rate"),
    [
        (300, 1, [100, 199], 149.5),
        (150, 1, [100, 150], 125.0),
        (20, 1, [1, 20], 10.5),
        (300, 50, [51, 150], 125.0),
    ],
)
def test_the_window_of_the_summary(steps: int, every: int, window: list[int], rate: float) -> None:
    """The seeds' mean of the rates of the steps 100 to 199, or of what there is."""
    chosen, found = summary.windowed(lines_of(steps, every), (100, 199))
    assert found == window and summary.mean(chosen, "images_per_second") == pytest.approx(rate)


def test_peaks_are_those_of_devices_that_are_known() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_of("NVIDIA A100-SXM4-40GB", "fp32") == 19.5e12
    for called in ("cpu", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4"):
        assert peak_of(called, "bf16") is None, called
