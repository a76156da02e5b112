"""Trackers are told what metrics.jsonl is told, through their own packages; none ends a run."""

import importlib
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sfumato.config import Config, parse
from sfumato.errors import UserError
from sfumato.report import trackers
from sfumato.report.trackers import Trackers
from tests.engine.ranks import run_ranks


def config(place: Path, *names: str, **log: Any) -> Config:
    found = parse(
        {
            "steps": 100,
            "batch_size": 1,
            "output": str(place),
            "model": {"weights": "somewhere/else"},
            "data": {"source": "pictures"},
            "environment": {"NCCL_DEBUG": "of mine"},
            "log": {"trackers": names, "offline": True} | log,
        }
    )
    found.folder.mkdir(parents=True, exist_ok=True)
    return found


def record(step: int) -> dict[str, Any]:
    return {
        "step": step, "time": time.time(), "loss": 1 / step, "spike": False, "grad_norm": None,
        "loss_by_timestep": [0.5, None, 0.25, 1.0], "bucket": {"64x96": 2}, "samples": [3, 4],
    }  # fmt: skip


def start(asked: Config, before: int, steps: int) -> list[str]:
    """One start of a run: lines of steps, previews of every second one. What the console was told."""
    told = list[str]()
    followers = Trackers(asked, told.append, before)
    for step in range(before + 1, before + steps + 1):
        followers.log(record(step))
        if step % 2 == 0:
            folder = asked.folder / "images" / f"step-{step:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6), (step, 0, 0)).save(folder / "000-a-cat.png")
    followers.close()
    return told


def needs(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the package {name} is not installed")


def test_scalars_are_the_numbers_of_a_line() -> None:
    found = trackers.scalars(record(4))
    assert found.pop("time") > 0
    assert found == {
        "step": 4.0, "loss": 0.25, "spike": 0.0, "loss_by_timestep/1": 0.5, "loss_by_timestep/3": 0.25,
        "loss_by_timestep/4": 1.0, "bucket/64x96": 2.0,
    }  # fmt: skip


def test_a_copy_of_previews_is_none_of_ours(tmp_path: Path) -> None:
    for name in ("step-1000000", "step-000002", "step-000002 copy 2", "step-x1", "step-"):
        (tmp_path / "images" / name).mkdir(parents=True)
    assert [trackers.number_of(folder) for folder in trackers.folders(tmp_path)] == [2, 1_000_000]


def test_settings_tell_no_path_and_no_variable(tmp_path: Path) -> None:
    found = trackers.settings(config(tmp_path))
    assert found["optimizer.lr"] == 1e-5 and found["steps"] == 100
    assert not any(str(tmp_path) in str(value) or "of mine" in str(value) for value in found.values())


def check_tensorboard(asked: Config) -> None:
    """Two starts, and steps 5 and 6 told again: each step once, with the images and the settings."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert start(asked, 0, 6) == [] and start(asked, 4, 4) == []
    read = EventAccumulator(str(asked.folder / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == [*range(1, 9)], "a step is told twice, or none"
    assert read.Scalars("loss_by_timestep/3")[0].value == 0.25
    assert {event.step for event in read.Images("000-a-cat")} == {2, 4, 6, 8}
    assert read.Images("000-a-cat")[0].width == 8
    assert "settings/text_summary" in read.Tags()["tensors"]


def test_tensorboard(tmp_path: Path) -> None:
    needs("tensorboard")
    check_tensorboard(config(tmp_path, "tensorboard"))


def test_tensorboard_catches_a_start_that_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("tensorboard")
    from sfumato.report.trackers import tensorboard

    real = tensorboard.SummaryWriter
    monkeypatch.setattr(tensorboard, "SummaryWriter", lambda place, purge_step: real(place))
    with pytest.raises(AssertionError, match="twice"):
        check_tensorboard(config(tmp_path, "tensorboard"))


def test_wandb_offline_goes_on_with_its_run(tmp_path: Path) -> None:
    needs("wandb")
    asked = config(tmp_path, "wandb", project="paintings")
    assert start(asked, 0, 3) == []
    known = trackers.kept(asked.folder)["wandb"]
    assert start(asked, 3, 2) == []
    assert trackers.kept(asked.folder)["wandb"] == known
    files = sorted((asked.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{known}.wandb"}, files
    told = files[0].read_bytes()
    assert b"paintings" in told and b"loss_by_timestep/3" in told and b"of mine" not in told


def test_mlflow_in_a_file_goes_on_with_its_run(tmp_path: Path) -> None:
    needs("mlflow")
    needs("sqlalchemy")
    from mlflow import MlflowClient

    asked = config(tmp_path, "mlflow")
    assert start(asked, 0, 3) == [] and start(asked, 3, 2) == []
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    known = trackers.kept(asked.folder)["mlflow"]
    assert [each.step for each in client.get_metric_history(known, "loss")] == [1, 2, 3, 4, 5]
    assert client.get_run(known).data.params["optimizer.lr"] == "1e-05"
    assert [file.path for file in client.list_artifacts(known, "previews")] == [
        f"previews/step-{step:06d}" for step in (2, 4)
    ]


def test_trackio_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    asked = config(tmp_path, "trackio")
    assert start(asked, 0, 3) == []
    known = trackers.kept(asked.folder)["trackio"]
    assert start(asked, 3, 2) == [] and trackers.kept(asked.folder)["trackio"] == known


class Failing:
    """A tracker whose disk is full from the second line on."""

    id = "1"

    def __init__(self) -> None:
        self.steps = list[int]()

    def log(self, step: int, scalars: Any) -> None:
        if step > 1:
            raise OSError(28, "No space left on device")
        self.steps.append(step)

    def images(self, step: int, files: Any) -> None:
        raise AssertionError("it was asked again")

    back_to = images  # type: ignore[assignment]

    def close(self) -> None:
        raise AssertionError("it was asked again")


def test_pictures_of_a_step_that_was_undone_end_no_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Opening(Failing):
        def images(self, step: int, files: Any) -> None:
            for file in files:
                if step == 2:
                    file.unlink()  # as a rollback does
                file.read_bytes()

        def log(self, step: int, scalars: Any) -> None:
            self.steps.append(step)

        def close(self) -> None: ...

    tracker = Opening()
    monkeypatch.setattr(trackers, "begin", lambda *told: tracker)
    assert start(config(tmp_path, "tensorboard"), 0, 6) == [] and tracker.steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("when", ["begin", "log"])
def test_one_that_fails_is_told_once_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def begin(name: str, config: Config, step: int) -> Any:
        if when == "begin":
            raise ConnectionError("no network\nat all")
        return Failing()

    monkeypatch.setattr(trackers, "begin", begin)
    told = start(config(tmp_path, "tensorboard"), 0, 6)
    why = "no network" if when == "begin" else "[Errno 28] No space left on device"
    assert told == [f"tensorboard failed and is told no more; training goes on: {why}"]


def test_one_that_hangs_delays_no_step_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    free = threading.Event()

    def begin(name: str, config: Config, step: int) -> Any:
        free.wait(30)
        raise ConnectionError("late")

    monkeypatch.setattr(trackers, "begin", begin)
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    monkeypatch.setattr(trackers, "WAITING", 3)
    told = start(config(tmp_path, "tensorboard"), 0, 6)
    assert not free.is_set(), "it was waited for"
    assert told == [
        "the trackers are too slow; they are not told of every step",
        "the trackers did not take all within 0 s; the run ends without them",
    ]
    free.set()


def test_a_missing_package_is_refused_with_its_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sfumato\[mlflow\]'"):
        trackers.check(config(tmp_path, "mlflow"))
    trackers.check(config(tmp_path))


def test_wandb_online_without_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="wandb login"):
        trackers.check(config(tmp_path, "wandb", offline=False))
    trackers.check(config(tmp_path, "wandb"))


def of_trackers() -> list[str]:
    names = ("tensorboard", "wandb", "trackio", "mlflow", "torch.utils.tensorboard")
    return [name for name in names if name in sys.modules]


def imported(also: list[str]) -> tuple[list[str], list[str]]:
    """Of the trackers' packages, what a process has that can train, and what it has with others imported."""
    assert {"sfumato.train", "sfumato.report.trackers"} <= sys.modules.keys()
    before = of_trackers()
    for name in also:
        importlib.import_module(name)
    return before, of_trackers()


def test_none_is_imported_that_is_not_named() -> None:
    """In a process of the fork server, which has imported sfumato.train and more."""
    also = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    assert run_ranks(imported, 1, also, init=False) == [([], also)]


def test_each_adapter_is_short() -> None:
    for file in Path(trackers.__file__).parent.glob("*.py"):
        assert file.stem == "__init__" or len(file.read_text().splitlines()) < 60, file
