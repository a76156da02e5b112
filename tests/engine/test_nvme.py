"""A run whose optimizer waits on a disk is the run whose optimizer waits in memory, and leaves nothing there.

They need DeepSpeed's reader of disks, which takes ten minutes of a core to compile: docs/offload.md says how.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.engine import checkpoint, offload, reader, shards, swap
from sfumato.engine import ranks as places
from sfumato.engine.cells import check_cells
from sfumato.engine.engine import Engine
from sfumato.engine.weights import WeightFiles
from sfumato.errors import UserError
from sfumato.planner.state import state
from tests.engine import toys
from tests.engine.ranks import run_ranks

compiled = pytest.mark.skipif(
    not reader.is_there(), reason="DeepSpeed's reader of disks is not compiled here"
)
STEPS = 3
KINDS = "weight", "exp_avg", "exp_avg_sq", "ema"
CELLS: dict[str, dict[str, Any]] = {
    "here": {},
    "away": {"engine__offload_optimizer": "cpu"},
    "disk": {"engine__offload_optimizer": "nvme"},
    "all away": {"engine__offload_optimizer": "nvme", "engine__offload_parameters": "cpu"},
}
GROUP = 420_600
"""Numbers that are stepped at once: the last group of the net is too small for the disk."""


class Net(nn.Module):
    """Weights that begin in the middle of a group at odd addresses, and a layer that not every step needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 1024), nn.Linear(1024, 700), nn.Linear(700, 600)
        self.side, self.fourth, self.last = nn.Linear(600, 700), nn.Linear(600, 700), nn.Linear(700, 4)

    def forward(self, x: Tensor, beside: bool) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = torch.tanh(layer(x))
        x = torch.tanh(self.fourth(x)) + (torch.tanh(self.side(x)) if beside else 0)
        return self.last(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def settings(cell: str, disk: Path, world: int, **changes: Any) -> Any:
    """Two micro-batches a step on any number of ranks."""
    path = {"engine__nvme_path": str(disk)} if cell in ("disk", "all away") else {}
    return toys.config(
        **{"optimizer__name": "adamw", "optimizer__lr": 1e-3, "optimizer__max_grad_norm": 0.5,
           "ema__enabled": True, "engine__zero_stage": 3, "micro_batch_size": toys.GLOBAL // 2 // world,
           "engine__deepspeed": {"zero_optimization": {"sub_group_size": GROUP}}}
        | CELLS[cell] | path | changes
    )  # fmt: skip


def make(config: Any) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: p.detach() for name, p in net().named_parameters()}, Path(folder) / "w.safetensors")
        weights = WeightFiles({"": [Path(folder) / "w.safetensors"]})
    return Engine(config, places.start(60), Net, weights)


def losses_of(engine: Any, module: Any, step: int, m: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(toys.GLOBAL, 16, generator=draw)
    micro = engine.config.micro_batch_size
    first = (m * engine.ranks.world + engine.ranks.rank) * micro
    found = module(x[first : first + micro].to(engine.dtype), step % 2 == 0)
    return (found.float() - 1).square().mean(1)


def one_step(engine: Any, step: int, factor: float = 1.0) -> bool:
    applied = False
    for m in range(engine.accumulation):
        engine.backward(losses_of(engine, engine, step, m) * factor)
        applied = engine.step()
    return applied


def trained(place: Path, cell: str, resume: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Three steps, saved after the second; a batch that is not finite is tried before the last one."""
    engine = make(settings(cell, place / "disk", int(os.environ["WORLD_SIZE"]), **changes))
    told: dict[str, Any] = {"loss": [], "norm": []}
    if resume is not None:
        checkpoint.load(engine, checkpoint.Saved(resume))
    while engine.step_count < STEPS:
        assert one_step(engine, engine.step_count)
        metrics = engine.metrics()
        told["loss"].append(metrics["loss"])
        told["norm"].append(metrics["grad_norm"])
        if engine.step_count == STEPS - 1 and resume is None:
            told["path"] = checkpoint.save(engine, place / "saved" / cell, {}, keep=2)
            assert not one_step(engine, 9, torch.inf)
    before = checkpoint.own_tensors(engine)
    told |= {"tensors": before, "drawn": drawn(engine)}
    after = checkpoint.own_tensors(engine)
    told["same"] = all(torch.equal(after[key], x) for key, x in before.items())
    if engine.swap is not None:
        told["files"] = sum(p.stat().st_size for p in engine.swap.path.rglob("*") if p.is_file())
        zero = engine.deepspeed.optimizer
        told["room"] = sum(x.nbytes for x in zero.optimizer_swapper.swap_buffer_manager.all_buffers)
        told["sizes"] = list(zero.fp16_partitioned_groups_flat_numel)
        told["in memory"] = [x.numel() for x in zero.fp32_partitioned_groups_flat]
        engine.swap.remove()
    return told


def drawn(engine: Any) -> list[float]:
    """The module's answer with the weights, with their average, and with the weights again."""

    def answer() -> float:
        with engine.drawing() as module:
            return float(losses_of(engine, module, 0).sum())

    first = answer()
    with engine.averaged():
        averaged = answer()
    return [first, averaged, answer()]


def everything(folder: str) -> dict[str, Any]:
    """The cells of one number of ranks, some gone on with in another; and broken ones."""
    place = Path(folder)
    for disk in (place / "disk", place / "broken" / "disk"):
        disk.mkdir(parents=True, exist_ok=True)
    alone = os.environ["WORLD_SIZE"] == "1"
    found = {cell: trained(place, cell) for cell in (CELLS if alone else ("here", "disk"))}
    for cell, other in [("here", "disk"), ("disk", "here")] + [("disk", "disk"), ("away", "disk")] * alone:
        found[f"{cell} then {other}"] = trained(place, other, found[cell]["path"])
    if alone:
        right, swap.prepare = swap.prepare, lambda *ignored: None
        settle, shards.settle_gradients = shards.settle_gradients, lambda engine: None
        found["broken reading"] = trained(place / "broken", "disk")
        swap.prepare = right
        found["broken settling"] = trained(place / "broken", "here")
        shards.settle_gradients = settle
        owned = shards.owned
        shards.owned = lambda engine, writing=False: owned(engine)
        found["broken writing"] = trained(place, "disk", found["here"]["path"])
        shards.owned = owned
        found["sums"] = plain()
    return found


def plain() -> dict[str, Tensor]:
    """The weights after the steps by torch alone; what a step does not need has a gradient of zero."""
    module = net()
    adam = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=toys.config().optimizer.weight_decay)
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(toys.GLOBAL, 16, generator=draw)
        adam.zero_grad(set_to_none=False)
        (module(x, step % 2 == 0) - 1).square().mean().backward()
        for p in module.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        adam.step()
    return {name: p.detach().flatten() for name, p in module.named_parameters()}


@pytest.fixture(scope="module", params=[1, 2])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp(f"nvme-{request.param}")
    found = run_ranks(everything, request.param, str(folder), timeout=280)
    assert not any((folder / "disk").iterdir()), "something is left on the disk"
    return found


def weights(found: list[dict[str, Any]], name: str, kind: str = "weight") -> dict[str, Tensor]:
    return toys.joined([rank[name] for rank in found], kind)


@compiled
def test_a_disk_changes_no_number(found: list[dict[str, Any]]) -> None:
    toys.check_same(found, "disk", "here", last=STEPS)
    if len(found) == 1:
        toys.check_same(found, "away", "here", last=STEPS)
        for kind in KINDS:
            away = weights(found, "away", kind)
            for cell in ("disk", "all away"):
                assert all(torch.equal(x, away[name]) for name, x in weights(found, cell, kind).items())


@compiled
def test_a_run_goes_on_with_the_disk_or_without(found: list[dict[str, Any]]) -> None:
    names = [name for name in found[0] if " then " in name]
    assert len(names) == (4 if len(found) == 1 else 2)
    for name in names:
        toys.check_same(found, name, name.split(" then ")[0], last=1)


@compiled
def test_an_average_takes_its_turn_and_leaves_everything(found: list[dict[str, Any]]) -> None:
    for rank in found:
        first, averaged, again = rank["disk"]["drawn"]
        assert first == again != averaged
        assert rank["disk"]["same"] and rank["here then disk"]["same"]


@compiled
def test_what_a_step_does_not_need_has_no_gradient(found: list[dict[str, Any]]) -> None:
    """By torch alone; the norms of the steps without the side layer tell it as well."""
    if len(found) == 1:
        for cell in ("here", "away", "disk"):
            assert toys.distance(weights(found, cell), found[0]["sums"]) < 1e-5


@compiled
@pytest.mark.parametrize("broken", ["reading", "settling", "writing"])
def test_catches_gradients_and_weights_that_are_lost_on_the_way(
    found: list[dict[str, Any]], broken: str
) -> None:
    if len(found) == 1:
        with pytest.raises(AssertionError):
            toys.check_same(found, f"broken {broken}", "here", last=1)


@compiled
def test_bytes_on_the_disk_are_those_that_are_planned(found: list[dict[str, Any]]) -> None:
    world = len(found)
    trained = {name: tuple(p.shape) for name, p in net().named_parameters()}
    plan, away = (state(settings(cell, Path("x"), world), world, trained, 0) for cell in ("disk", "away"))
    for rank in found:
        # A checkpoint's copy has no name any more.
        copies = 64 * -(-4 * sum(x.numel() for x in rank["disk"]["tensors"].values()) // 64)
        assert 0 <= plan.disk - rank["disk"]["files"] - copies < 64 * len(rank["disk"]["tensors"])
        *moved, kept = rank["disk"]["sizes"]
        assert rank["disk"]["in memory"] == [0] * len(moved) + [kept] and moved
        # A weight, a gradient, two states and an average; each group counts its steps.
        less = 5 * 4 * sum(moved) - rank["disk"]["room"] - 4 * len(moved)
        assert away.host - plan.host == less


def test_the_next_start_removes_what_a_crash_has_left(tmp_path: Path) -> None:
    class Owner:
        pass

    owner = Owner()
    own = swap.Folder(tmp_path, owner)
    other = "import sys, time; from pathlib import Path; from sfumato.engine import swap\n"
    other += "own = swap.Folder(Path(sys.argv[1]), swap); (own.path / 'file').touch(); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", other, str(tmp_path)])
    try:
        end = time.monotonic() + 100
        while not (there := [*tmp_path.glob("*/file")]):
            assert time.monotonic() < end and process.poll() is None, "the other process made no folder"
            time.sleep(0.1)
        swap.clean(tmp_path)
        assert there[0].exists(), "that of a living process was removed"
    finally:
        process.kill()
        process.wait()
    swap.clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {own.path.name, f"{own.path.name}.lock"}
    del owner
    assert not any(tmp_path.iterdir()), "it did not go with its owner"


@pytest.mark.parametrize(
    ("engine", "what"),
    [
        ({"zero_stage": 2, "nvme_path": "x"}, "zero_stage = 3"),
        ({"zero_stage": 3}, "engine.nvme_path"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_read(engine: dict[str, Any], what: str) -> None:
    values = {f"engine__{key}": value for key, value in engine.items()}
    with pytest.raises(UserError) as error:
        check_cells(toys.config(engine__offload_optimizer="nvme", **values), 4, "cpu")
    assert what in error.value.do


def test_a_disk_is_looked_at_before_a_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path, needed: int = 0, group: int = 1) -> UserError:
        with pytest.raises(UserError) as error:
            offload.check_disk(settings("disk", folder, 1), needed, group)
        return error.value

    assert "no such folder" in refused(tmp_path / "none").found
    assert "are needed there" in refused(tmp_path, 2**60).found
    assert "ulimit -l" in refused(tmp_path, group=2**44).do
    # The compilation of others, of which one was ended by force.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert reader.stale_lock() is None
    for path in (lock, lock.parent):
        os.utime(path, (time.time() - 2 * reader.STILL,) * 2)
    found = refused(tmp_path)
    assert str(lock) in found.found and "remove that file" in found.do
    lock.unlink()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "a compiler" in refused(tmp_path).found and "libaio-dev" in refused(tmp_path).do
