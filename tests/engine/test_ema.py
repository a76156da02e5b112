"""Averages of the weights, kept in shards: against float64, through resumes, and in the module's place.

Names T2, T3, T14 are the traps that each test springs; beside it broken variants show that it would notice.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.config import Config
from sfumato.engine import checkpoint, ema, profiles, ranks
from sfumato.engine.engine import Engine
from sfumato.engine.trained import Rebuilt
from sfumato.engine.weights import WeightFiles
from tests.engine import toys
from tests.engine.ranks import run_ranks

STEPS, TURN, SKIPPED = 200, 100, 190
"""Steps of a run; the one that it is resumed at, at the next stage; the one that an infinity comes before."""
PROFILES = (0.05, 0.1)
CELLS = [(0, "fp32"), (2, "fp32"), (0, "bf16"), (2, "bf16")]
"""Stages that runs begin at: they end at 1 and 3."""
Numbers = dict[str, Tensor]


def net() -> nn.Module:
    return FeedForward(12, mult=2)


def start() -> Numbers:
    torch.manual_seed(3)
    return {name: p.detach().clone() for name, p in net().named_parameters()}


def config(place: Path, cell: tuple[int, str], half: int = 0, **changes: Any) -> Config:
    """The settings of a cell's first or second half, which accumulates over 1, 2 or 4 micro-batches."""
    stage, precision = cell
    profiled = cell in ((0, "fp32"), (2, "bf16"))
    law: dict[str, Any] = {"ema__profiles": PROFILES} if profiled else {"ema__decay": 0.95}
    whole = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return toys.config(
        **law
        | {
            "name": f"{stage}-{precision}", "output": str(place), "ema__enabled": True, "optimizer__lr": 3e-3,
            "optimizer__name": "adamw", "engine__zero_stage": stage + half, "engine__precision": precision,
            "engine__deepspeed": whole if half and cell == (2, "bf16") else {},
            "micro_batch_size": {(0, "fp32"): 1, (2, "bf16"): 2}.get(cell, 4) if half else 4,
        }
        | changes
    )  # fmt: skip


def make(settings: Config) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        save_file(start(), Path(folder) / "start.safetensors")
        files = WeightFiles({"": [Path(folder) / "start.safetensors"]})
    return Engine(settings, ranks.start(60), net, files)


def rows(engine: Engine, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of a step."""
    draw = torch.Generator().manual_seed(step)
    x, y = (torch.randn(toys.GLOBAL, 12, generator=draw) for _ in range(2))
    micro, place = engine.config.micro_batch_size, engine.ranks
    for m in range(engine.accumulation):
        first = (m * place.world + place.rank) * micro
        yield x[first : first + micro].to(engine.dtype), y[first : first + micro]


def one_step(engine: Engine, factor: float = 1.0) -> bool:
    applied = False
    for x, y in rows(engine, engine.step_count):
        engine.backward((engine(x).float() - y).square().mean(1) * factor)
        applied = engine.step()
    return applied


def own(engine: Engine, kind: str = "weight") -> Numbers:
    """This rank's slices of one kind, by kind/name/start."""
    return {key: t for key, t in checkpoint.own_tensors(engine).items() if key.split("/")[0] == kind}


def train(engine: Engine, until: int) -> list[Numbers]:
    """Train, with a step that is skipped; the masters after each applied step."""
    seen = []
    while engine.step_count < until:
        if engine.step_count == SKIPPED:
            before = checkpoint.own_tensors(engine)
            assert not one_step(engine, float("inf") if engine.ranks.rank == 1 else 1.0)
            after = checkpoint.own_tensors(engine)
            assert all(torch.equal(before[key], after[key]) for key in before), (
                "a skipped step moved something"
            )
        assert one_step(engine)
        seen.append(own(engine))
    return seen


def live(engine: Engine) -> Numbers:
    """All that the engine holds on this rank: masters, states, averages, and what the forward pass uses."""
    low = {
        f"low/{name}/{place}": getattr(p, "ds_tensor", p).detach().clone() if place else p.detach().clone()
        for name, p in engine.deepspeed.module.named_parameters()
        for place in (0, 1)
    }
    return checkpoint.own_tensors(engine) | low


def answer(engine: Engine) -> Tensor:
    with engine.drawing() as module:
        return module(next(rows(engine, 0))[0][:1]).float().clone()


class Stop(Exception):
    """Raised in the middle."""


def same(before: Numbers, after: Numbers) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def swaps(engine: Engine) -> dict[str, Any]:
    """What `averaged` does to a trained engine."""
    kinds, before, first = profiles.kinds(engine.config.ema), live(engine), answer(engine)
    inside = {}
    for kind in (None, *kinds):
        with engine.averaged(kind):
            inside[kind or kinds[0]] = answer(engine)
    back = same(before, live(engine)) and torch.equal(first, answer(engine))
    with pytest.raises(Stop), engine.averaged():
        raise Stop
    after_error = same(before, live(engine)) and torch.equal(first, answer(engine))
    with pytest.raises(AssertionError, match="lose the weights"), engine.averaged():
        engine.step()
    ema.exchange(engine.deepspeed, kinds[0])
    halfway = same(before, live(engine))
    ema.exchange(engine.deepspeed, kinds[0])
    return {
        "inside": inside,
        "back": back,
        "after error": after_error,
        "halfway": halfway,
        "live": first,
        "tensors": before,
    }


def run_cells(place: Path) -> list[dict[str, Any]]:
    """Each cell's run: the masters at each step, what it kept at the end, and the swaps of both halves."""
    found = []
    for cell in CELLS:
        first, second = make(config(place, cell)), make(config(place, cell, 1))
        with first.averaged():  # before the first step there is nothing to change places with
            assert not first.is_averaged
        seen = [train(first, TURN)]
        path = checkpoint.save(first, place / f"{cell}", {}, keep=1)
        checkpoint.load(second, checkpoint.Saved(path))
        seen.append(train(second, STEPS))
        kept = {kind: own(second, kind) for kind in profiles.kinds(second.config.ema)}
        found.append({"seen": seen, "kept": kept, "swaps": [swaps(first), swaps(second)]})
    return found


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[dict[str, Any]]]:
    place = tmp_path_factory.mktemp("ema")
    both = run_ranks(run_cells, 2, place, timeout=300)
    return dict(zip(CELLS, ([*results] for results in zip(*both, strict=True)), strict=True))


def path_of(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The masters at each step, (200, numbers) in float64."""
    whole: dict[str, list[Tensor]] = {}
    for half in range(2):
        for step in range(len(results[0]["seen"][half])):
            parts = [{"tensors": result["seen"][half][step]} for result in results]
            for name, tensor in toys.joined(parts).items():
                whole.setdefault(name, []).append(tensor.double())
    return {name: torch.stack(steps) for name, steps in whole.items()}


Law = Callable[[str, int], float]


def law(kind: str, step: int) -> float:
    """How much the weights after a step count in an average: once more, with the paper's exponents."""
    if kind == "ema":
        return 1 - min(0.95, (1 + step) / (10 + step))
    power = {"ema_0.05": 16.97, "ema_0.1": 6.94}[
        kind
    ] + 1  # figure 4 and appendix C give these for 5% and 10%
    return float(1 - (step / (step + 1)) ** power)


def average(
    path: dict[str, Tensor], kind: str, law: Law = law, dtype: torch.dtype = torch.float64
) -> Numbers:
    found = {name: tensor.flatten().to(dtype) for name, tensor in start().items()}
    for step in range(STEPS):
        share = law(kind, step)
        found = {
            name: (a.double() + share * (path[name][step] - a.double())).to(dtype)
            for name, a in found.items()
        }
    return found


def check_average(kept: Numbers, reference: Numbers, tolerance: float = 1e-6) -> None:
    gap = toys.distance(kept, reference)
    assert gap <= tolerance, f"{gap:.2g} away from the average of the masters"


def exact(kind: str, step: int) -> float:
    """`law` with all digits of the exponent."""
    return law(kind, step) if kind == "ema" else profiles.share(profiles.width_of(kind), None, step)  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", CELLS)
def test_t2_t14_averages_are_those_of_the_masters(
    runs_of: dict[tuple[int, str], list[dict[str, Any]]], cell: tuple[int, str]
) -> None:
    """200 steps, one skipped between, a resume at another stage halfway, accumulation 1, 2 and 4."""
    results = runs_of[cell]
    path, numbers = path_of(results), sum(map(torch.numel, start().values()))
    for kind in results[0]["kept"]:
        parts = [{"tensors": result["kept"][kind]} for result in results]
        check_average(toys.joined(parts, kind), average(path, kind, exact))
        check_average(toys.joined(parts, kind), average(path, kind), 3e-5)
        for part in parts:
            assert sum(map(torch.numel, part["tensors"].values())) <= 0.6 * numbers, "a rank keeps too much"


WRONG: dict[str, Any] = {
    "T2: on every micro-step": lambda kind, step: 1 - (1 - exact(kind, step)) ** 4,
    "T2: on the skipped step too": lambda kind, step: (
        1 - (1 - exact(kind, step)) ** 2 if step == SKIPPED else exact(kind, step)
    ),
    "T3: a counter that a resume forgets": lambda kind, step: exact(kind, step % TURN),
}


@pytest.mark.parametrize("wrong", [*WRONG, "T14: in bf16"])
def test_t2_t3_t14_catch(runs_of: dict[tuple[int, str], list[dict[str, Any]]], wrong: str) -> None:
    for cell in ((0, "fp32"), (0, "bf16")):
        path = path_of(runs_of[cell])
        for kind in runs_of[cell][0]["kept"]:
            dtype = torch.float64 if wrong in WRONG else torch.bfloat16
            broken = average(path, kind, WRONG.get(wrong, exact), dtype)
            with pytest.raises(AssertionError, match="away from"):
                check_average(broken, average(path, kind, exact), 3e-5)


def told_at(results: list[dict[str, Any]], half: int, kind: str) -> Tensor:
    """What the module answers with an average, by plain torch from its shards."""
    parts = [{"tensors": result["swaps"][half]["tensors"]} for result in results]
    plain, shapes = net(), start()
    plain.load_state_dict({n: t.view(shapes[n].shape) for n, t in toys.joined(parts, kind).items()})
    x = torch.randn(toys.GLOBAL, 12, generator=torch.Generator().manual_seed(0))[:1]
    return plain(x).detach()


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("cell", CELLS)
def test_t3_the_module_computes_with_an_average_and_nothing_is_changed(
    runs_of: dict[tuple[int, str], list[dict[str, Any]]], cell: tuple[int, str], half: int
) -> None:
    results = runs_of[cell]
    for kind in results[0]["kept"]:
        wanted, told = told_at(results, half, kind), results[0]["swaps"][half]
        near, far = (
            float((found - wanted).norm() / wanted.norm()) for found in (told["inside"][kind], told["live"])
        )
        assert near < (1e-6 if cell[1] == "fp32" else 2e-2), f"{kind} answers {near:.2g} away"
        assert far > 2 * near, f"the live weights answer like {kind}"
    for result in results:
        told = result["swaps"][half]
        assert told["back"] and told["after error"], "something is not what it was"
        assert not told["halfway"], "a swap that is not undone goes unseen"


def rebuild(place: Path) -> None:
    """A run that keeps two profiles and copies of them, and the same run that keeps one between them."""
    for name, told in (("two", {"ema__profiles": PROFILES}), ("between", {"ema__profiles": (0.07,)})):
        settings = config(place, (2, "fp32"), name=name, ema__snapshots=10, **told)
        engine = make(settings)
        with checkpoint.Writer(engine, {}, print, folder=settings.folder / "checkpoints", keep=1) as writer:
            while engine.step_count < 120:
                assert one_step(engine)
                if name == "two" and engine.step_count % 10 == 0:
                    writer.save("averages")
            writer.save()


def test_any_width_is_made_from_two_that_were_kept(tmp_path: Path) -> None:
    run_ranks(rebuild, 1, tmp_path, timeout=200)
    two, between = (
        checkpoint.Saved(checkpoint.path_of(tmp_path / name / "checkpoints", 120))
        for name in ("two", "between")
    )
    made = Rebuilt(two, 0.07)
    names = [*two.parameters]
    rebuilt, kept, last = (
        {name: read(name) for name in names}
        for read in (made.whole, lambda n: between.whole("ema_0.07", n), lambda n: two.whole("weight", n))
    )
    assert all(torch.equal(last[name], between.whole("weight", name)) for name in names), "two other runs"
    gap = toys.distance(rebuilt, kept) / toys.distance(last, kept)
    assert gap < 2 * made.error < 0.01, f"{gap:.2g} away, said was {made.error:.2g}"
    nearest = toys.distance({n: two.whole("ema_0.05", n) for n in names}, kept) / toys.distance(last, kept)
    assert nearest > 20 * gap, "the nearest that was kept would have done as well"
