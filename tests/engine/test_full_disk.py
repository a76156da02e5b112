"""A disk that runs full while a run saves, a real one: a small tmpfs."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sfumato.engine import checkpoint
from sfumato.errors import UserError
from tests.engine import runs
from tests.engine.ranks import RankError, run_ranks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, metrics: Path, step: int) -> None:
    """Once a step is told, write until there is no room."""
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        time.sleep(0.005)
    with suppress(OSError), (disk / "somebody elses").open("wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass


def train_beside_another(values: dict[str, Any], disk: Path, step: int) -> None:
    """Train while somebody fills the disk."""
    metrics = Path(values["output"]) / values["name"] / "metrics.jsonl"
    if os.environ["RANK"] == "0":
        threading.Thread(target=fill, args=(disk, metrics, step), daemon=True).start()
    runs.train_here(values)


def test_a_disk_that_is_full_costs_no_checkpoint(disk: Path, tmp_path: Path) -> None:
    """What was saved stays, the run says what to do at its end; with room the same command goes on."""
    runs.write_model("sd", tmp_path / "sd")
    runs.write_pictures(tmp_path / "pictures")
    values = runs.settings(
        tmp_path, steps=9, checkpoint__every=3, checkpoint__export=False, micro_batch_size=1
    ) | {"output": str(disk / "runs")}
    with pytest.raises(RankError) as caught:
        run_ranks(train_beside_another, 2, values, disk, 4, timeout=120)
    told = str(caught.value.error)
    assert isinstance(caught.value.error, UserError), caught.value
    assert "are needed" in told and "are free" in told and ("No space left" in told or "full" in told)
    folder = disk / "runs" / "run" / "checkpoints"
    (left,) = (path.name for path in folder.iterdir())
    assert left in ("step-000003", "step-000006") and not checkpoint.Saved(folder / left).problems()
    # Before it starts it says so too.
    with pytest.raises(RankError, match="make room"):
        run_ranks(runs.train_here, 2, values, timeout=120)

    (disk / "somebody elses").unlink()
    run_ranks(runs.train_here, 2, values, timeout=120)
    assert checkpoint.steps_in(folder)[-1] == 9 and not checkpoint.Saved(folder / "step-000009").problems()
    assert [m["step"] for m in runs.metrics(folder.parent)] == [*range(1, 10)]
