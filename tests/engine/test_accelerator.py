"""An NPU as DeepSpeed's accelerator, a stub: the whole loop goes through it and gives the CPU's numbers."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sfumato import config, previews, train
from sfumato.engine import ranks
from sfumato.errors import UserError
from sfumato.objective import Objective, process
from sfumato.objective.constant import Constant
from tests.engine import npu, runs
from tests.engine.ranks import run_ranks

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
VERBS = ("set_device", "device_count", "current_device_name", "communication_backend_name", "pin_memory")
VERBS += ("synchronize", "max_memory_allocated")


def jobs(place: Path, name: str) -> list[dict[str, Any]]:
    """Two steps at ZeRO 1, and the same run on to four at ZeRO 2, with averages, previews and an export."""
    told = {
        "name": name,
        "optimizer__schedule": "constant",
        "checkpoint": {"every": 2},
        "preview": {"prompts": ["a cat"], "every": 2, "steps": 2},
    }
    stages = ({"steps": 2, "engine__zero_stage": 1}, {"steps": 4, "engine__zero_stage": 2})
    return [runs.settings(place, **told, **stage) for stage in stages]


def on_the_npu(values: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs on the stub, in a process of their own; what was asked of it."""
    with npu.plugged_in() as (seam, mode):
        os.environ["LOCAL_RANK"] = "3"  # of a launcher that shows each rank its own device only
        place = ranks.start(60)
        found = {"device": str(place.device), "number": seam.index, "group": dist.get_backend()}
        layouts: Any = torch
        assert layouts.npu.config.allow_internal_format is False
        train.optimizer_step = npu.within(mode, train.optimizer_step)
        previews.preview = npu.within(mode, previews.preview)
        runs.train_all(values)
        return found | {"called": dict(seam.called), "moved": mode.moved, "pinned": mode.pinned}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_place(tmp_path_factory.mktemp("npu"), "sd")


def test_the_whole_loop_on_an_npu_goes_through_the_seam(place: Path) -> None:
    run_ranks(runs.train_all, 1, jobs(place, "cpu"), timeout=200)
    [found] = run_ranks(on_the_npu, 1, jobs(place, "npu"), timeout=200, init=False)
    assert (found["device"], found["number"], found["group"]) == ("npu:0", 0, "hccl")
    called = found["called"]
    assert not [verb for verb in VERBS if not called.get(verb)], called
    assert found["moved"] > 100 and found["pinned"] > 0
    ours, theirs = place / "runs" / "npu", place / "runs" / "cpu"
    lines = runs.metrics(ours)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["device_memory_gib"] == npu.LARGEST / 2**30 for line in lines)
    for line, right in zip(lines, runs.metrics(theirs), strict=True):
        assert line["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)
    for kind in ("weight", "ema"):
        right = runs.tensors_of(theirs, kind)
        for name, value in runs.tensors_of(ours, kind).items():
            torch.testing.assert_close(value, right[name], rtol=1e-3, atol=1e-5)
    assert runs.exported(ours).keys() == runs.exported(theirs).keys()
    assert len([*ours.glob("images/step-*/*.png")]) == len([*theirs.glob("images/step-*/*.png")]) > 1
    assert json.loads((ours / "environment.json").read_text())["device"] == "npu:0"


def refused(devices: int, local: int, supervised: bool) -> str:
    """What a rank is told that has no device."""
    with npu.plugged_in(devices):
        os.environ |= {"LOCAL_RANK": str(local)} | ({"SFUMATO_ERROR_FILE": "x"} if supervised else {})
        with pytest.raises(UserError) as error:
            ranks.start(60)
        return str(error.value)


def test_more_ranks_than_devices_are_refused() -> None:
    text = run_ranks(refused, 1, 2, 3, False, init=False)[0]
    assert "it has 2 devices" in text and "at most 2 ranks" in text
    # Our own launcher hides no device from a rank.
    assert "at most 1 rank here" in run_ranks(refused, 1, 1, 1, True, init=False)[0]


def float64_is_caught() -> list[str]:
    """The objective on the stub, right and with tables that were left in float64; what is said."""
    said = []
    with npu.plugged_in() as (_, mode):
        for table in (Constant, lambda values: Constant(values.double())):
            process.Constant = table
            objective = Objective(config.Objective(), SCHEDULE)
            t = torch.tensor([3, 500]).to("npu")
            latents = torch.ones(2, 4, 8, 8).to("npu")
            try:
                npu.within(mode, objective.process.add_noise)(latents, latents, t)
                said.append("")
            except RuntimeError as error:
                said.append(str(error))
        try:
            torch.linspace(0, 1, 4, dtype=torch.float64, device="npu")
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_a_float64_on_the_device_is_caught() -> None:
    """The guard under which the run above was made sees what it is there for."""
    right, left_in_float64, made_there = run_ranks(float64_is_caught, 1, init=False)[0]
    assert right == "" and "has not" in left_in_float64 and "has not" in made_there
