"""A loss or gradient that is not finite never reaches the weights, and all ranks judge it alike."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from torch import Tensor

from sfumato.data.batch import Batch, read
from sfumato.engine import engine as engine_module
from sfumato.engine.engine import Engine, binding
from sfumato.engine.scale import LossScale
from sfumato.errors import UserError
from sfumato.mishaps import Mishaps, called
from tests.engine import toys
from tests.engine.ranks import run_ranks
from tests.unit.test_batch_file import check_same, micro_batch

INF = float("inf")
ADAM: dict[str, Any] = {
    "micro_batch_size": 2, "optimizer__name": "adamw", "optimizer__lr": 1e-3,
    "optimizer__schedule": "linear", "ema__enabled": True,
}  # fmt: skip


def infinite_loss(losses: Tensor) -> Tensor:
    """The first sample's loss is infinite; the gradient knows nothing of it."""
    return losses + torch.tensor([INF] + [0.0] * (len(losses) - 1))


def infinite_gradient(losses: Tensor) -> Tensor:
    """The losses are what they were; the first one's gradient is not finite."""
    return torch.cat([losses[:1] + (0 * losses[:1]).sqrt(), losses[1:]])


PLANTS = infinite_loss, infinite_gradient


def batches_of(engine: Engine) -> list[Batch]:
    """This rank's part of a global batch of the samples 0 .. 7; the micro-batches are called by numbers."""
    ranks, micro = engine.ranks, engine.config.micro_batch_size
    firsts = [(m * ranks.world + ranks.rank) * micro for m in range(engine.accumulation)]
    return [replace(micro_batch(), ids=torch.arange(first, first + micro)) for first in firsts]


def attempt(engine: Engine, plant: Any) -> bool:
    """A step whose batch has the fault in rank 1's second micro-batch: its first sample is number 6."""
    applied = False
    for micro, batch in enumerate(batches_of(engine)):
        rows = slice(int(batch.ids[0]), int(batch.ids[-1]) + 1)
        losses = toys.losses_of(engine, rows, engine.step_count, engine.dtype)
        engine.backward(plant(losses) if (engine.ranks.rank, micro) == (1, 1) else losses)
        applied = engine.step()
    return applied


def disturbed(settings: Any) -> dict[str, Any]:
    """Two steps, and two batches between them that are bad and left out."""
    engine = toys.make(settings)
    mishaps = Mishaps(settings, engine.ranks, print, "{}.png".format)
    assert attempt(engine, lambda losses: losses)
    before, verdicts = toys.checkpoint.own_tensors(engine), []
    for plant in PLANTS:
        assert not attempt(engine, plant), "it was applied"
        verdicts.append(mishaps.judge(engine, batches_of(engine)))
        after = toys.checkpoint.own_tensors(engine)
        assert all(torch.equal(before[key], after[key]) for key in before), "it changed something"
    assert attempt(engine, lambda losses: losses)
    at = engine.step_count, engine.position, mishaps.metrics(engine), engine.lr
    return {"verdicts": verdicts, "left_out": engine.left_out, "at": at,
            "tensors": toys.checkpoint.own_tensors(engine)}  # fmt: skip


def both(every: list[Any]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each run with the bad batches, and half of them without."""
    found = []
    for settings in every:
        half = (settings.engine.zero_stage < 2) == (settings.engine.precision == "fp32")
        found.append((disturbed(settings), toys.run(settings, 2) if half else None))
    return found


CELLS = [(stage, precision) for precision in ("fp32", "bf16") for stage in range(4)]
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], tuple[Any, Results, Results]]:
    """Every cell on two ranks: its config, the ranks' results with the bad batches, and without."""
    folder = tmp_path_factory.mktemp("runs")
    every = [
        toys.config(engine__zero_stage=stage, engine__precision=precision, output=str(folder),
                    name=f"{precision}-{stage}", bad_numbers__policy="skip", **ADAM)
        for stage, precision in CELLS
    ]  # fmt: skip
    ranks = run_ranks(both, 2, every, timeout=400)
    found = [
        (settings, [rank[cell][0] for rank in ranks], [rank[cell][1] for rank in ranks])
        for cell, settings in enumerate(every)
    ]
    return dict(zip(CELLS, found, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_neither_a_loss_nor_a_gradient_moves_a_weight(cells: Any, cell: tuple[int, str]) -> None:
    """Two bad batches at stages 0 to 3: every weight, state and average ends as without them."""
    settings, results, undisturbed = cells[cell]
    for result in results:
        assert result["verdicts"] == ["leave out"] * 2
        # T16: what was left out does not count, so the rate goes on where it was.
        assert result["at"] == (2, 4, {"overflows": 0, "left_out": 2}, pytest.approx(1e-3 * (1 - 1 / 100)))
        assert result["left_out"] == [
            {"position": position, "batches": 1, "samples": [*range(8)]} for position in (1, 2)
        ]
    for kind in ("weight", "ema", "exp_avg") if undisturbed[0] is not None else ():
        assert toys.distance(toys.joined(results, kind), toys.joined(undisturbed, kind)) == 0
    check_written(settings.folder / "bad" / called(1, 1), [INF] + [None] * 7)
    check_written(settings.folder / "bad" / called(1, 2), [None] * 8)


def check_written(folder: Path, losses: list[float | None]) -> None:
    """What lies in a bad batch's folder; losses: of samples 6, 0, 1 .. where they are not finite."""
    facts = json.loads((folder / "batch.json").read_text())
    samples = {sample["id"]: sample for sample in facts["samples"]}
    assert sorted(samples) == [*range(8)] and samples[3]["name"] == "3.png"
    for number, loss in zip((6, 0, 1, 2, 3, 4, 5, 7), losses, strict=True):
        told = float(samples[number]["loss"])
        assert (loss is None and math.isfinite(told)) or told == loss, f"sample {number} has the loss {told}"
    for rank in range(2):
        for micro, batch in enumerate(read(folder / f"rank-{rank:05d}.safetensors")):
            first = (micro * 2 + rank) * 2
            check_same(batch, replace(micro_batch(), ids=torch.arange(first, first + 2)))


def unbound(settings: Any) -> tuple[bool, bool]:
    """Whether the weights move if one of two things binds the gradient to the loss, and if none does."""
    engine = toys.make(settings)
    engine.binding.remove()
    one = attempt(engine, infinite_loss)
    engine_module.binding = lambda losses: losses  # type: ignore[assignment]
    return one, attempt(engine, infinite_loss)


def test_catches_a_gradient_that_does_not_know_of_the_loss() -> None:
    assert run_ranks(unbound, 2, toys.config(**ADAM)) == [(False, True)] * 2


def test_binding_changes_no_bit_of_what_is_finite() -> None:
    losses = torch.tensor([0.0, 1e-45, 0.3, 1 / 3, 3e38, -2.5], requires_grad=True)
    (bound := binding(losses)).sum().backward()
    assert losses.grad is not None
    assert torch.equal(bound, losses) and torch.equal(losses.grad, torch.ones(6))
    wrong = torch.tensor([INF, -INF, float("nan")], requires_grad=True)
    binding(wrong).sum().backward()
    assert wrong.grad is not None and wrong.grad.isnan().all()


def test_in_bf16_too() -> None:
    """0 times a loss is 0 in every format, and 1 is exact in each."""
    losses = torch.randn(1000).bfloat16().abs()
    assert torch.equal(binding(losses), losses)


def scaler(**changes: Any) -> Any:
    """DeepSpeed's own, as its fp16 optimizers make it."""
    settings = {"init_scale": 2.0**4, "scale_window": 1000, "min_scale": 1.0, "delayed_shift": 1,
                "consecutive_hysteresis": False}  # fmt: skip
    return CreateLossScaler(torch.half, 1.0, True, settings | changes)


def overflowing(judge: Any, engine: Engine, losses: list[float]) -> list[Any]:
    """A batch that overflows at every scale: what is said of each attempt, and the scale then."""
    found = []
    while True:
        engine.scale.remember()
        engine.scale.scaler.update_scale(True)
        engine.losses = [torch.tensor(losses[:2]), torch.tensor(losses[2:])]
        try:
            verdict = judge(engine, batches_of(engine))
        except UserError as error:
            verdict = str(error)
        found.append((verdict, engine.scale.scaler.cur_scale))
        if verdict != "again":
            return found


def scenarios(folder: str) -> dict[str, Any]:
    """What is judged of one engine with several scalers and policies."""
    engine = toys.make(toys.config(micro_batch_size=2, engine__zero_stage=0))
    good, bad = [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, INF if engine.ranks.rank else 0.3, 0.4]
    told: list[str] = []
    found: dict[str, Any] = {"told": told}

    def start(name: str, policy: str, at: int = 7, limit: int = 10, **changes: Any) -> Any:
        engine.scale = LossScale(scaler(**changes))
        engine.step_count = engine.position = at
        engine.left_out, engine.overflows = [], 0
        settings = toys.config(
            micro_batch_size=2, output=folder, name=name, bad_numbers={"policy": policy, "limit": limit}
        )
        return Mishaps(settings, engine.ranks, told.append, "{}.png".format).judge

    judge = start("skip", "skip")
    found["skip"] = overflowing(judge, engine, good), engine.overflows, engine.position
    found["next"] = overflowing(judge, engine, good)[0]
    found["collapsed"] = overflowing(start("collapsed", "skip", init_scale=1.0), engine, good)
    found["loss"] = overflowing(start("loss", "skip"), engine, bad), engine.overflows
    found["stop"] = overflowing(start("stop", "stop"), engine, bad)
    judge = start("limit", "skip", limit=2)
    found["limit"] = [overflowing(judge, engine, bad)[-1][0] for _ in range(3)]
    judge = start("back", "rollback", at=9)
    found["back"] = overflowing(judge, engine, bad)[-1][0]
    engine.step_count = engine.position = 5  # as after the load of a checkpoint
    judge.__self__.went_back(engine)
    found["gone back"] = engine.position, engine.left_out
    found["raised"], found["kept"] = at_the_floor()
    return found


def despite_overflow(settings: Any, steps: int) -> tuple[int, int, int, float, float]:
    """In fp16, as the loop does it: steps, then a bad loss. Counts, and the scale before it and after."""
    engine = toys.make(settings)
    judge = Mishaps(settings, engine.ranks, print).judge
    while engine.step_count < steps:
        while not attempt(engine, None):
            assert judge(engine, batches_of(engine)) == "again"
    before = engine.scale.scaler.cur_scale
    for micro, batch in enumerate(batches_of(engine)):
        rows = slice(int(batch.ids[0]), int(batch.ids[-1]) + 1)
        losses = toys.losses_of(engine, rows, 0, engine.dtype)
        engine.backward(losses + (float("inf") if micro == 0 else 0.0))
        engine.step()
    assert judge(engine, batches_of(engine)) == "leave out"
    return engine.step_count, engine.position, engine.overflows, before, engine.scale.scaler.cur_scale


def at_the_floor() -> tuple[str, float]:
    """What DeepSpeed's scaler says of an overflow at its smallest scale, and what it becomes with us."""
    kept = LossScale(scaler(init_scale=1.0)).scaler
    kept.update_scale(True)
    try:
        scaler(init_scale=1.0).update_scale(True)
    except Exception as error:
        return str(error), kept.cur_scale
    return "", kept.cur_scale


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    first, second = run_ranks(scenarios, 2, str(folder))
    for name in first.keys() - {"told"}:
        assert first[name] == second[name], f"the ranks judge {name} differently"
    return first | {"folder": folder}


def test_fp16_tries_again_until_the_scale_can_fall_no_more(judged: dict[str, Any]) -> None:
    attempts, overflows, position = judged["skip"]
    assert [verdict for verdict, _ in attempts] == ["again"] * 4 + ["leave out"]
    assert [scale for _, scale in attempts] == [8, 4, 2, 1, 16], "the next batch starts where this one did"
    assert (overflows, position) == (4, 8)
    assert judged["next"] == ("again", 8), "a new batch falls from there anew"


def test_a_loss_that_is_not_finite_is_no_overflow(judged: dict[str, Any]) -> None:
    assert judged["loss"] == ([("leave out", 16)], 0), "no scale makes it good, and it leaves none behind"


def test_a_collapsed_scale_stops_the_run_with_advice(judged: dict[str, Any]) -> None:
    [(message, scale)] = judged["collapsed"]
    assert "fp16 cannot hold these gradients" in message and "bf16" in message and scale == 1


def test_stop_names_the_samples_and_how_to_look_at_them(judged: dict[str, Any]) -> None:
    [(message, scale)] = judged["stop"]
    folder = judged["folder"] / "stop" / "bad" / "step-000007"
    assert "step 7 on batch 7" in message and "1 of 8 samples: 6.png (inf)" in message and scale == 16
    assert f"sfumato replay {folder}" in message and (folder / "batch.json").is_file()


def test_no_more_batches_are_left_out_than_the_limit(judged: dict[str, Any]) -> None:
    *left_out, message = judged["limit"]
    assert left_out == ["leave out"] * 2 and "bad_numbers.limit" in message
    assert any("2 of at most 2" in line for line in judged["told"])


def test_rollback_goes_on_behind_the_batch(judged: dict[str, Any]) -> None:
    assert judged["back"] == "back"
    position, left_out = judged["gone back"]
    assert position == 10 and left_out == [{"position": 5, "batches": 5, "samples": [*range(8)]}]


def test_deepspeeds_scaler_would_end_the_process_at_its_floor(judged: dict[str, Any]) -> None:
    """Broken: without us, an overflow at the smallest scale raises in the middle of a step."""
    assert "already at minimum" in judged["raised"] and judged["kept"] == 1
