"""`bench gates`: each gate catches what it is there for, and paper counts what real ranks send."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato import train
from sfumato.bench import gates
from sfumato.bench.gates import exchange, ours, paper
from sfumato.bench.gates.count import Counting, computes
from sfumato.bench.work import Numbers, batch_of, method_of, zeros
from sfumato.config import Config
from sfumato.planner.architectures import facts_of
from tests.engine.ranks import run_ranks
from tests.unit import twins

STAGES = (2, 3)
SIZE = (exchange.SIDE, exchange.SIDE)
real = train.losses_of


def asks(*args: Any) -> Any:
    losses, sums = real(*args)
    assert losses.sum().item() is not None
    return losses, sums


def asks_twice(*args: Any) -> Any:
    with torch.no_grad():
        real(*args)
    return real(*args)


def writes(*args: Any) -> Any:
    losses, sums = real(*args)
    return losses * torch.tensor([1.0], device=losses.device), sums


def sends(*args: Any) -> Any:
    losses, sums = real(*args)
    return losses * torch.ones(1, device="cpu").to(losses.device), sums


def keeps(*args: Any) -> Any:
    losses, sums = real(*args)
    weight = torch.zeros(1000, 1000, device=losses.device)
    return losses + (losses.sum() * weight).sigmoid().mean(), sums


BROKEN: dict[str, Callable[..., Any]] = {
    "waits": asks,
    "flops": asks_twice,
    "copies": writes,
    "sent and waited": sends,
    "kept": keeps,
    "operators": keeps,
}


def on_paper(model: Path) -> dict[str, Any]:
    """All that is counted on paper, in a process of its own."""
    config = exchange.toy(model, 2, 2)
    facts, found = facts_of(config.model), {}
    counting = Counting()
    with paper.on_paper(2, counting.kernels, counting.wait) as ranks, counting, counting.kernels:
        method = method_of(config, facts, paper.PAPER)
        engine, objective = ours.start_of(config, ranks, method, Numbers(paper.PAPER))
        batch = batch_of(config, method.family, SIZE, config.micro_batch_size, zeros)
        ours.step(counting, engine, method, objective, batch)
        for name, loss in {"": real, **BROKEN}.items():
            with paper.replaced(train, "losses_of", loss):
                ours.step(counting, engine, method, objective, batch)
            found[name] = figures_of(config, ours.counts_of(counting))
            if not name:
                found["sent"] = dict(counting.sent)
    again = {"gradient_checkpointing": True}
    recomputing = config.model_copy(update={"engine": config.engine.model_copy(update=again)})
    found["recomputing"] = figures_of(config, ours.count(recomputing, facts, SIZE))
    timer = {"deepspeed": config.engine.deepspeed | {"timers": {"throughput": {"enabled": True}}}}
    timed = config.model_copy(update={"engine": config.engine.model_copy(update=timer)})
    found["timed"] = figures_of(config, ours.count(timed, facts, SIZE))
    return found


def figures_of(config: Config, counts: ours.Counts) -> dict[str, float]:
    """The figures of a step, over what the config must compute."""
    wanted = ours.model_flops(config, facts_of(config.model), SIZE)
    row = {"ours": gates.told(counts), "flops": counts.flops / wanted, "sent": 0, "of_example": None}
    return gates.figures(row)


def on_ranks(model: Path) -> dict[int, dict[str, int]]:
    """What real ranks send, at the stages that presets use and at 3."""
    return {stage: exchange.counted(model, stage).sent for stage in STAGES}


@lru_cache(1)
def papers() -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(on_paper, 1, twins.twin("sd"), init=False)[0]
    return found


@lru_cache(1)
def sent() -> dict[int, dict[str, int]]:
    found: dict[int, dict[str, int]] = run_ranks(on_ranks, 2, twins.twin("sd"), init=False)[0]
    return found


@pytest.mark.parametrize("name", [*BROKEN, "recomputing", "timed"])
def test_a_worse_step_is_caught(name: str) -> None:
    good = papers()[""]
    assert not gates.broken(good, good)
    gate = {"recomputing": "flops", "timed": "waits", "sent and waited": "waits"}.get(name, name)
    assert any(line.startswith(f"{gate} is ") for line in gates.broken(papers()[name], good))


def test_a_bound_that_has_become_loose_is_told() -> None:
    assert gates.loose({"waits": 2, "kept": 100.0}, {"waits": 3, "kept": 101.0}) == [
        "waits is 2: write that in place of 3 in bounds.toml"
    ]


def test_every_preset_that_trains_has_bounds() -> None:
    assert {*gates.bounds()} == {*gates.training()}


def test_what_paper_sends_is_what_real_ranks_send() -> None:
    assert papers()["sent"] == sent()[2]


@pytest.mark.parametrize("stage", STAGES)
def test_the_formula_foretells_what_ranks_send(stage: int) -> None:
    """Besides norms and flags, of a few bytes, and the padding of what is cut into equal parts."""
    config = exchange.toy(twins.twin("sd"), stage, 2)
    foretold = exchange.foretold(config, facts_of(config.model), SIZE, 2)
    found = exchange.sent_by(sent()[stage], 2)
    assert abs(found - foretold) < 3e-3 * foretold
    half = {name: size // 2 for name, size in sent()[stage].items()}
    assert abs(exchange.sent_by(half, 2) - foretold) > 3e-3 * foretold


def test_ranks_that_fail_take_nothing_from_the_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"operators": 7, "waits": {}, "copies": 0, "kept": 0, "collectives": {}}
    row = {"preset": "sd15-full", "ours": counts, "example": None, "broken": ["flops is 2"]}
    row |= {"flops": 1.25, "sent": 0, "foretold": 0}
    monkeypatch.setattr(gates, "row_of", lambda *asked: row)

    def fail() -> None:
        raise RuntimeError("two ranks on a toy model ended with [1, 1]")

    monkeypatch.setattr(gates, "on_two_ranks", fail)
    out = tmp_path / "gates.json"
    with pytest.raises(RuntimeError, match="two ranks"):
        gates.run(["sd15-full"], out)
    shown, written = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    assert "1.250" in shown and "broken: sd15-full: flops is 2" in shown
    assert written["presets"] == [row] and "ranks" not in written


def test_views_and_allocations_are_no_operators() -> None:
    aten = torch.ops.aten
    for quiet in (aten.view.default, aten.t.default, aten.split.Tensor, aten.empty.memory_format):
        assert not computes(quiet)
    assert not computes(torch.ops.profiler._record_function_enter_new.default)
    for busy in (aten.mm.default, aten.copy_.default, aten._foreach_add_.Scalar, aten._to_copy.default):
        assert computes(busy)
