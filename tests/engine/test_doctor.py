"""The doctor on two real ranks: what is right is good; each broken thing is told, with its rank."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.config import Config
from sfumato.engine import gradients
from sfumato.engine.engine import Engine
from tests.engine import runs, toys
from tests.engine.ranks import run_ranks

LIMIT = 280


class Twice(Engine):
    """Two backward passes before a step, of which DeepSpeed's own way with gradients loses one."""

    def _start(self, *given: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gradients, "TESTED", ())
            super()._start(*given)

    def backward(self, losses: torch.Tensor) -> None:
        share = losses.sum() * (self.ranks.world * self.accumulation / self.config.batch_size)
        self.deepspeed.backward(share / 2, retain_graph=True)
        super().backward(losses / 2)


class Alone(Engine):
    """Gradients that no rank hears of."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.deepspeed.allreduce_gradients = lambda *given, **named: None


class Longer(Engine):
    """A mean over ranks that is a sum."""

    def backward(self, losses: torch.Tensor) -> None:
        super().backward(losses * self.ranks.world)


class Exact(Engine):
    """Arithmetic in fp32 where bf16 is asked for."""

    def _cast(self, forward: Any) -> Any:
        return forward


def settings(place: Path, **changes: Any) -> Config:
    from sfumato.config import parse

    small = {"batch_size": 4, "optimizer__name": "sgd", "ema__enabled": False}
    return parse(runs.settings(place, **(small | changes)))


def at_all(place: str) -> dict[str, Any]:
    """On each rank: the whole command, then its parts with one thing broken at a time; texts by claim."""
    from sfumato.doctor import company, examine, parity, sums
    from sfumato.doctor.rounds import Rounds, trouble

    folder = Path(place)
    told: dict[str, Any] = {}
    values = runs.settings(folder, optimizer__name="adamw", engine__precision="bf16", engine__zero_stage=2)
    from sfumato.config import parse

    report = folder / "report.json"
    told["code"] = examine.examine(parse(values), file=report)
    own = examine.ranks.start(60)
    rounds = Rounds(own, examine.store(), time.monotonic() + LIMIT)

    def texts(lines: Any) -> list[str]:
        return [f"{line.verdict.value}: {line.text}" for line in lines]

    toy = folder / "sd"
    cells = {
        "stage 3": (settings(folder, engine__zero_stage=3, engine__gradient_checkpointing=True), Engine),
        "twice": (settings(folder), Twice),
        "alone": (settings(folder, engine__zero_stage=0), Alone),
        "longer": (settings(folder), Longer),
        "exact": (settings(folder, engine__zero_stage=0, engine__precision="bf16"), Exact),
    }
    for name, (config, kind) in cells.items():
        told[name] = texts(parity.look(rounds, config, toy, kind))
    right = company.code
    company.code = lambda: right() + ("changed" if own.rank else "")
    told["other code"] = texts(company.look(rounds, settings(folder)))
    real = sums.dist.all_reduce

    def wrong(tensor: torch.Tensor) -> None:
        if own.rank == 1:
            tensor.mul_(3)
        real(tensor)

    sums.dist.all_reduce = wrong
    told["wrong numbers"] = texts(sums.look(rounds, torch.bfloat16))
    sums.dist.all_reduce = real
    alone = sums.dist.reduce
    # A sum that reaches another rank than its owner, as with ranks counted in another group.
    sums.dist.reduce = lambda piece, owner, **named: alone(piece, 1 - owner, **named)
    told["wrong owner"] = texts(sums.look(rounds, torch.bfloat16))
    sums.dist.reduce = alone
    sums.dist.all_reduce = real if own.rank == 0 else lambda tensor: None
    sums.LIMIT = 3.0
    told["left out"] = texts(sums.look(rounds, torch.bfloat16))
    told["after"] = texts(parity.look(rounds, settings(folder), toy))
    if own.rank == 0:  # the other one goes away
        told["gone"] = texts(trouble("ranks", rounds.ask(lambda: 1, 1)))
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = runs.write_place(tmp_path_factory.mktemp("doctor"), "sd")
    first, _ = run_ranks(at_all, 2, str(place), timeout=LIMIT, init=False)
    return {**first, "report": json.loads((place / "report.json").read_text()), "place": place}


def test_two_ranks_of_a_sound_machine_are_good(told: dict[str, Any]) -> None:
    assert told["code"] == 0, told["report"]
    found = {line["name"]: line for line in told["report"]["lines"]}
    looked = (
        "versions",
        "settings",
        "data",
        "ranks",
        "same on all",
        "sums",
        "clocks",
        "bandwidth",
        "attention",
    )
    for name in (*looked, "gradient", "told", "first step", "repeated", "device"):
        assert found[name]["verdict"] == "good", found[name]
    assert found["gradient"]["figures"]["same"]["error"] > 1e-4, "bf16 rounds: nothing was compared"
    assert not (told["place"] / "runs").exists(), "the doctor made the run's folder"


def test_stage_3_with_checkpointing_is_that_of_plain_torch(told: dict[str, Any]) -> None:
    assert [text.split(":")[0] for text in told["stage 3"]] == ["good"] * 3, told["stage 3"]


@pytest.mark.parametrize("broken", ["twice", "alone", "longer"])
def test_a_wrong_gradient_is_bad(told: dict[str, Any], broken: str) -> None:
    assert told[broken][0].startswith("bad: "), told[broken]
    assert "off plain torch's (at most 1e-05)" in told[broken][0]
    if broken == "longer":
        assert "2 times as long, in its direction" in told[broken][0]


def test_fp32_in_place_of_bf16_is_told(told: dict[str, Any]) -> None:
    assert told["exact"][0].startswith("bad: it is fp32's"), told["exact"]


def test_a_rank_with_other_files_is_told(told: dict[str, Any]) -> None:
    assert any("bad: Sfumato's own files differ" in text for text in told["other code"]), told["other code"]


def test_a_rank_that_gives_wrong_numbers_is_named(told: dict[str, Any]) -> None:
    first = told["wrong numbers"][0]
    assert first.startswith("bad: all-reduce of int32: wrong on ranks 0, 1"), first
    assert "rank 1's numbers are in it 3 times" in first and "rank 0's" not in first


def test_a_sum_that_another_rank_gets_is_told(told: dict[str, Any]) -> None:
    first = told["wrong owner"][0]
    assert first.startswith("bad: reduce of int32: wrong on ranks 0, 1"), told["wrong owner"]


def test_a_rank_that_leaves_a_sum_out_is_told_and_nothing_hangs(told: dict[str, Any]) -> None:
    hung, alone = told["left out"]
    assert hung.startswith("bad: all-reduce of int32: rank 0: still in all_reduce of sums.py"), hung
    assert alone.startswith("bad: all-reduce of int32: wrong on rank 1,"), alone
    assert "rank 0's numbers are in it 0 times" in alone
    assert told["after"] == ["not looked at: rank 0 did not come through a check before"]


def test_a_rank_that_is_gone_is_told(told: dict[str, Any]) -> None:
    assert told["gone"] == ["bad: rank 1: it gives no sign of life: its process is gone, or stands still"]


def test_the_toy_batches_of_the_tests_are_not_the_doctors() -> None:
    """Different data on each rank: no two micro-batches of a global batch are alike."""
    from sfumato.doctor import twin

    class Family:
        latent_channels, vae_factor = 4, 8

    class Learns:
        family = Family

    config = toys.config(micro_batch_size=2)
    batches: Any = [twin.batch_of(config, Learns, number, 64) for number in range(4)]  # type: ignore[arg-type]
    for one in range(4):
        for other in range(one):
            assert not torch.equal(batches[one].pixels, batches[other].pixels)
            assert not torch.equal(batches[one].draws.noise, batches[other].draws.noise)
