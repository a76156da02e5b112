"""What a run holds in the host's memory beside its numbers: no files of weights, no copies in its workers."""

from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from sfumato import train as loop
from sfumato.bench.gates.paper import replaced
from sfumato.engine.engine import Engine
from sfumato.engine.weights import WeightFiles
from tests.engine import runs
from tests.engine.ranks import run_ranks


def mapped(folder: str) -> list[str]:
    """Files below a folder whose pages are memory of this process."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    return sorted({line[5] for line in lines if len(line) > 5 and line[5].startswith(folder)})


def looked_at(place: str, kind: str, closes: bool) -> dict[str, Any]:
    """A run of a step: its workers when there are no weights yet, and the model's files open as it trains."""
    runs.without_exports()
    found: dict[str, Any] = {}
    build, step, close = Engine.__init__, loop.optimizer_step, WeightFiles.close
    values = runs.settings(Path(place), name=f"{kind}-{closes}", steps=1, data__workers=1)

    def built(*told: Any) -> None:
        found["workers"] = len(active_children())
        build(*told)

    def stepped(*told: Any) -> bool:
        found.setdefault("files", mapped(f"{place}/sd/unet"))
        return step(*told)

    def closed(files: WeightFiles) -> None:
        found["before"] = mapped(f"{place}/sd/unet")
        if closes:
            close(files)

    with (
        replaced(Engine, "__init__", built),
        replaced(loop, "optimizer_step", stepped),
        replaced(WeightFiles, "close", closed),
    ):
        runs.train_here(values | {"method": {"kind": kind}})
    return found


def looks(place: str) -> dict[str, dict[str, Any]]:
    """All that a rank does, in one start."""
    told = {kind: looked_at(place, kind, closes=True) for kind in ("full", "lora")}
    return told | {"broken": looked_at(place, "full", closes=False)}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    place = runs.write_place(tmp_path_factory.mktemp("memory"), "sd")
    return run_ranks(looks, 1, str(place), timeout=280)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_no_file_of_weights_is_open_while_it_trains(told: dict[str, dict[str, Any]], kind: str) -> None:
    assert told[kind]["before"] and not told[kind]["files"]


def test_catches_files_that_stay_open(told: dict[str, dict[str, Any]]) -> None:
    assert told["broken"]["files"]


def test_workers_begin_before_there_are_weights(told: dict[str, dict[str, Any]]) -> None:
    assert all(found["workers"] == 1 for found in told.values())
