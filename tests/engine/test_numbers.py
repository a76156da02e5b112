"""What the engine computes, against plain torch: gradients, accumulation, clipping, rates, masters, losses.

Names T1 to T18 are the traps that each test springs; beside it a broken variant shows that it would notice.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from sfumato.bench.gates.paper import replaced
from sfumato.engine import optimizer
from sfumato.engine.engine import Engine
from tests.engine import toys
from tests.engine.ranks import run_ranks

CELLS = [
    (stage, precision, micro) for precision in ("fp32", "bf16") for stage in range(4) for micro in (4, 1)
]


def plain_gradient(
    dtype: torch.dtype, micro: int = 1, deep: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient of the mean over the global batch and that batch's losses (8,), by torch alone.

    The samples go through in the same portions as in the run, and the portions are summed in float64.
    """
    net = toys.unet(deep)
    net.load_state_dict(toys.start_weights(deep))
    net = net.to(dtype)
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in net.named_parameters()}
    losses = []
    for row in range(0, toys.GLOBAL, micro):
        net.zero_grad()
        loss = toys.losses_of(net, slice(row, row + micro), 0, dtype)
        loss.sum().backward()
        losses.append(loss.detach())
        for name, p in net.named_parameters():
            sums[name] += p.grad.double() / toys.GLOBAL
    return {name: g.flatten() for name, g in sums.items()}, torch.cat(losses)


def moved(results: list[dict[str, Any]], deep: bool = False) -> dict[str, Tensor]:
    """How far the fp32 masters went: with plain descent at rate 1 after one step, the gradient."""
    weights = toys.joined(results)
    start = toys.start_weights(deep)
    return {name: numbers.flatten() - weights[name] for name, numbers in start.items()}


def check_gradient(gradient: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float) -> None:
    gap = toys.distance(gradient, reference)
    assert gap <= tolerance, f"the gradient is {gap:.2g} away from plain torch's, more than {tolerance:g}"


@pytest.fixture(scope="module")
def cells() -> dict[tuple[int, str, int], list[dict[str, Any]]]:
    """One step of every cell on two ranks."""
    jobs = [
        (toys.config(engine__zero_stage=stage, engine__precision=precision, micro_batch_size=micro), 1)
        for stage, precision, micro in CELLS
    ]
    return dict(zip(CELLS, toys.on_ranks(2, jobs), strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_t17_gradient_loss_and_norm_are_those_of_plain_torch(
    cells: dict[tuple[int, str, int], list[dict[str, Any]]], cell: tuple[int, str, int]
) -> None:
    """T17, T1, T18: two ranks with different samples, accumulation 1 and 4, at every ZeRO stage."""
    results, (stage, precision, micro) = cells[cell], cell
    autocast = precision == "bf16" and stage == 0
    dtype = torch.float32 if precision == "fp32" or autocast else torch.bfloat16
    reference, losses = plain_gradient(dtype, micro)
    # Autocast is compared with fp32 arithmetic, so its bound is that of bf16's own rounding.
    check_gradient(moved(results), reference, 1e-5 if precision == "fp32" else 2e-2 if autocast else 5e-3)
    tolerance = 1e-6 if precision == "fp32" else 2e-3
    norm = float(torch.cat(list(reference.values())).norm())
    for result in results:
        assert result["loss"][0] == pytest.approx(float(losses.mean()), rel=tolerance)
        assert result["norm"][0] == pytest.approx(norm, rel=1e-5 if precision == "fp32" else 5e-3)


def own(**zero: Any) -> dict[str, Any]:
    """A DeepSpeed key of the user's own."""
    return {"engine__deepspeed": {"zero_optimization": zero}}


EXTRAS: list[dict[str, Any]] = [
    {"engine__zero_stage": 2, "engine__gradient_checkpointing": True},
    {"engine__zero_stage": 3, "engine__gradient_checkpointing": True},
    {"engine__zero_stage": 2, "engine__attention": "_native_math"},
    {"engine__zero_stage": 2, **own(offload_optimizer={"device": "cpu"})},
    {"engine__zero_stage": 2, **own(overlap_comm=True)},
    {"engine__zero_stage": 3, **own(stage3_param_persistence_threshold=0)},
]


def test_t17_with_checkpointing_attention_and_deepspeeds_own_keys() -> None:
    reference, _ = plain_gradient(torch.float32, 2)
    jobs = [(toys.config(micro_batch_size=2, **extra), 1) for extra in EXTRAS]
    for results in toys.on_ranks(2, jobs):
        check_gradient(moved(results), reference, 1e-5)


def test_t17_with_every_kind_of_block() -> None:
    cells = ((1, "fp32"), (3, "fp32"), (2, "bf16"))
    jobs = [
        (
            toys.config(
                name=toys.DEEP, micro_batch_size=2, engine__zero_stage=stage, engine__precision=precision
            ),
            1,
        )
        for stage, precision in cells
    ]
    for results, (_, precision) in zip(toys.on_ranks(2, jobs), cells, strict=True):
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        reference, _ = plain_gradient(dtype, 2, deep=True)
        check_gradient(moved(results, deep=True), reference, 1e-5 if precision == "fp32" else 5e-3)


def parts_held(settings: Any) -> list[tuple[int, int]]:
    """For each trained parameter its whole size and how much of it this rank holds before a forward pass."""
    module = toys.make(settings).deepspeed.module
    return [(p.ds_numel, p.ds_tensor.numel()) for p in module.parameters()]


def test_at_stage_3_no_rank_holds_the_whole() -> None:
    settings = toys.config(micro_batch_size=4, engine__zero_stage=3)
    for held in run_ranks(parts_held, 2, settings):
        assert all(part == -(-whole // 2) for whole, part in held)


def formats(given: bool) -> dict[tuple[str, bool], set[torch.dtype]]:
    """The weights' formats at stage 3, by precision and whether DeepSpeed says that the device knows fp16."""
    found, init = {}, deepspeed.zero.Init
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        settings = toys.config(micro_batch_size=8, engine__zero_stage=3, engine__precision=precision)
        for known in (True, False):
            with ExitStack() as pretended:
                seam = type(get_accelerator())
                pretended.enter_context(replaced(seam, "is_fp16_supported", lambda self, known=known: known))
                if given:
                    pretended.enter_context(replaced(deepspeed.zero, "Init", partial(init, dtype=dtype)))
                found[precision, known] = {p.dtype for p in toys.make(settings).parameters()}
    return found


def test_at_stage_3_the_weights_have_the_runs_format_on_every_cpu() -> None:
    (found,) = run_ranks(formats, 1, False)
    for (precision, _), dtypes in found.items():
        assert dtypes == {torch.float32 if precision == "fp32" else torch.bfloat16}


def test_catches_a_format_that_deepspeed_changes() -> None:
    (found,) = run_ranks(formats, 1, True)
    assert found["fp32", True] == {torch.float32} and found["fp32", False] == {torch.bfloat16}


def arithmetic(inside: bool) -> set[torch.dtype]:
    """What convolutions answer at stage 0 in bf16, where DeepSpeed sees autocast as it does on a GPU."""
    seen: set[torch.dtype] = set()
    real, cast, call = torch.is_autocast_enabled, Engine._cast, Engine.__call__

    def around(self: Engine, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return call(self, *args, **kwargs)

    torch.is_autocast_enabled = lambda kind="cpu": real(kind)  # it asks of CUDA where no kind is named
    if not inside:
        Engine._cast, Engine.__call__ = lambda self, forward: forward, around  # type: ignore[method-assign]
    try:
        engine = toys.make(toys.config(engine__zero_stage=0, engine__precision="bf16"))
        for layer in engine.deepspeed.module.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(lambda layer, given, answer: seen.add(answer.dtype))
        assert toys.one_step(engine, 0)
    finally:
        torch.is_autocast_enabled = real
        Engine._cast, Engine.__call__ = cast, call  # type: ignore[method-assign]
    return seen


def test_bf16_at_stage_0_computes_in_bf16_on_a_gpu() -> None:
    assert run_ranks(arithmetic, 1, True) == [{torch.bfloat16}]


def test_catches_an_autocast_that_deepspeed_switches_off() -> None:
    assert run_ranks(arithmetic, 1, False) == [{torch.float32}]


def check_mean_loss(told: float, losses: Tensor) -> None:
    assert told == pytest.approx(float(losses.mean()), rel=1e-6)


@pytest.mark.parametrize("rows", [slice(0, 4), slice(3, 4), slice(7, 8)])
def test_t18_catches_one_ranks_or_one_micro_batchs_loss(rows: slice) -> None:
    _, losses = plain_gradient(torch.float32)
    check_mean_loss(float(losses.mean()), losses)
    with pytest.raises(AssertionError):
        check_mean_loss(float(losses[rows].mean()), losses)


@pytest.mark.parametrize("wrong", ["one rank's half", "divided twice", "last micro-batch"])
def test_t17_catches(wrong: str) -> None:
    reference, _ = plain_gradient(torch.float32)
    net = toys.unet()
    net.load_state_dict(toys.start_weights())
    rows = {"one rank's half": slice(0, 4), "divided twice": slice(0, 8), "last micro-batch": slice(6, 8)}[
        wrong
    ]
    loss = toys.losses_of(net, rows, 0, torch.float32).mean() / (2 if wrong == "divided twice" else 1)
    loss.backward()
    with pytest.raises(AssertionError, match="away from plain torch"):
        check_gradient({n: p.grad.flatten() for n, p in net.named_parameters()}, reference, 8e-3)


def check_same_curve(one: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float) -> None:
    assert toys.distance(toys.joined(one), toys.joined(other)) <= tolerance, "the weights went elsewhere"
    assert one[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-5), "the losses differ"


def test_t1_one_curve_for_any_split_and_number_of_ranks() -> None:
    """(4,1), (2,2), (1,4) micro-batch x accumulation on two ranks, and one rank: the same five steps."""
    jobs = {micro: (toys.config(micro_batch_size=micro, optimizer__lr=0.1), 5) for micro in (8, 4, 2, 1)}
    reference, alone = toys.on_ranks(1, [jobs[8], jobs[2]])
    for curve in (alone, *toys.on_ranks(2, [jobs[4], jobs[2], jobs[1]])):
        check_same_curve(curve, reference, 1e-6)


def test_t1_catches_a_loss_divided_twice() -> None:
    # Half the gradient is half the rate.
    jobs = [(toys.config(micro_batch_size=8, optimizer__lr=rate), 2) for rate in (0.05, 0.1)]
    with pytest.raises(AssertionError):
        check_same_curve(*toys.on_ranks(1, jobs), 1e-6)


def test_t14_masters_start_from_the_fp32_weights_and_small_steps_count() -> None:
    stages = {"engine__precision": "bf16", "micro_batch_size": 4}
    small = stages | {"optimizer__name": "adamw", "optimizer__lr": 1e-6}
    jobs = [(toys.config(engine__zero_stage=stage, **stages), 0) for stage in (1, 2, 3)]
    jobs += [(toys.config(engine__zero_stage=stage, **small), 5) for stage in (1, 2, 3)]
    results = [toys.joined(result) for result in toys.on_ranks(2, jobs)]
    for start, after in zip(results[:3], results[3:], strict=True):
        check_masters(start, 0)
        still = sum(int((after[n] == start[n]).sum()) for n in start) / sum(t.numel() for t in start.values())
        assert still < 0.01, f"{still:.1%} of the masters did not move in 5 steps"


def check_masters(masters: dict[str, Tensor], bound: float) -> None:
    gap = max(float((masters[n] - w.flatten()).abs().max()) for n, w in toys.start_weights().items())
    assert gap <= bound, f"masters are {gap:.2g} away from the weights that were asked for"


def test_t14_catches_rounded_masters() -> None:
    with pytest.raises(AssertionError, match="away from the weights"):
        check_masters({n: w.bfloat16().float().flatten() for n, w in toys.start_weights().items()}, 0)


def test_t15_clipping_is_by_the_global_norm() -> None:
    reference, _ = plain_gradient(torch.float32)
    norm = float(torch.cat(list(reference.values())).norm())
    limits = [(stage, factor) for stage in range(4) for factor in (0.1, 10.0)]
    jobs = [
        (toys.config(engine__zero_stage=stage, micro_batch_size=2, optimizer__max_grad_norm=norm * factor), 1)
        for stage, factor in limits
    ]
    for (_, factor), results in zip(limits, toys.on_ranks(2, jobs), strict=True):
        check_gradient(moved(results), {n: g * min(1.0, factor) for n, g in reference.items()}, 1e-5)
        assert results[0]["norm"][0] == pytest.approx(norm, rel=1e-5), "told is the norm before clipping"


def test_t15_catches_deepspeeds_default_of_one() -> None:
    reference, _ = plain_gradient(torch.float32)
    norm = float(torch.cat(list(reference.values())).norm())
    assert norm > 1, "a gradient that a clip at 1.0 would change"
    with pytest.raises(AssertionError):
        check_gradient({n: g / norm for n, g in reference.items()}, reference, 1e-5)


def closed_form(step: int) -> float:
    """Warm-up of 2, then a cosine over the other 8 of 10 steps, peak 0.01."""
    if step < 2:
        return 0.01 * (step + 1) / 2
    return 0.01 * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - 2) / 8))))


RATES: dict[str, Any] = {
    "steps": 10, "optimizer__lr": 0.01, "optimizer__schedule": "cosine", "optimizer__warmup_steps": 2,
}  # fmt: skip


def check_rates(rates: list[float]) -> None:
    assert rates == pytest.approx([closed_form(step) for step in range(len(rates))], rel=1e-6)


def test_t16_the_rate_depends_on_the_applied_step_alone() -> None:
    jobs = {micro: (toys.config(micro_batch_size=micro, **RATES), 10) for micro in (8, 4, 2)}
    for results in (*toys.on_ranks(1, [jobs[8]]), *toys.on_ranks(2, [jobs[4], jobs[2]])):
        check_rates(results[0]["lr"])


@pytest.mark.parametrize("factor", [2, 4])
def test_t16_catches_a_schedule_stepped_per_rank_or_micro_batch(factor: int) -> None:
    settings = toys.config(**RATES)
    with pytest.raises(AssertionError):
        check_rates([0.01 * optimizer.lr_factor(settings, min(9, step * factor)) for step in range(10)])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_schedules_equal_diffusers(name: str) -> None:
    """Against diffusers.optimization, which counts the warm-up from zero: ours is one step further on."""
    from diffusers.optimization import get_scheduler

    weight = torch.nn.Parameter(torch.zeros(1))
    descent = torch.optim.SGD([weight], lr=1.0)
    theirs = get_scheduler(name, descent, num_warmup_steps=0, num_training_steps=20, num_cycles=2)
    settings = toys.config(steps=20, optimizer__schedule=name, optimizer__cycles=2)
    for step in range(20):
        expected = theirs.get_last_lr()[0]
        assert optimizer.lr_factor(settings, step) == pytest.approx(expected, abs=1e-6), step
        descent.step()
        theirs.step()


def paths(every: list[Any]) -> list[list[dict[str, Any]]]:
    """For each run this rank's slices after each of three steps."""
    found = []
    for settings in every:
        engine, steps = toys.make(settings), list[dict[str, Any]]()
        for step in range(3):
            assert toys.one_step(engine, step)
            steps.append({"tensors": toys.checkpoint.own_tensors(engine)})
        found.append(steps)
    return found


def test_ema_is_the_recursion_over_the_masters() -> None:
    """T2: against float64, whatever the accumulation; it starts from the weights before the first step."""
    both = [
        toys.config(
            micro_batch_size=micro, optimizer__lr=0.05, ema__enabled=True, ema__decay=0.5, ema__warmup=False
        )
        for micro in (4, 1)
    ]
    for told in zip(*run_ranks(paths, 2, both), strict=True):
        path = [list(ranks) for ranks in zip(*told, strict=True)]
        average = {n: w.double().flatten() for n, w in toys.start_weights().items()}
        for results in path:
            masters = toys.joined(results)
            average = {n: 0.5 * average[n] + 0.5 * masters[n].double() for n in average}
        assert toys.distance(toys.joined(path[-1], "ema"), average) < 1e-6
