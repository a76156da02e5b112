"""One flat gradient at stages 1 and 2: to the bit what DeepSpeed computes with one after the other."""

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.bench.gates.paper import replaced
from sfumato.engine import gradients
from sfumato.engine.gradients import Flat
from tests.engine import toys
from tests.engine.ranks import run_ranks
from tests.engine.test_bad_numbers import ADAM, attempt, infinite_gradient

BUCKETS = {"engine__deepspeed": {"zero_optimization": {"reduce_bucket_size": 3000}}}
CELLS = {
    "1 fp32": {"engine__zero_stage": 1, "micro_batch_size": 4},
    "2 bf16": {"engine__zero_stage": 2, "engine__precision": "bf16", "micro_batch_size": 4, **BUCKETS},
    "2 fp32 in parts": {"engine__zero_stage": 2, "micro_batch_size": 2, **BUCKETS},
    "2 bf16 in parts": {"engine__zero_stage": 2, "engine__precision": "bf16", "micro_batch_size": 2},
}
OTHERS: dict[str, dict[str, Any]] = {
    "stage 0": {"engine__zero_stage": 0},
    "offload": {"engine__zero_stage": 2, "engine__offload_optimizer": "cpu"},
    "overlap": {"engine__zero_stage": 2, "engine__deepspeed": {"zero_optimization": {"overlap_comm": True}}},
}
Result = dict[str, Any]


def steps(cell: str) -> Result:
    """Two steps of AdamW."""
    return toys.run(toys.config(optimizer__name="adamw", optimizer__lr=1e-2, **CELLS[cell]), 2)


def without_the_last(self: Any, to: list[Tensor], of: list[Tensor]) -> None:
    """Broken: one parameter of each bucket learns nothing."""
    torch._foreach_add_(to[:-1], of[:-1]) if to[1:] else None


def events(at_once: bool) -> list[str]:
    """What happens in a backward pass of many buckets: "gradient" ready, bucket "sent", "arrived"."""
    seen: list[str] = []
    take, send, arrive = (
        Flat.reduce_independent_p_g_buckets_and_remove_grads, Flat.sent, Flat.arrive
    )  # fmt: skip

    def taken(self: Any, *told: Any) -> None:
        take(self, *told)
        seen.append("gradient")

    def sent(self: Any, *told: Any) -> list[Any]:
        seen.append("sent")
        travels = send(self, *told)
        if at_once:
            seen.append("arrived")
        return travels

    def arrived(self: Any) -> None:
        if self.under_way is not None and not at_once:
            seen.append("arrived")
        arrive(self)

    with (
        replaced(Flat, "reduce_independent_p_g_buckets_and_remove_grads", taken),
        replaced(Flat, "sent", sent),
        replaced(Flat, "arrive", arrived),
    ):
        toys.run(toys.config(**CELLS["2 bf16"]), 1)
    return seen


def travels_meanwhile(seen: list[str]) -> bool:
    """Whether every bucket but the last travels while gradients of the next one become ready."""
    text = " ".join(seen)
    count = text.count("sent")
    return count > 3 and text.count("arrived") == count and text.count("sent gradient") == count - 1


def found() -> Result:
    """All that is asked of real ranks, in one start of theirs."""
    told: Result = {"ours": {cell: steps(cell) for cell in CELLS}}
    with replaced(gradients, "MOST_PIECES", 0):
        told["on all ranks"] = {cell: steps(cell) for cell in CELLS}
    told["events"] = [events(at_once=False), events(at_once=True)]
    with replaced(gradients, "take_over", lambda engine: False):
        told["theirs"] = {cell: steps(cell) for cell in CELLS}
    with replaced(Flat, "add", without_the_last):
        told["broken"] = steps("2 bf16")
    taken = {name: toys.make(toys.config(micro_batch_size=4, **kind)) for name, kind in OTHERS.items()}
    told["taken"] = {name: isinstance(engine.deepspeed.optimizer, Flat) for name, engine in taken.items()}
    engine = toys.make(toys.config(**ADAM, engine__zero_stage=2))
    told["taken"]["stage 2"] = isinstance(engine.deepspeed.optimizer, Flat)
    told["moved"] = [attempt(engine, infinite_gradient)]
    told["finite"] = [finite(engine)]
    with replaced(Flat, "norm", lambda self: torch.ones(())):
        told["moved"].append(attempt(engine, infinite_gradient))
    told["finite"].append(finite(engine))
    return told


def finite(engine: Any) -> bool:
    """Whether all weights and states of this rank are numbers."""
    return all(bool(torch.isfinite(each).all()) for each in toys.checkpoint.own_tensors(engine).values())


@lru_cache(1)
def ranks() -> list[Result]:
    return run_ranks(found, 2, timeout=280)


def same(one: Callable[[Result], Result], other: Callable[[Result], Result]) -> bool:
    """Whether two runs of every rank ended with the same bits, and told the same."""
    pairs = [(one(rank), other(rank)) for rank in ranks()]
    for a, b in pairs:
        if a["loss"] != b["loss"] or a["norm"] != pytest.approx(b["norm"], rel=1e-6):
            return False
    return all(torch.equal(a["tensors"][key], b["tensors"][key]) for a, b in pairs for key in a["tensors"])


@pytest.mark.parametrize("cell", CELLS)
def test_weights_and_states_are_deepspeeds_own(cell: str) -> None:
    assert same(lambda rank: rank["ours"][cell], lambda rank: rank["theirs"][cell])


@pytest.mark.parametrize("cell", CELLS)
def test_a_sum_on_all_ranks_is_that_of_the_owner(cell: str) -> None:
    assert same(lambda rank: rank["on all ranks"][cell], lambda rank: rank["ours"][cell])


def test_a_bucket_travels_while_the_next_one_is_filled() -> None:
    """Broken beside it: one that is waited for at once."""
    for rank in ranks():
        assert [travels_meanwhile(seen) for seen in rank["events"]] == [True, False], rank["events"]


def test_a_bucket_is_cut_where_its_owners_change() -> None:
    zero: Any = SimpleNamespace(partition_size=[10, 4], spots=[{1: 0, 2: 7, 3: 12}, {4: 2, 5: 4}])
    names, lengths = [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5)], [7, 5, 8, 2, 4]
    assert Flat.pieces(zero, names, lengths) == [(0, 10), (1, 10), (0, 2), (1, 4)]
    assert Flat.pieces(zero, names[:1], [25]) == [(0, 10), (1, 10), (2, 5)]


def test_catches_a_gradient_that_is_left_out() -> None:
    assert not same(lambda rank: rank["broken"], lambda rank: rank["theirs"]["2 bf16"])


def test_only_what_is_known_is_taken_over() -> None:
    for rank in ranks():
        assert rank["taken"] == {name: False for name in OTHERS} | {"stage 2": True}


def test_the_norm_is_what_keeps_a_gradient_that_is_not_finite_from_the_weights() -> None:
    """Broken beside it: a norm that is always finite lets it through, on the rank that owns the weight."""
    every = ranks()
    assert [rank["moved"] for rank in every] == [[False, True]] * 2, "the ranks do not do the same"
    assert all(rank["finite"][0] for rank in every)
    assert not all(rank["finite"][1] for rank in every)
