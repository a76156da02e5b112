"""A bit that one rank holds differently is found at every ZeRO stage, and nothing else is taken for one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.engine import agreement
from sfumato.errors import UserError
from tests.engine import toys
from tests.engine.ranks import run_ranks


def flip(tensor: Tensor, element: int, bit: int) -> None:
    """Change one bit of a contiguous tensor in place."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    word = tensor.detach().view(-1).view(kind)[element : element + 1]
    word ^= torch.tensor(1, dtype=kind) << bit


def found(engine: Any) -> str:
    try:
        agreement.check(engine)
    except UserError as error:
        return error.asked + "; " + error.found
    return ""


def disturbed(stages: list[tuple[int, str]]) -> list[dict[str, str]]:
    """For each stage and precision: what is found after a flip of each kind; before, nothing may be."""
    results = []
    for stage, precision in stages:
        engine = toys.make(
            toys.config(
                micro_batch_size=4,
                engine__zero_stage=stage,
                engine__precision=precision,
                optimizer__name="adamw",
                ema__enabled=True,
            )
        )
        agreement.check(engine)
        assert toys.one_step(engine, 0)
        agreement.check(engine)
        odd = engine.ranks.rank == 1
        told = {}
        several = dict(agreement.alike(engine))
        weights = [name for name in several if name.startswith("weight")]
        chosen = {"first": weights[0], "last": weights[-1]}
        chosen |= {kind: f"{kind} of conv_in.weight" for kind in ("ema", "exp_avg_sq") if stage == 0}
        for kind, name in chosen.items():
            tensor = several[name]
            # The lowest bit of the last number, which no loss curve would show.
            flip(tensor, tensor.numel() - 1, 0) if odd else None
            told[kind] = found(engine)
            flip(tensor, tensor.numel() - 1, 0) if odd else None
        told["put back"] = found(engine)
        engine.step_count += odd
        told["count"] = found(engine).split(" on all ranks")[0]
        results.append(told)
    return results


@pytest.mark.timeout(600)
def test_an_altered_bit_is_found_at_every_stage() -> None:
    stages = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
    first, second = run_ranks(disturbed, 2, stages, timeout=500)
    assert first == second, "all ranks must end alike"
    for (stage, _), told in zip(stages, first, strict=True):
        names = "weight conv_in.weight", "weight conv_out.bias"
        for kind, name in zip(("first", "last"), names, strict=True):
            assert f"the same {name} on all ranks at step 1" in told[kind], (stage, kind, told)
            assert "other bits: rank 0 / rank 1; 1 of " in told[kind], (stage, kind, told)
        for kind in ("ema", "exp_avg_sq"):
            assert (f"the same {kind} of conv_in.weight" in told.get(kind, "")) == (stage == 0), (stage, told)
        assert told["put back"] == "", (stage, told)
        assert "count of applied steps" in told["count"], (stage, told)


def test_the_odd_ranks_are_named() -> None:
    assert agreement.odd([7, 7, 8, 7]) == "other bits than most hold on rank 2 of 4"
    assert agreement.odd([7, 6, 8, 7, 7]) == "other bits than most hold on rank 1, 2 of 5"
    assert agreement.odd([7, 8, 7, 8]) == "each of these holds other bits: rank 0, 2 / rank 1, 3"


def check_finds(checksum: Callable[[Tensor], Tensor]) -> None:
    """Fail if a checksum of bits misses a change, or depends on how a tensor lies in memory."""
    draw = torch.Generator().manual_seed(0)
    chunk = agreement.CHUNK["cpu"]
    numbers = torch.randn(chunk * 4 + 11, generator=draw)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensor = numbers.to(dtype)
        before = int(checksum(tensor))
        assert int(checksum(torch.cat([tensor[:3], tensor])[3:])) == before, "another place in memory"
        for element in (0, 1, chunk * 2 - 1, len(tensor) - 1):
            for bit in (0, 8 * tensor.element_size() - 1):
                flip(tensor, element, bit)
                assert int(checksum(tensor)) != before, (dtype, element, bit)
                flip(tensor, element, bit)
        moved = tensor.clone()
        moved[[0, 9]] = moved[[9, 0]]
        assert int(checksum(moved)) != before, "two numbers changed places"
        assert int(checksum(tensor)) == before


def test_the_checksum_sees_every_bit() -> None:
    check_finds(agreement.checksum)


@pytest.mark.parametrize(
    "broken",
    [
        lambda tensor: (tensor.double().sum() * 1000).long(),  # a sum of numbers, as rounded
        lambda tensor: tensor.float().view(torch.int32).long().sum(),  # order does not count
        lambda tensor: agreement.checksum(tensor[:-1]),
    ],
)
def test_weaker_sums_are_caught(broken: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_finds(broken)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5)])
def test_any_tensor_has_a_checksum(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    both = (
        agreement.checksum(tensor),
        agreement.checksum(tensor.T.contiguous().T if tensor.dim() == 2 else tensor),
    )
    assert both[0] == both[1]
    assert both[0].dtype == torch.int64
    if tensor.numel():
        assert both[0] != agreement.checksum(torch.zeros(shape, dtype=dtype))
