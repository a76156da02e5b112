"""metrics.jsonl tells every logged step once, and the console no more than a person can read."""

import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sfumato.report import progress
from sfumato.report.counter import rate_of
from sfumato.report.progress import Progress, duration

ROOT = Path(__file__).parents[2]


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(step: int) -> dict[str, float]:
    return {"loss": 1 / step, "lr": 1e-5, "grad_norm": 0.5, "data_seconds": 0.25}


def check_resume(make: Callable[..., Progress], path: Path) -> None:
    """A run killed at step 7 goes on from its checkpoint of step 4: every step is told once, in order."""
    with make(path, 10, 4, console=plain()) as first:
        for step in range(1, 8):
            first.step(step, {"loss": 0.0})
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # what a kill in the middle of a write leaves
    with make(path, 10, 4, start=4, console=plain()) as second:
        for step in range(5, 11):
            second.step(step, {"loss": 1.0})
    found = read(path)
    assert [line["step"] for line in found] == list(range(1, 11)), "steps are repeated or lost"
    assert [line["loss"] for line in found] == [0.0] * 4 + [1.0] * 6, "a step is told from before the kill"


def test_resume_repeats_no_step(tmp_path: Path) -> None:
    check_resume(Progress, tmp_path / "metrics.jsonl")


def test_resume_catches_a_file_that_is_only_appended_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "cut_after", lambda path, step: None)
    with pytest.raises((AssertionError, json.JSONDecodeError)):
        check_resume(Progress, tmp_path / "metrics.jsonl")


def test_resume_catches_a_file_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "cut_after", lambda path, step: path.unlink(missing_ok=True))
    with pytest.raises(AssertionError, match="lost"):
        check_resume(Progress, tmp_path / "metrics.jsonl")


def test_lines_are_cut_where_a_disk_has_no_room(tmp_path: Path) -> None:
    """Those at the end go in place; a torn one between others stays until there is room."""
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "metrics.jsonl.new").symlink_to("/dev/full")
    lines = [f'{{"step": {step}}}\n' for step in range(1, 6)]
    path.write_text("".join(lines) + '{"st')
    progress.cut_after(path, 3)
    assert path.read_text() == "".join(lines[:3])
    torn = "".join([lines[0], '{"st\n', "\xff\n", *lines[1:]])
    path.write_text(torn, encoding="latin-1")
    with pytest.raises(OSError, match="No space left"):
        progress.cut_after(path, 3)
    assert path.read_text(encoding="latin-1") == torn, "what was kept is lost"
    progress.cut_after(path, 3)
    assert path.read_text() == "".join(lines[:3])


def test_a_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    told = Progress(path, 10, 4, console=plain())
    told.step(3, metrics(3))
    line = read(path)[0]
    assert metrics(3).items() <= line.items() and line["step"] == 3
    assert line["process_memory_gib"] > 0.01
    told.close()
    told.close()


def test_a_full_disk_ends_no_run_and_loses_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Progress(path, 10, 4, console=plain()) as told:
        told.step(1, {"loss": 1.0})
        there = os.dup(told.file.fileno())
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, told.file.fileno())
        told.step(2, {"loss": 2.0})
        told.step(3, {"loss": 3.0})
        os.dup2(there, told.file.fileno())
        told.step(4, {"loss": 4.0})
    os.close(there)
    os.close(full)
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4]
    assert text(told.console).count("No space left on device; training goes on") == 1


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Progress(path, 10, 4, console=plain()) as told:
        told.step(1, {"loss": math.nan, "grad_norm": math.inf})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["loss"] is None and line["grad_norm"] is None
    assert "loss nan" in text(told.console)


def check_rates(make: Callable[..., Progress], path: Path) -> None:
    """8 images a step, a step each 2 s of which 0.5 s are waiting; a checkpoint of 30 s in between."""
    clock = Clock()
    told = make(path, 100, 8, console=plain(), clock=clock)
    clock.now += 20.0
    told.step(10, {"data_seconds": 5.0})
    with told.aside():
        clock.now += 30.0
    clock.now += 20.0
    told.step(20, {"data_seconds": 5.0})
    told.close()
    for line in read(path):
        assert line["images_per_second"] == pytest.approx(4.0), "the rate by the wall clock is wrong"
        assert line["images_per_second_without_data_wait"] == pytest.approx(16 / 3), "wait not taken out"
    assert read(path)[1]["seconds"] == pytest.approx(70.0)
    assert "4 images/s (5.33 without data wait)" in text(told.console)
    assert "2m40s left" in text(told.console).splitlines()[-1]


def test_rates(tmp_path: Path) -> None:
    check_rates(Progress, tmp_path / "metrics.jsonl")


def test_rates_catch_checkpoints_counted_as_training(tmp_path: Path) -> None:
    class Broken(Progress):
        def step(self, step: int, metrics: Any) -> None:
            self.outside = 0.0
            super().step(step, metrics)

    with pytest.raises(AssertionError, match="wall clock"):
        check_rates(Broken, tmp_path / "metrics.jsonl")


def test_rates_catch_one_step_counted_for_ten(tmp_path: Path) -> None:
    class Broken(Progress):
        def step(self, step: int, metrics: Any) -> None:
            self.last_step = step - 1
            super().step(step, metrics)

    with pytest.raises(AssertionError, match="wall clock"):
        check_rates(Broken, tmp_path / "metrics.jsonl")


def test_the_rate_without_wait_is_left_out_where_it_is_unknown(tmp_path: Path) -> None:
    with Progress(tmp_path / "metrics.jsonl", 10, 4, console=plain()) as told:
        told.step(1, {"loss": 1.0})
    assert "images_per_second_without_data_wait" not in read(tmp_path / "metrics.jsonl")[0]
    assert "without" not in text(told.console)


def check_pace(make: Callable[..., Progress], path: Path) -> None:
    """200 steps in 20 s are at most a line a second, the first and the last among them; the file has all."""
    clock = Clock()
    with make(path, 200, 4, console=plain(), clock=clock) as told:
        for step in range(1, 201):
            clock.now += 0.1
            told.step(step, metrics(step))
    lines = text(told.console).splitlines()
    shown = [int(line.split()[1].split("/")[0]) for line in lines]
    assert len(lines) <= 22, f"{len(lines)} lines in 20 seconds"
    assert len(lines) >= 18, "too few lines"
    assert shown[0] == 1 and shown[-1] == 200, "the first or the last step is not shown"
    assert [line["step"] for line in read(path)] == list(range(1, 201))


def test_plain_lines_keep_their_pace(tmp_path: Path) -> None:
    check_pace(Progress, tmp_path / "metrics.jsonl")


def test_pace_catches_a_line_per_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with pytest.raises(AssertionError, match="200 lines"):
        check_pace(Progress, tmp_path / "metrics.jsonl")


def test_what_was_held_back_is_shown_at_the_end(tmp_path: Path) -> None:
    clock = Clock()
    with Progress(tmp_path / "metrics.jsonl", 100, 4, console=plain(), clock=clock) as told:
        told.step(1, metrics(1))
        clock.now += 0.5
        told.step(2, metrics(2))
    assert [line.split()[1] for line in text(told.console).splitlines()] == ["1/100", "2/100"]


def test_a_plain_line(tmp_path: Path) -> None:
    with Progress(tmp_path / "metrics.jsonl", 10, 4, console=plain()) as told:
        told.step(1, {"loss": 0.123456, "lr": 1e-5, "grad_norm": 0.98765, "data_seconds": 0.0})
        told.note("checkpoint [step-000001] kept")
    first, second = text(told.console).splitlines()
    pattern = (
        r"step 1/10  loss 0\.1235  lr 1e-05  grad norm 0\.988  \S+ images/s \(\S+ without data wait\)  "
        r"process memory \d+\.\d\d GiB  \S+ left"
    )
    assert re.fullmatch(pattern, first), first
    assert second == "checkpoint [step-000001] kept"


@pytest.mark.parametrize("width", [30, 80, 200])
def test_a_live_line_stays_in_place(tmp_path: Path, width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, _environ={"TERM": "xterm"})
    clock = Clock()
    with Progress(tmp_path / "metrics.jsonl", 50, 4, console=console, clock=clock) as told:
        for step in range(1, 51):
            clock.now += 0.01
            told.step(step, metrics(step))
        told.note("export written")
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text(console))
    assert "step 50/50" in written and "100%" in written and "export written" in written
    assert 4 <= written.count("step ") <= 12, "a picture of the line for every step, or none"


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    console = plain()
    with Progress(path, 10, 4, first=False, console=console) as told:
        told.step(1, metrics(1))
        told.note("hello")
        with told.aside():
            pass
    assert not path.exists() and text(console) == ""


def test_a_step_told_twice_is_our_mistake(tmp_path: Path) -> None:
    with Progress(tmp_path / "metrics.jsonl", 10, 4, start=3, console=plain()) as told:
        told.step(4, {})
        with pytest.raises(AssertionError, match="step 4"):
            told.step(4, {})


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0s"),
        (59.6, "1m00s"),
        (190, "3m10s"),
        (7500, "2h05m"),
        (97200, "1d03h"),
        (math.nan, "?"),
        (math.inf, "?"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_reader_that_goes_ends_no_run(tmp_path: Path) -> None:
    """As with `| head`; rich by itself ends the process with code 1."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom sfumato.report.progress import Progress\n"
        "progress = Progress(Path(sys.argv[1]), 10, 4)\n"
        "for _ in range(3): progress.note('a line')\n"
        "print('whatever else is told', flush=True)\n"
        "print('went on', file=sys.stderr)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "metrics.jsonl")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stderr is not None, "it has no pipes"
    process.stdout.close()
    assert process.stderr.read() == "went on\n" and process.wait(60) == 0


def test_slow_work_has_a_rate() -> None:
    assert [rate_of(rate) for rate in (0.04, 0.333, 66.4, 4321.9)] == ["0.04", "0.333", "66.4", "4,322"]
