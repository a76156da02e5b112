"""`engine = "auto"` in real runs: all ranks take the planner's choice, and what it counts lies there."""

import gc
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import groups

from sfumato import cli, train
from sfumato.config import parse
from sfumato.planner.architectures import facts_of
from sfumato.planner.costs import cost_of
from sfumato.planner.fit import memory
from sfumato.planner.ways import way_of
from tests.engine import runs
from tests.engine.ranks import run_ranks

NEIGHBOURS = {"zero_optimization": {"zero_hpz_partition_size": 2}}


def lying_there() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if not t.is_meta}
    return sum(storages.values())


def watched(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train; what each run said and recorded, and what lay in memory after its last step."""
    told, step = list[dict[str, Any]](), train.optimizer_step
    runs.without_exports()
    for values in jobs:
        sizes = list[int]()

        def measured(*given: Any, sizes: list[int] = sizes) -> bool:
            applied = step(*given)
            sizes.append(lying_there())
            return applied

        train.optimizer_step = measured if values is jobs[0] else step
        try:
            with redirect_stdout(io.StringIO()) as said:
                run = runs.train_here(values).parent
        finally:
            train.optimizer_step = step
        resolved = json.loads((run / "resolved.json").read_text())
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed makes it once in a process
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        numbers = [(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]
        told.append({"said": said.getvalue(), "resolved": resolved, "bytes": sizes[-1:], "numbers": numbers})
    return told


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_place(tmp_path_factory.mktemp("auto"), "sd")


@pytest.fixture(scope="module")
def told(place: Path) -> list[list[dict[str, Any]]]:
    """Of each rank: a run that was left to the planner, and its next start, with a stage of the user's."""
    first = runs.settings(place, batch_size=8, steps=2, engine={"auto": True, "precision": "fp32"})
    del first["micro_batch_size"]
    again = {**first, "steps": 3, "engine": {"auto": True, "precision": "fp32", "zero_stage": 3}}
    lora: dict[str, Any] = {"steps": 2, "method": {"kind": "lora", "rank": 4}, "log__every": 1}
    beside = [
        runs.settings(place, name=name, engine__zero_stage=3, engine__deepspeed=keys, **lora)
        for name, keys in (("plain", {}), ("beside", NEIGHBOURS))
    ]
    return run_ranks(watched, 2, [first, again | {"micro_batch_size": 2}, *beside], timeout=280)


def test_all_ranks_take_what_the_planner_recommends(told: list[list[dict[str, Any]]]) -> None:
    resolved = told[0][0]["resolved"]
    engine = resolved["engine"]
    assert engine["auto"] and engine["precision"] == "fp32"
    assert (engine["zero_stage"], engine["gradient_checkpointing"]) == (1, False)
    assert engine["offload_optimizer"] == engine["offload_parameters"] == "none"
    assert resolved["micro_batch_size"] == 4  # all of a rank's share
    assert 'engine = "auto" became ZeRO stage 1, micro-batches of 4' in told[0][0]["said"]
    assert "became" not in told[1][0]["said"]


def test_the_next_start_may_choose_otherwise(told: list[list[dict[str, Any]]]) -> None:
    again = told[0][1]
    assert "goes on from step-000002" in again["said"]
    assert (again["resolved"]["engine"]["zero_stage"], again["resolved"]["micro_batch_size"]) == (3, 2)


def test_frozen_weights_may_have_a_second_copy_among_neighbours(told: list[list[dict[str, Any]]]) -> None:
    """ZeRO++'s hpZ under a LoRA, most of whose weights do not learn: the same bits."""
    plain, beside = told[0][2:]
    assert len(plain["numbers"]) == 2 and plain["numbers"] == beside["numbers"]
    assert beside["resolved"]["engine"]["deepspeed"] == NEIGHBOURS


def test_what_is_counted_lies_there(told: list[list[dict[str, Any]]]) -> None:
    """Weights, states, averages and frozen parts of a whole run after a step; without any of them it fails.

    Beside them lie a batch and the objective's tables.
    """
    config = parse(told[0][0]["resolved"])
    planned = memory(config, 2, cost_of(config, facts_of(config.model), way_of(config), (64, 64)))
    rest = planned.weights + planned.optimizer + planned.ema + planned.frozen
    for rank in told:
        [real] = rank[0]["bytes"]
        assert rest <= real <= 1.08 * rest
        for part in ("weights", "optimizer", "ema", "frozen"):
            assert real > 1.08 * (rest - getattr(planned, part)), f"{part} could be forgotten unseen"


def test_check_says_what_it_became(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "auto.toml"
    file.write_text(
        f'name = "checked"\noutput = "{place}/runs"\nsteps = 2\nbatch_size = 8\nengine = "auto"\n'
        f'[model]\nweights = "{place}/sd"\n[data]\nsource = "{place}/pictures"\nresolution = 64\n'
        f'store = "{place}/cache"\n'
    )
    assert cli.main(["check", str(file), "--gpus", "2"]) == 0
    said = capsys.readouterr().out
    assert "batch  8 = 4 on 2 cpu ranks, 1 time" in said
    assert 'numbers  bf16, ZeRO stage 1, as engine = "auto" chose' in said
