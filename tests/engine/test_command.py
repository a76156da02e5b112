"""The whole way at the shell: a run on two ranks is killed, goes on, ends, and its model draws."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from sfumato.cli import main
from sfumato.errors import CONTINUE
from tests.engine.ranks import as_users_start_it, fork_server, run_ranks
from tests.unit import twins

ROOT = Path(__file__).parents[2]
CONFIG = """
name = "whole"
output = "runs"
steps = {steps}
batch_size = 4
[model]
weights = "weights"
[data]
source = "./images"
resolution = 64
[checkpoint]
every = 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with toy weights, eight pictures, and a config that is too long for any test to finish."""
    folder = tmp_path_factory.mktemp("place")
    twins.write("sd", folder / "weights")
    (folder / "images").mkdir()
    for number in range(8):
        Image.new("RGB", (64, 64), (number * 30, 100, 0)).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"number {number}")
    (folder / "run.toml").write_text(CONFIG.format(steps=100_000))
    return folder


STARTED: list[subprocess.Popen[str]] = []
PATIENCE = 240  # seconds; a busy machine with two cores imports torch in a minute


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Leave no command behind, whatever a test finds."""
    yield
    for process in STARTED:
        # A launcher ends its ranks at the second signal; killed, it would leave that to them.
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        process.communicate()
    STARTED.clear()


def sfumato(place: Path, *words: str) -> subprocess.Popen[str]:
    """Start a command as a user would."""
    STARTED.append(start(place, words))
    return STARTED[-1]


def start(place: Path, words: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sfumato", *words],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def checkpoints(place: Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in (place / "runs/whole/checkpoints").glob("step-*"))


def wait_for_checkpoint(place: Path, process: subprocess.Popen[str], after: int) -> None:
    end = time.monotonic() + PATIENCE
    while not [step for step in checkpoints(place) if step > after]:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no checkpoint in {PATIENCE} s"
        time.sleep(0.1)


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that a launcher has started, in order."""
    found = [child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


@pytest.mark.timeout(900)
def test_killed_stopped_resumed_and_drawn(place: Path) -> None:
    first = sfumato(place, "train", "run.toml", "--gpus", "2")
    wait_for_checkpoint(place, first, 0)
    family = psutil.Process(first.pid).children(recursive=True)
    ranks(first)[1].kill()
    _, err = first.communicate(timeout=PATIENCE)
    assert first.returncode == 128 + signal.SIGKILL
    assert "rank 1 of 2 was killed by SIGKILL" in err and "Traceback" not in err
    assert not psutil.wait_procs(family, timeout=60)[1], "a process is left over"

    reached = max(checkpoints(place))
    second = sfumato(place, "train", "run.toml", "--gpus", "2")
    wait_for_checkpoint(place, second, reached)
    second.send_signal(signal.SIGINT)
    _, err = second.communicate(timeout=PATIENCE)
    assert second.returncode == CONTINUE, err
    assert "Traceback" not in err and "SIGTERM came" in err
    assert max(checkpoints(place)) >= reached

    # One rank takes over from two, in one process.
    reached = max(checkpoints(place))
    third = fork_server().Process(target=at_the_shell, args=(place, ["train", "run.toml"]))
    third.start()
    check_ends_with_ctrl_c(third, place, f"step {reached + 1}/")

    reached = max(checkpoints(place))
    [out] = run_ranks(ended, 1, place, reached + 1, init=False)
    assert f"step {reached + 1}/{reached + 1}" in out
    assert (place / "again" / "model_index.json").is_file()

    drawn = sfumato(
        place, "sample", "runs/whole", "a red square", "--size", "64", "--steps", "2", "--seeds", "1", "2"
    )
    out, err = drawn.communicate(timeout=PATIENCE)
    assert drawn.returncode == 0, err
    assert all((place / path).is_file() for path in out.splitlines()) and len(out.splitlines()) == 2


def ended(place: Path, steps: int) -> str:
    """Go on to the end, and export once more; what it said. The shell's part of it is shown by the others."""
    os.chdir(place)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["train", "run.toml", f"steps={steps}"]) == 0
        assert main(["export", "runs/whole", "--to", "again", "--dtype", "bf16"]) == 0
    return said.getvalue()


def at_the_shell(place: Path, words: list[str]) -> None:
    """The command in a process of its own, which has the libraries at hand; it says all in files."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what started the tests may ignore it
    as_users_start_it()
    os.chdir(place)
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), number)
        setattr(sys, f"std{name}", os.fdopen(number, "w", buffering=1, closefd=False))
    sys.exit(main(words))


def check_ends_with_ctrl_c(process: Any, place: Path, line: str) -> None:
    """After its first line, which begins so: it saves, says so, and leaves nothing behind."""
    end, said = time.monotonic() + PATIENCE, list[str]()
    try:
        while not said:
            assert process.exitcode is None and time.monotonic() < end, (place / "err").read_text()
            time.sleep(0.05)
            if (place / "out").exists():
                lines = (place / "out").read_text().splitlines(keepends=True)
                said = [each for each in lines if each.startswith("step ") and each.endswith("\n")]
        assert said[0].startswith(line), said
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 2, "the loader's workers"
        os.kill(process.pid, signal.SIGINT)
        process.join(PATIENCE)
    finally:
        process.kill()
    err = (place / "err").read_text()
    assert process.exitcode == CONTINUE, err
    assert "Traceback" not in err and "which is saved" in err, err
    assert not psutil.wait_procs(family, timeout=60)[1], "a loader worker is left over"
