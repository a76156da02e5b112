"""Whole runs: what they leave, that they go on as if never stopped, and that users can load the result."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from sfumato import run
from sfumato.config import parse
from sfumato.data.index import open_index
from sfumato.engine import checkpoint
from sfumato.engine.ranks import Ranks
from sfumato.errors import UserError
from tests.engine import runs, toys
from tests.engine.ranks import as_users_start_it, fork_server, free_port, run_ranks
from tests.unit.test_saved import flip

LIMIT = 150  # seconds for one run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    for family in ("sd", "sdxl"):
        runs.write_model(family, folder / family)
    runs.write_pictures(folder / "pictures")
    return folder


def train(place: Path, world: int = 1, bare: bool = False, **changes: Any) -> Path:
    """Train in ranks of their own, with an export or without; the run's folder."""
    return several(place, world, [changes], bare)[0]


def several(place: Path, world: int, jobs: list[dict[str, Any]], bare: bool = False) -> list[Path]:
    """Some runs one after another in the same ranks, which saves their start; the runs' folders."""
    values = [runs.settings(place, **changes) for changes in jobs]
    run_ranks(runs.train_bare if bare else runs.train_all, world, values, timeout=LIMIT)
    return [Path(table["output"]) / table["name"] for table in values]


def alone(values: dict[str, Any]) -> None:
    """Train in a process group of its own, as a shell starts a command."""
    os.setsid()
    as_users_start_it()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(free_port())
    runs.train_here(values)


def killed_at(step: int, values: dict[str, Any], saved: int | None = None) -> None:
    """Start a run, and kill it with all that it started once `step` was logged and `saved` is on disk."""
    run = Path(values["output"]) / values["name"]
    process = fork_server().Process(target=alone, args=(values,))
    process.start()
    end = time.monotonic() + LIMIT
    there = checkpoint.path_of(run / "checkpoints", saved or 0)
    while not any(m["step"] >= step for m in whole_lines(run)) or not (saved is None or there.exists()):
        assert process.exitcode is None, f"it ended by itself with {process.exitcode}"
        assert time.monotonic() < end, "it did not reach the step in time"
        time.sleep(0.02)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGKILL)
    process.join(10)


def whole_lines(run: Path) -> list[dict[str, float]]:
    try:
        return runs.metrics(run)
    except (ValueError, OSError):  # a line is just being written, or none was yet
        return []


def test_t7_killed_twice_and_resumed_equals_never_stopped_to_the_bit(place: Path) -> None:
    """Once the newest checkpoint is damaged, too: three steps are made again from the one before."""
    changes = {"steps": 7, "checkpoint__every": 2, "checkpoint__export": False, "data__workers": 2}
    straight = train(place, bare=True, name="straight", **changes)
    values = runs.settings(place, name="killed", **changes)
    killed_at(3, values, saved=2)
    killed_at(5, values, saved=4)
    stopped = Path(values["output"]) / "killed"
    spoilt = checkpoint.path_of(stopped / "checkpoints", 4)
    flip(spoilt / "rank-00000.safetensors", 5000)
    train(place, bare=True, name="killed", **changes)
    names = sorted(path.name for path in spoilt.parent.iterdir())
    assert names == ["step-000004.damaged", "step-000006", "step-000007"]
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        check_same_bits(runs.tensors_of(stopped, kind), runs.tensors_of(straight, kind))
    assert [m["step"] for m in runs.metrics(stopped)] == list(range(1, 8))
    assert [m["loss"] for m in runs.metrics(stopped)] == [m["loss"] for m in runs.metrics(straight)]


def check_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, f"{len(differing)} tensors differ, the first: {differing[0]}"


def test_t7_catches_a_resume_that_starts_the_epoch_anew(place: Path) -> None:
    """The same steps over other samples, as when the order begins again after a restart."""
    jobs = [{"name": "order", "steps": 2}, {"name": "other", "steps": 2, "seed": 1}]
    one, other = several(place, 1, jobs, bare=True)
    with pytest.raises(AssertionError, match="differ"):
        check_same_bits(runs.tensors_of(one), runs.tensors_of(other))


def test_one_run_over_other_stages_and_ranks(place: Path) -> None:
    """From every stage and 1, 2 and 4 ranks to another, against stage 0 on one rank: the same curve."""
    straight = train(place, bare=True, name="one", steps=5, engine__zero_stage=0)
    legs = ((4, 1, 1), (2, 3, 1), (1, 2, 2), (2, 0, 1), (1, 1, 2))
    for steps, (world, stage, micro) in enumerate(legs, 1):
        changes = {"steps": steps, "engine__zero_stage": stage, "micro_batch_size": micro}
        moved = train(place, world, bare=True, name="moved", **changes)
    for kind in ("weight", "ema"):
        assert toys.distance(runs.tensors_of(moved, kind), runs.tensors_of(straight, kind)) < 1e-5
    losses = [m["loss"] for m in runs.metrics(moved)]
    assert losses == pytest.approx([m["loss"] for m in runs.metrics(straight)], rel=1e-5)


def test_zero_3_exports_in_bf16_what_zero_1_exports(place: Path) -> None:
    """In fp32 test_checkpoint_export.py compares all stages."""
    results = several(place, 2, [
        {"name": f"bf16-{stage}", "engine__zero_stage": stage, "engine__precision": "bf16", "steps": 2}
        for stage in (1, 3)
    ])  # fmt: skip
    assert toys.distance(runs.exported(results[1]), runs.exported(results[0])) < 1e-3


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_stock_diffusers_draws_with_what_was_trained(place: Path, family: str) -> None:
    left = train(
        place, name=f"drawn-{family}", family=family, steps=2, preview__prompts=("a cat",), preview__steps=2
    )
    start = runs.load_file(place / family / "unet" / "diffusion_pytorch_model.safetensors")
    assert toys.distance(runs.exported(left), start) > 1e-4, "it learned nothing"
    pipeline = DiffusionPipeline.from_pretrained(left / "export", low_cpu_mem_usage=False)
    image = pipeline("a cat", num_inference_steps=2, output_type="pt", height=64, width=64).images
    assert image.shape == (1, 3, 64, 64) and bool(torch.isfinite(image).all())
    assert list((left / "images" / "step-000002").glob("*.png"))


def test_step_counts_and_records(place: Path) -> None:
    """Seven pictures, batches of four in two portions, nine steps: nine lines, nine applied steps."""
    left = train(
        place, 2, True, name="counted", steps=9, micro_batch_size=1, checkpoint__every=4, checkpoint__keep=2
    )
    assert [m["step"] for m in runs.metrics(left)] == list(range(1, 10))
    assert sorted(p.name for p in (left / "checkpoints").iterdir()) == ["step-000008", "step-000009"]
    assert (left / "resolved.json").exists() and (left / "environment.json").exists()
    values = {"name": "counted", "steps": 9, "checkpoint__every": 4}
    alone, told = Ranks(0, 1, torch.device("cpu")), list[str]()
    asked = parse(runs.settings(place, **values))
    data = open_index(asked.data).fingerprint
    saved = run.latest(asked, data, alone, told.append)
    assert saved is not None and saved.step == saved.position == 9 and len(told) == 2, told
    assert told[1] == "changed: micro_batch_size: 1 -> 2" and saved.state["samples"] == 36
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.001 -> 0\.002"):
        run.latest(parse(runs.settings(place, **values, optimizer__lr=2e-3)), data, alone, pytest.fail)


def test_from_scratch_is_the_same_at_every_stage(place: Path) -> None:
    results = several(place, 1, [
        {"name": f"scratch-{stage}", "engine__zero_stage": stage, "model__from_scratch": True, "steps": 2}
        for stage in (1, 3)
    ], bare=True)  # fmt: skip
    assert toys.distance(runs.tensors_of(results[1]), runs.tensors_of(results[0])) < 1e-6
    start = runs.load_file(place / "sd" / "unet" / "diffusion_pytorch_model.safetensors")
    start = {f"unet.{name}": numbers for name, numbers in start.items()}
    assert toys.distance(runs.tensors_of(results[0]), start) > 0.1, "it took the folder's weights"
