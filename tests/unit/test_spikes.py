"""The rule that flags losses: what sticks out is told, what only varies is not."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sfumato.report.spikes import Spikes, losses_in

DRAW = np.random.default_rng(0)
NUMBER = 1500
CALM = {
    "constant": np.full(NUMBER, 0.3),
    "constant to rounding": 0.3 * (1 + 1e-6 * DRAW.standard_normal(NUMBER)),
    "two levels, one of them most of the time": np.where(DRAW.random(NUMBER) < 0.8, 0.3, 0.4),
    "rising slowly": 0.1 * np.exp(0.01 * np.arange(NUMBER)),
    "falling fast": 5 * np.exp(-0.05 * np.arange(NUMBER)),
    "a large batch": 0.1 * np.exp(0.05 * DRAW.standard_normal(NUMBER)),
    "single timesteps": 0.1 * np.exp(1.2 * DRAW.standard_normal(NUMBER)),
    "exponential": DRAW.exponential(0.1, NUMBER),
    "Student's t of three": np.abs(DRAW.standard_t(3, NUMBER)),
    "zeros": np.zeros(NUMBER),
    "first far too large": np.concatenate([np.geomspace(100, 0.1, 50), np.full(50, 0.1)]),
}  # fmt: skip


def flagged(losses: np.ndarray, rule: type[Spikes] = Spikes) -> list[int]:
    spikes = rule(8.0)
    return [step for step, loss in enumerate(losses) if spikes.take(float(loss))]


@pytest.mark.parametrize("name", CALM)
def test_what_only_varies_raises_no_alarm(name: str) -> None:
    assert flagged(CALM[name]) == []


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5])
def test_one_loss_far_above_the_others_does(spread: float) -> None:
    losses = 0.1 * np.exp(spread * np.random.default_rng(1).standard_normal(300))
    losses[[150, 250]] *= 100 if spread > 0.1 else 2
    losses[[50, 200]] /= 100  # what is far below is none
    assert flagged(losses) == [150, 250]


class Plain(Spikes):
    """Broken: mean and standard deviation of the losses themselves."""

    def take(self, loss: float) -> bool:
        last = self.logarithms
        self.now = len(last) >= 20 and loss - np.mean(last) > 4 * np.std(last)
        last.append(loss)
        return bool(self.now)


def test_a_rule_without_robustness_is_caught() -> None:
    assert flagged(CALM["single timesteps"], Plain), "it cries wolf"
    losses = np.full(200, 0.1)
    losses[[100, 105, 110, 115, 120, 125, 130]] = 0.3
    assert len(flagged(losses)) == 7 and len(flagged(losses, Plain)) < 7, "spikes hide behind spikes"


def test_a_level_that_stays_is_flagged_for_a_while_only() -> None:
    assert flagged(np.repeat([0.1, 1.0], 300)) == [*range(300, 350)]


def test_what_is_not_finite_is_flagged_from_the_start_and_not_compared_with() -> None:
    spikes = Spikes(8.0)
    assert spikes.take(math.nan) and spikes.take(math.inf) and not spikes.logarithms
    assert not any(map(Spikes(0).take, (math.nan, *[0.1] * 30, 1e9))), "0 flags nothing"


def test_after_a_resume_the_rule_knows_the_losses_before(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert losses_in(file) == []
    lines = [json.dumps({"step": step, "loss": 0.1 if step > 50 else 9.0}) for step in range(151)]
    file.write_text("\n".join([*lines, json.dumps({"step": 151, "loss": None}), '{"step": 152, "lo']))
    before = losses_in(file)
    assert before == [0.1] * 100
    spikes = Spikes(8.0, before)
    assert spikes.take(0.5)
    assert spikes.describe(153, 0.5) == "step 153: the loss jumped to 0.5; the median of the last 100 is 0.1"
