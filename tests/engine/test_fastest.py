"""engine.attention = "fastest" in real runs: one choice for all ranks, which a run keeps."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sfumato import start
from sfumato.engine.published import checkpoints_in, read_manifest
from sfumato.errors import UserError
from sfumato.models import fastest
from sfumato.models.fastest import PLAIN, Work
from tests.engine import runs
from tests.engine.ranks import run_ranks
from tests.engine.test_training import check_same_bits

PLAINLY = {"native": 2.0, PLAIN: 1.0}
USUALLY = {"native": 1.0, PLAIN: 2.0}


def everything(place: str) -> dict[str, Any]:
    """Runs of two ranks in one go and in two, between which the times change; and one whose kernel fails."""
    import torch.distributed as dist

    runs.without_exports()
    right, tried, found = start.with_kernels, start.try_kernels, dict[str, Any]()

    def told(name: str, steps: int, seconds: dict[str, float]) -> None:
        def timed(kernel: str, work: Work, *_: Any) -> float:
            assert dist.get_rank() == 0, "each rank for itself"
            return seconds.get(kernel, 3.0) if work.keys == 77 else 1.0

        fastest.timed = timed
        values = runs.settings(Path(place), name=name, steps=steps, engine__attention="fastest")
        run = runs.train_here(values | {"checkpoint": {"every": 2, "export": False}}).parent
        state = read_manifest(checkpoints_in(run)[-1])
        resolved = json.loads((run / "resolved.json").read_text())
        kernels = state["config"]["engine"]["attention"], resolved["engine"]["attention"]
        found[name] = kernels, runs.tensors_of(run)

    told("straight", 4, PLAINLY)
    told("first", 2, PLAINLY)
    if dist.get_rank() == 0:
        for name in ("resumed", "broken", "moved"):
            shutil.copytree(Path(place) / "runs/first", Path(place) / "runs" / name)
    dist.barrier()
    told("resumed", 4, USUALLY)
    start.with_kernels = lambda config, plan, place, saved: right(config, plan, place, None)
    told("broken", 4, USUALLY)
    start.with_kernels = right

    def gone(kernels: Any, *rest: Any) -> None:
        if kernels:
            raise UserError(PLAIN, "this machine has it not", "take another")
        tried(kernels, *rest)

    start.try_kernels = gone
    told("moved", 4, USUALLY)
    start.try_kernels = tried
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = runs.write_place(tmp_path_factory.mktemp("fastest"), "sd")
    return run_ranks(everything, 2, str(place), timeout=280)[0]  # type: ignore[no-any-return]


def test_the_choice_is_in_the_runs_records_and_in_its_checkpoints(found: dict[str, Any]) -> None:
    saved, resolved = found["straight"][0]
    assert saved == resolved and {kind.rpartition(".")[2] for kind in saved} == {"attn2"}
    assert set(saved.values()) == {PLAIN}


def test_a_run_that_goes_on_keeps_its_kernels_and_is_the_same_to_the_bit(found: dict[str, Any]) -> None:
    assert found["resumed"][0] == found["straight"][0]
    check_same_bits(found["resumed"][1], found["straight"][1])


def test_catches_a_run_that_chooses_anew(found: dict[str, Any]) -> None:
    assert found["broken"][0] == ({}, {})
    with pytest.raises(AssertionError, match="differ"):
        check_same_bits(found["broken"][1], found["straight"][1])


def test_where_its_kernels_do_not_work_any_more_it_chooses_anew(found: dict[str, Any]) -> None:
    assert found["moved"][0] == ({}, {})
