"""What dropout draws follows from the batch, and what was undone is in no line of the metrics."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sfumato import train as loop
from sfumato.config import parse
from tests.engine import runs
from tests.engine.ranks import run_ranks
from tests.engine.test_replay import planted
from tests.engine.test_training import check_same_bits

LORA: dict[str, Any] = {"kind": "lora", "rank": 2, "dropout": 0.5, "text_encoders": True}


def everything(place: str) -> dict[str, Any]:
    """All runs in one process: in one go and in two, a broken pair, with checkpointing, and undone."""
    runs.without_exports()

    def told(name: str, *legs: int, **changes: Any) -> tuple[list[Any], Any]:
        for steps in legs:
            values = runs.settings(Path(place), name=name, steps=steps, method=LORA, **changes)
            run = runs.train_here(values | {"checkpoint": {"every": 2, "export": False}}).parent
        return runs.metrics(run), runs.tensors_of(run)

    found = {"straight": told("straight", 4), "resumed": told("resumed", 2, 4)}
    found["recomputed"] = told("recomputed", 2, engine__gradient_checkpointing=True)
    right = loop.torch_seed
    for name, legs in (("broken", (4,)), ("broken-resumed", (2, 4))):
        found[name] = [], None
        for steps in legs:
            # As if each start seeded once: what is drawn follows from how many were drawn before in it.
            numbers = count()
            loop.torch_seed = lambda *_, numbers=numbers: next(numbers)
            lines, tensors = told(name, steps)
            found[name] = lines, tensors
    loop.torch_seed = right
    for name, policy, batches, every in (("back", "rollback", (3,), 4), ("skipped", "skip", (2, 3), 1)):
        values = runs.settings(Path(place), name=name, log__every=every, log__samples=True)
        values |= {"bad_numbers": {"policy": policy}, "checkpoint": {"every": 2, "export": False}}
        found[name] = runs.metrics(planted(parse(values), *batches).parent)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = runs.write_place(tmp_path_factory.mktemp("again"), "sd")
    return run_ranks(everything, 1, str(place), timeout=280)[0]  # type: ignore[no-any-return]


def test_dropout_of_a_resumed_run_is_that_of_one_go_to_the_bit(found: dict[str, Any]) -> None:
    check_same_bits(found["resumed"][1], found["straight"][1])
    assert [m["loss"] for m in found["resumed"][0]] == [m["loss"] for m in found["straight"][0]]


def test_catches_numbers_that_follow_from_the_start(found: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="differ"):
        check_same_bits(found["broken-resumed"][1], found["broken"][1])


def test_a_second_forward_pass_drops_what_the_first_one_did(found: dict[str, Any]) -> None:
    """Gradient checkpointing computes activations twice."""
    losses = [m["loss"] for m in found["straight"][0][:2]]
    assert [m["loss"] for m in found["recomputed"][0]] == pytest.approx(losses, rel=1e-5)


def test_a_line_over_several_steps_knows_nothing_of_those_that_were_undone(found: dict[str, Any]) -> None:
    """The same two batches are left out in both runs, in one of them by going back over a step."""
    [line], lines = found["back"], found["skipped"]
    assert line["step"] == 4 and len(lines) == 4
    assert line["samples"] == sorted(number for each in lines for number in each["samples"])
    assert line["loss"] == pytest.approx(sum(each["loss"] for each in lines) / 4, rel=1e-6)
