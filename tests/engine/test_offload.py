"""A run whose optimizer or weights wait in the host's memory is the run that moves nothing."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import groups

from sfumato.config import parse
from sfumato.engine import agreement, checkpoint, shards
from sfumato.engine.cells import check_cells
from sfumato.engine.ds_keys import deepspeed_faults
from sfumato.errors import UserError
from tests.engine import toys
from tests.engine.ranks import run_ranks

ADAM: dict[str, Any] = {
    "optimizer__name": "adamw", "optimizer__lr": 1e-2, "optimizer__max_grad_norm": 0.5, "ema__enabled": True,
}  # fmt: skip
STEPS = 2
AWAY = {"engine__offload_optimizer": "cpu"}
CELLS: dict[str, dict[str, Any]] = {
    **{f"{stage} here": {"engine__zero_stage": stage} for stage in (1, 2, 3)},
    **{f"{stage} away": {"engine__zero_stage": stage, **AWAY} for stage in (1, 2, 3)},
    "3 all away": {"engine__zero_stage": 3, **AWAY, "engine__offload_parameters": "cpu"},
}
NEIGHBOURS = {"zero_optimization": {"zero_hpz_partition_size": 2}}


def settings(cell: str, **changes: Any) -> Any:
    """Two micro-batches a step on any number of ranks."""
    micro = toys.GLOBAL // 2 // int(os.environ["WORLD_SIZE"])
    return toys.config(**ADAM, **CELLS[cell], micro_batch_size=micro, **changes)


def trained(place: Path, cell: str, resume: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Two steps, saved after the first; a batch that is not finite is tried before the last one."""
    engine = toys.make(settings(cell, **changes))
    told: dict[str, Any] = {"loss": [], "norm": []}
    if resume is not None:
        checkpoint.load(engine, checkpoint.Saved(resume))
    while engine.step_count < STEPS:
        assert toys.one_step(engine, engine.step_count)
        metrics = engine.metrics()
        told["loss"].append(metrics["loss"])
        told["norm"].append(metrics["grad_norm"])
        agreement.check(engine)
        if engine.step_count == STEPS - 1 and resume is None:
            told["path"] = checkpoint.save(engine, place / cell.replace(" ", "-"), {}, keep=2)
            told["left"] = bad_batch(engine)
    return told | {"tensors": checkpoint.own_tensors(engine), "drawn": drawn(engine)}


def bad_batch(engine: Any) -> float:
    """How far the weights went by a gradient that is not finite."""
    before = checkpoint.own_tensors(engine)
    for m in range(engine.accumulation):
        micro = engine.config.micro_batch_size
        rows = slice(m * micro, (m + 1) * micro)
        losses = toys.losses_of(engine, rows, 9, engine.dtype)
        engine.backward(losses * (torch.inf if m == 0 and engine.ranks.first else 1))
        assert not engine.step(), "it was applied"
    after = checkpoint.own_tensors(engine)
    assert before.keys() == after.keys()
    return max(float((before[key] - after[key]).abs().max()) for key in before)


def drawn(engine: Any) -> tuple[float, float, float]:
    """The module's answer with the weights, with their average, and with the weights again."""

    def answer() -> float:
        with engine.drawing() as net:
            return float(toys.losses_of(net, slice(0, 2), 0, engine.dtype).sum())

    first = answer()
    with engine.averaged():
        averaged = answer()
    return first, averaged, answer()


def everything(folder: str) -> dict[str, Any]:
    """All cells of one number of ranks; of two, each gone on with in the cell beside it."""
    place = Path(folder)
    found = {cell: trained(place, cell) for cell in CELLS}
    if os.environ["WORLD_SIZE"] == "1":
        return found  # what is whole there was read from two ranks' parts, which is the harder half
    names = [*CELLS]
    for cell, other in zip(names, names[3:] + names[:3], strict=True):
        found[f"{cell} then {other}"] = trained(place, other, found[cell]["path"])
    with_neighbours = {"engine__deepspeed": NEIGHBOURS}
    found["neighbours"] = trained(place, "3 here", **with_neighbours)
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed makes it once in a process
    then = trained(place, "3 here", found["3 here"]["path"], **with_neighbours)
    found["3 here then neighbours"] = then
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    forget, shards.forget_second_copies = shards.forget_second_copies, lambda engine: None
    found["broken neighbours"] = trained(place / "broken", "3 here", **with_neighbours)
    shards.forget_second_copies = forget
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    found["neighbours then 3 here"] = trained(place, "3 here", found["neighbours"]["path"])
    right = shards.refresh
    shards.refresh = lambda engine: None
    found["broken"] = trained(place, "2 away", found["2 away"]["path"])
    shards.refresh = right
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(everything, 2, str(tmp_path_factory.mktemp("offload-2")), timeout=280)


@pytest.fixture(scope="module", params=[1, 2])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if request.param == 2:
        return request.getfixturevalue("two")  # type: ignore[no-any-return]
    return run_ranks(everything, 1, str(tmp_path_factory.mktemp("offload-1")), timeout=280)


@pytest.mark.parametrize("cell", ["1 away", "2 away", "3 away", "3 all away"])
def test_what_is_moved_away_changes_no_number(found: list[dict[str, Any]], cell: str) -> None:
    toys.check_same(found, cell, f"{cell[0]} here", last=STEPS)


@pytest.mark.parametrize("cell", CELLS)
def test_an_average_takes_its_turn_and_leaves_everything(found: list[dict[str, Any]], cell: str) -> None:
    for rank in found:
        first, averaged, again = rank[cell]["drawn"]
        assert first == again != averaged


@pytest.mark.parametrize("cell", CELLS)
def test_a_bad_batch_moves_nothing(found: list[dict[str, Any]], cell: str) -> None:
    assert {rank[cell]["left"] for rank in found} == {0.0}


def test_a_run_goes_on_wherever_it_lies(two: list[dict[str, Any]]) -> None:
    names = [name for name in two[0] if " then " in name]
    assert len(names) == len(CELLS) + 2
    for name in names:
        toys.check_same(two, name, name.split(" then ")[0], last=1)


def test_catches_weights_that_are_not_brought_back(two: list[dict[str, Any]]) -> None:
    with pytest.raises(AssertionError):
        toys.check_same(two, "broken", "2 away", last=1)


def test_a_second_copy_among_neighbours_changes_no_number(two: list[dict[str, Any]]) -> None:
    """The first backward pass, and that after an average's turn, read there the weights of the step."""
    toys.check_same(two, "neighbours", "3 here", last=STEPS)
    with pytest.raises(AssertionError):
        toys.check_same(two, "broken neighbours", "3 here", last=STEPS)


@pytest.mark.parametrize(
    ("engine", "what"),
    [
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, "zero_stage = 1"),
        ({"zero_stage": 2, "offload_parameters": "cpu"}, "zero_stage = 3"),
        ({"zero_stage": 2, "deepspeed": NEIGHBOURS}, "zero_stage = 3"),
        (
            {"zero_stage": 3, "deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 3}}},
            "one machine",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_read(engine: dict[str, Any], what: str) -> None:
    values = toys.config().model_dump() | {"engine": engine}
    with pytest.raises(UserError) as error:
        check_cells(parse(values), 4, "cpu")
    assert what in error.value.do


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "half precision"),
        ({"bf16": {"bf16_optimizer_states": True}}, "half precision"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "keeps no averages"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "engine.offload_optimizer decides"),
        ({"zero_optimization": {"offload_param": {"pin_memory": False}}}, "engine.pin_memory decides"),
    ],
)
def test_deepspeeds_own_keys_for_it_are_ours(keys: dict[str, Any], why: str) -> None:
    [fault] = deepspeed_faults(keys)
    assert why in fault.found


def test_why_a_half_precision_weight_stays_where_it_is() -> None:
    """The reason that the refusal gives: a step of a fine-tune is less than half a digit of it."""
    weight, step = torch.full((1,), 0.05), 1e-5
    assert weight - step != weight
    assert torch.equal(weight.bfloat16() - torch.tensor(step).bfloat16(), weight.bfloat16())
