"""The planner's bytes are those of real tensors: every storage of a real engine is found and counted."""

import gc
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.comm import coalesced_collectives
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.config import Config
from sfumato.engine import profiles, ranks
from sfumato.engine.engine import Engine
from sfumato.engine.weights import WeightFiles
from sfumato.planner.state import State, state
from sfumato.planner.traffic import traffic
from tests.engine import toys
from tests.engine.ranks import run_ranks

# Where DeepSpeed's optimizers keep tensors. What lies elsewhere is "other"; there is none.
MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
GRADIENTS = ("grad_partitions_flat_buffer", "grads_in_partition", "averaged_gradients", "all_grad_tensors",
             "fp32_groups_gradients_flat")  # fmt: skip
HOST = ("temp_grad_buffer_for_cpu_offload", "param_buffer_of_bit16_for_cpu_offload_groups",
        "accumulated_grads_in_cpu")  # fmt: skip
SCALARS = 512  # bytes of norms and flags, for which nobody plans
ACTIVATIONS = 8000  # bytes of the largest one of the toy

CELLS: dict[str, dict[str, Any]] = {
    f"{stage}-{precision}-{summed}": {"stage": stage, "precision": precision, "micros": micros}
    for stage in range(4)
    for precision in ("fp32", "bf16")
    for summed, micros in (("one", 1), ("sum", 2))
}
CELLS |= {
    f"{name}-offload": cell | {"offload_optimizer": "cpu"} for name, cell in CELLS.items() if cell["stage"]
}
CELLS["3-bf16-one-away"] = CELLS["3-bf16-one-offload"] | {"offload_parameters": "cpu"}
CELLS["2-bf16-one-sgd"] = CELLS["2-bf16-one"] | {"name": "sgd"}
CELLS["1-bf16-one-rates"] = CELLS["1-bf16-one"] | {"rates": True}
CELLS["2-fp32-one-buckets"] = CELLS["2-fp32-one"] | {"bucket": 5000}
CELLS["3-bf16-one-buckets"] = CELLS["3-bf16-one"] | {"bucket": 111_000}
CELLS["3-bf16-one-narrow"] = CELLS["3-bf16-one"] | {"bucket": 50_000}
BOUNDED = [name for name in CELLS if name.endswith(("buckets", "narrow"))]
"""Cells with several buckets, whose fullest moment depends on how parameters fall into them."""
RUNS = [(name, world) for world in (1, 2) for name in CELLS if world == 2 or "bf16" in name]
"""Cells and ranks; what one rank in fp32 holds follows from the others."""
RUNS += [(f"{stage}-fp32-sum-offload", 1) for stage in (1, 2)]
MOVED = [name for name, world in RUNS if world == 1 and "offload" in name and name[0] in "12"]
"""Cells of which it is counted what goes to the host's memory and comes from there."""


class Toy(nn.Module):
    """Odd sizes, so that every stage has to fill up; one layer above what stage 3 keeps whole; one frozen."""

    def __init__(self, large: bool) -> None:
        super().__init__()
        wide = 331 if large else 13
        self.first, self.second, self.third = nn.Linear(7, 331), nn.Linear(331, wide), nn.Linear(wide, 3)
        self.text_encoder = nn.Linear(3, 5)
        self.frozen = nn.Linear(5, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.first, self.second, self.third, self.text_encoder, self.frozen
        for layer in layers:
            x = layer(x)
        return x.float().square().mean(1)


def settings(cell: Mapping[str, Any], world: int) -> Config:
    changes: dict[str, Any] = {
        f"engine__{key}": cell[key] for key in ("offload_optimizer", "offload_parameters") if key in cell
    }
    if "bucket" in cell:
        changes["engine__deepspeed"] = {"zero_optimization": {"reduce_bucket_size": cell["bucket"]}}
    if "rates" in cell:
        changes |= {"optimizer__text_encoder_lr": 0.5, "method": {"kind": "lora", "text_encoders": True}}
    return toys.config(
        engine__zero_stage=cell["stage"], engine__precision=cell["precision"], micro_batch_size=2,
        batch_size=2 * world * cell["micros"], optimizer__name=cell.get("name", "adamw"), optimizer__lr=1e-3,
        ema__enabled=True, ema__profiles=[0.05, 0.1], **changes,
    )  # fmt: skip


class Count(dict[str, int]):
    """Bytes by role; a storage counts for the first role that claims it."""

    def __init__(self, engine: Engine, passing: list[Tensor]) -> None:
        super().__init__()
        self.seen: set[int] = set()
        zero, base = engine.deepspeed.optimizer, engine.deepspeed.basic_optimizer
        away = engine.config.engine
        host = "host" if away.offload_optimizer != "none" else ""
        module = list(engine.deepspeed.module.parameters())
        for p in module:
            role = "weights" if p.requires_grad else "frozen"
            if away.offload_parameters != "none":
                self.claim("host" if p.requires_grad else role, p.ds_tensor)
            self.claim(role, p.data)
            self.claim(role, getattr(p, "ds_tensor", None))
        self.claim("weights", getattr(zero, "bit16_groups_flat", None))
        masters = [m for name in MASTERS for m in getattr(zero, name, ())] if zero is not base else []
        for master in masters:
            self.claim(host or "weights", master)
            self.claim(host or "gradients", master.grad)
        for name in GRADIENTS:
            held = getattr(zero, name, None)
            at_stage_3 = host if name == "grad_partitions_flat_buffer" else ""
            self.claim(at_stage_3 or "gradients", held)
        for p in module:
            self.claim("gradients", [getattr(p, "grad_accum", None)])
        for bucket in getattr(zero, "ipg_buckets", {}).values():
            self.claim("buffers", bucket.buffer)
        for p in module:
            self.claim("gradients", p.grad)
        self.claim("buffers", getattr(zero, "temp_grad_buffer_for_gpu_offload", None))
        for name in HOST:
            self.claim("host", getattr(zero, name, None))
        for states in base.state.values():
            for kind, held in states.items():
                self.claim(host or ("ema" if profiles.is_average(kind) else "optimizer"), held)
        for name, held in vars(zero).items():
            if name != "round_robin_bit16_meta":
                self.claim("other", held)
        self.claim("buffers", passing)

    def claim(self, role: str, held: Any) -> None:
        if torch.is_tensor(held):
            storage = held.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self[role] = self.get(role, 0) + storage.nbytes()
        elif isinstance(held, Mapping):
            for one in held.values():
                self.claim(role, one)
        elif isinstance(held, list | tuple | set):
            for one in held:
                self.claim(role, one)

    @property
    def device(self) -> int:
        return sum(size for role, size in self.items() if role not in ("host", "other"))


def young() -> list[Tensor]:
    """Tensors that only a function of DeepSpeed's knows, such as the flat copy that is being summed."""
    return [
        x
        for age in (0, 1)
        for x in gc.get_objects(age)
        if type(x) is Tensor and x.device.type != "meta" and x.untyped_storage().nbytes() >= ACTIVATIONS
    ]


@contextmanager
def watched(engine: Engine, samples: dict[str, list[Count]]) -> Iterator[None]:
    """Counts whenever a gradient is ready, ranks exchange numbers, buckets go, and the optimizer steps."""
    zero, base = engine.deepspeed.optimizer, engine.deepspeed.basic_optimizer

    def sample(when: str) -> None:
        # What is freed while a thread of gloo's still holds it, which it does for a moment, is not there.
        passing = young()
        while passing:
            sizes = [x.untyped_storage().nbytes() for x in passing]
            del passing
            time.sleep(0.01)
            passing = young()
            if len(passing) == len(sizes):
                break
        samples[when].append(Count(engine, passing))

    def before(owner: Any, name: str, when: str) -> tuple[Any, str, Any]:
        right = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            sample(when)
            return right(*args, **kwargs)

        setattr(owner, name, wrapped)
        return owner, name, right

    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: sample("backward"))
        for p in engine.parameters()
        if p.requires_grad
    ]
    kept = [before(dist, "all_reduce", "backward"), before(dist, "reduce", "backward")]
    kept.append(before(coalesced_collectives, "_torch_reduce_scatter_fn", "backward"))
    if hasattr(zero, "add"):
        kept.append(before(zero, "add", "backward"))
    if hasattr(zero, "_release_ipg_buffers"):
        kept.append(before(zero, "_release_ipg_buffers", "backward"))
        kept.append(before(zero, "free_grad_in_param_list", "step"))
    kept.append(before(base, "step", "step"))
    gc.disable()  # or it makes some of them old
    try:
        yield
    finally:
        gc.enable()
        for owner, name, right in kept:
            setattr(owner, name, right)
        for hook in hooks:
            hook.remove()


class Moved(TorchDispatchMode):
    """Counts bytes of copies between what would lie in the host's memory and what would not."""

    def __init__(self, zero: Any) -> None:
        super().__init__()
        self.zero, self.bytes = zero, 0

    def is_away(self, tensor: Tensor) -> bool:
        masters = self.zero.single_partition_of_fp32_groups
        away = [*masters, *(master.grad for master in masters), *self.zero.accumulated_grads_in_cpu.values()]
        away += self.zero.param_buffer_of_bit16_for_cpu_offload_groups
        places = [held.untyped_storage().data_ptr() for held in away if held is not None]
        return tensor.untyped_storage().data_ptr() in places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and self.is_away(args[0]) != self.is_away(args[1]):
            assert args[0].dtype == args[1].dtype
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def measured(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of one cell on this rank, in its second step."""
    place = ranks.start(60)
    config, large = settings(cell, place.world), cell["stage"] == 3
    toy = Toy(large)
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: p.detach() for name, p in toy.named_parameters()}, Path(folder) / "w.safetensors")
        weights = WeightFiles({"": [Path(folder) / "w.safetensors"]})
    engine = Engine(config, place, lambda: Toy(large), weights)
    samples: dict[str, list[Count]] = defaultdict(list)

    def step() -> None:
        for _ in range(engine.accumulation):
            engine.backward(engine(torch.randn(2, 7).to(engine.dtype)))
            engine.step()

    step()
    gc.collect()
    with watched(engine, samples):
        step()
    rest = Count(engine, [])
    moved = Moved(engine.deepspeed.optimizer)
    if cell.get("offload_optimizer") and cell["stage"] < 3:
        with moved:
            step()
    fullest = max(samples["backward"], key=lambda count: count.device)
    stepping = max(samples["step"], key=lambda count: count.device)
    gradients = max(count.get("gradients", 0) for count in samples["backward"])
    host = max(count.get("host", 0) for count in samples["backward"])
    return {"rest": dict(rest), "device": fullest.device, "gradients": gradients, "host": host,
            "stepping": stepping.device, "moved": moved.bytes}  # fmt: skip


def measured_all(cells: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [measured(cell) for cell in cells]


def planned(cell: Mapping[str, Any], world: int) -> State:
    parameters = list(Toy(cell["stage"] == 3).named_parameters())
    trained = {name: tuple(p.shape) for name, p in parameters if p.requires_grad}
    size = 4 if cell["precision"] == "fp32" or cell["stage"] == 0 else 2
    frozen = [p.numel() for _, p in parameters if not p.requires_grad]
    parts = [-(-number // world) for number in frozen]
    # Stage 3 keeps small frozen layers whole, too, beside a rank's part.
    held = sum(parts) * (1 + world) if cell["stage"] == 3 and world > 1 else sum(frozen)
    return state(settings(cell, world), world, trained, size * held)


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(cell, ranks) -> what each rank measured."""
    results = {}
    for world in (1, 2):
        names = [name for name in CELLS if (name, world) in RUNS]
        told = run_ranks(measured_all, world, [CELLS[name] for name in names], timeout=280)
        results |= {
            (name, world): list(each) for name, each in zip(names, zip(*told, strict=True), strict=True)
        }
    return results


Found = dict[tuple[str, int], list[dict[str, Any]]]


@pytest.mark.parametrize(("name", "world"), RUNS)
def test_bytes_are_those_of_real_tensors(found: Found, name: str, world: int) -> None:
    check(planned(CELLS[name], world), found[name, world], name in BOUNDED)


def check(plan: State, told: list[dict[str, Any]], bounded: bool = False) -> None:
    """Compare the plan with the rank that holds most."""
    rest = {
        role: max(each["rest"].get(role, 0) for each in told)
        for role in ("weights", "optimizer", "ema", "frozen")
    }
    assert rest == {role: getattr(plan, role) for role in rest}
    assert max(each["rest"].get("other", 0) for each in told) < SCALARS, "tensors that nobody plans"
    most = {role: max(each[role] for each in told) for role in ("device", "gradients", "host", "stepping")}
    assert plan.host == most["host"]
    if bounded:
        assert most["device"] <= plan.device <= 1.3 * most["device"]
    else:
        assert (plan.device, plan.gradients) == (most["device"], most["gradients"])
    # Of a step, the moment cannot be seen at which a gradient is there flat and in fp32.
    assert most["stepping"] <= plan.stepping <= 1.15 * most["stepping"]


@pytest.mark.parametrize("name", MOVED)
def test_what_offload_moves_is_what_is_copied(found: Found, name: str) -> None:
    """One rank; of several each also moves whole the parameters that it owns a part of."""
    learns = sum(p.numel() for p in Toy(False).parameters() if p.requires_grad)
    planned = traffic(settings(CELLS[name], 1), 1, 1, learns, 0).host
    assert found[name, 1][0]["moved"] == pytest.approx(planned, rel=1e-3)  # filled up to even numbers


@pytest.mark.parametrize("wrong", ["padding", "average", "bucket", "master"])
def test_catches_a_plan_that_forgets(found: Found, wrong: str) -> None:
    plan = planned(CELLS["2-bf16-one"], 2)
    lacking = {
        "padding": replace(plan, weights=plan.weights - 4),
        "average": replace(plan, ema=plan.ema // 2),
        "bucket": replace(plan, buffers=0),
        "master": replace(plan, weights=plan.weights // 2),
    }
    with pytest.raises(AssertionError):
        check(lacking[wrong], found["2-bf16-one", 2])
