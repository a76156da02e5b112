"""Every preset at full size, on paper: its step's counts are at their bounds, which only get tighter."""

from typing import Any

import pytest

from sfumato import config as settings
from sfumato.bench import gates
from sfumato.planner.architectures import facts_of
from tests.engine.ranks import run_ranks

BESIDE = "sdxl-train-bf16"
"""The one whose step is counted beside that of diffusers' example here; `sfumato bench gates` has all."""


def counted(name: str) -> dict[str, Any]:
    """A preset's figures, and whether it computes activations twice."""
    preset = settings.load(name)
    row = gates.row_of(name, preset, facts_of(preset.model), beside=name == BESIDE)
    return gates.figures(row) | {"again": row["checkpointing"]}


@pytest.mark.parametrize("name", gates.training())
def test_a_preset_is_at_its_bounds(name: str) -> None:
    found = run_ranks(counted, 1, name, init=False, timeout=300)[0]
    again = found.pop("again")
    most = gates.bounds()[name]
    assert not gates.broken(found, most)
    assert not gates.loose(found, most)
    # What a second pass computes again is no arithmetic of the model.
    assert found["flops"] == 1 or (again and 1 < found["flops"] < 1.4)
    assert found["waits"] == 1 and found["copies"] <= 4
    assert ("of_example" in found) == (name == BESIDE)
    if name == BESIDE:
        assert found["of_example"] < 0.6
