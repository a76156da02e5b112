"""DreamBooth: class images are drawn once, each half counts right, runs resume, any ranks do the same."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato import prior
from sfumato.config import parse
from sfumato.data.halves import shares
from sfumato.engine import ranks
from sfumato.engine.engine import Engine
from sfumato.errors import UserError
from sfumato.prior import fill
from tests.engine import runs, toys
from tests.engine.ranks import RankError, run_ranks
from tests.engine.test_training import check_same_bits

DOG = {"prompt": "a photo of a dog", "images": 4, "steps": 2}
METHODS = {
    "full": {"kind": "full", "text_encoders": True},
    "lora": {"kind": "lora", "rank": 4, "text_encoders": True},
}
Job = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dreambooth")
    runs.write_model("sd", folder / "sd")
    runs.write_pictures(folder / "pictures", 5)
    (folder / "pictures" / "metadata.jsonl").unlink()
    return folder


def job(place: Path, name: str, kind: str = "full", **changes: Any) -> Job:
    told = {"data__prompt": "a photo of sks dog", "data__prior": DOG, "ema__enabled": False}
    told |= {"checkpoint__export": False} | changes
    return runs.settings(place, name=name, **told) | {"method": METHODS[kind]}


def train(jobs: list[Job], world: int = 1) -> list[Path]:
    return [export.parent for export in run_ranks(runs.train_bare, world, jobs, timeout=280)[0]]


def curve(run: Path) -> list[float]:
    return [line["loss"] for line in runs.metrics(run)]


def drawn(place: Path, store: str = "cache") -> dict[str, tuple[int, bytes]]:
    """The class images by name: when they were written, and what they hold."""
    files = sorted((place / store / "prior").glob("*/*.png"))
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


# The loss.


def test_the_loss_is_the_mean_of_one_half_plus_weight_times_that_of_the_other(place: Path) -> None:
    """Of a run's first step, from the weights 1 and 2 and the run without prior and with half the batch."""
    changes = [{"data__prior": DOG | {"weight": weight}} for weight in (1, 2, 4)]
    changes.append({"data__prior": None, "batch_size": 2})
    jobs = [job(place, f"loss-{n}", "lora", steps=1, **change) for n, change in enumerate(changes)]
    one, two, four, without = (curve(run)[0] for run in train(jobs))
    check_weights(one, two, four, without)
    class_images = two - one
    with pytest.raises(AssertionError):  # weight applied twice
        check_weights(one, without + 4 * class_images, without + 16 * class_images, without)
    with pytest.raises(AssertionError):  # a mean over all
        check_weights(one / 2, two / 2, four / 2, without)


def check_weights(one: float, two: float, four: float, without: float) -> None:
    assert one - (two - one) == pytest.approx(without, rel=1e-5), "the pictures' part is another"
    assert four - two == pytest.approx(2 * (two - one), rel=1e-4), "the class images' part is not in weights"


PART = np.array([0, 0, 0, 1, 1, 1, 1, 0])  # 3 + 1 and 1 + 3 in micro-batches of 4
WEIGHT = 0.7


def weighed_steps(jobs: list[tuple[int, bool]]) -> list[dict[str, Any]]:
    """One step of plain gradient descent with each size of micro-batch; its loss and its weights."""
    found = []
    for micro, by_chunk in jobs:
        engine: Engine = toys.make(toys.config(micro_batch_size=micro))
        for turn in range(engine.accumulation):
            first = (turn * engine.ranks.world + engine.ranks.rank) * micro
            rows = slice(first, first + micro)
            whole = PART[rows] if by_chunk else PART
            share = torch.from_numpy(shares(whole, 1, WEIGHT))
            losses = toys.losses_of(engine, rows, 0, engine.dtype)
            engine.backward(losses * (share if by_chunk else share[rows]))
            engine.step()
        own = toys.checkpoint.own_tensors(engine)
        found.append({"loss": engine.metrics()["loss"], "tensors": own})
    return found


def in_double() -> tuple[float, dict[str, torch.Tensor]]:
    """The same loss and the weights after one step, in float64 and in the words of its definition."""
    net = toys.unet().double()
    net.load_state_dict({name: numbers.double() for name, numbers in toys.start_weights().items()})
    x, t, text, target = toys.global_batch(0)
    error = net(x.double(), t, text.double()).sample - target.double()
    losses, mine = error.square().mean((1, 2, 3)), torch.from_numpy(PART == 0)
    loss = losses[mine].mean() + WEIGHT * losses[~mine].mean()
    loss.backward()
    return loss.item(), {name: -p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("world", [1, 2])
def test_losses_and_gradients_are_those_in_float64(world: int) -> None:
    loss, steps = in_double()
    start = toys.start_weights()

    def check(results: list[dict[str, Any]]) -> None:
        assert float(np.mean([result["loss"] for result in results])) == pytest.approx(loss, rel=1e-5)
        moved = {
            name: numbers.double() - start[name].flatten() for name, numbers in toys.joined(results).items()
        }
        assert toys.distance(moved, steps) < 1e-4

    jobs = [(1, False), (2, False), (4, False), (4, True)]
    *good, broken = zip(*run_ranks(weighed_steps, world, jobs, timeout=200), strict=True)
    for results in good:
        check(list(results))
    with pytest.raises(AssertionError):  # the usual mean over each micro-batch's own halves
        check(list(broken))


# Whole runs.


def test_class_images_are_drawn_once_and_alike_by_any_ranks(place: Path) -> None:
    [first] = train([job(place, "micro-4", micro_batch_size=4, steps=2)])
    made = drawn(place)
    assert len(made) == 4 and len({content for _, content in made.values()}) == 4
    cached = job(place, "cached", data__cache="images", data__views=2, steps=2)
    again, _ = train([job(place, "micro-1", micro_batch_size=1, steps=2), cached])
    assert drawn(place) == made, "they were drawn again"
    [two] = train([job(place, "two", data__store=str(place / "other"), steps=2)], 2)[:1]
    others = drawn(place, "other")
    assert [content for _, content in others.values()] == [content for _, content in made.values()]
    for run in (again, two):
        assert curve(run) == pytest.approx(curve(first), rel=1e-5), f"{run.name} has another curve"
    assert len(curve(place / "runs" / "cached")) == 2


def test_a_run_resumes_to_the_bit(place: Path) -> None:
    """2 + 2 steps are 4; in the third the order of the pictures, two of five a step, begins anew."""
    asked = (("4", 4), ("2", 2), ("2", 4))
    left = train([job(place, f"{kind}-{name}", kind, steps=n) for kind in METHODS for name, n in asked])
    check_resumed(left[0], left[2])
    check_resumed(left[3], left[5])


def check_resumed(straight: Path, stopped: Path) -> None:
    for what in ("weight", "exp_avg", "exp_avg_sq"):
        check_same_bits(runs.tensors_of(stopped, what), runs.tensors_of(straight, what))
    assert curve(stopped) == curve(straight) and len(curve(straight)) == 4
    moved = {name.split(".")[0] for name in runs.tensors_of(straight)}
    assert moved == {"unet", "text_encoder"}


class Killed(BaseException):
    """In place of a kill."""


def drawing_in_turns(values: Job, store: str) -> list[dict[str, tuple[int, bytes]]]:
    """A drawing that ends after two pictures, one that goes on, one of a damaged file, and one of more."""
    place, save = Path(store).parent, fill.save
    runs.without_exports()
    found = []

    def dying(pictures: Any, number: int, drawing: Any) -> None:
        if number == 2:
            raise Killed
        save(pictures, number, drawing)

    fill.save = dying
    with pytest.raises(Killed):
        runs.train_here(values)
    fill.save = save
    found.append(drawn(place))
    runs.train_here(values)
    found.append(drawn(place))
    file = next((place / "cache" / "prior").glob("*/000001.png"))
    file.write_bytes(file.read_bytes()[:-20])
    for images in (4, 6, 3):
        values["data"]["prior"]["images"] = images
        runs.train_here(values | {"name": f"images-{images}"})
        found.append(drawn(place))
    assert values["data"]["prior"].get("source") is None
    return found


def test_a_drawing_goes_on_and_only_what_is_missing_is_drawn(place: Path, tmp_path: Path) -> None:
    for name in ("sd", "pictures"):
        (tmp_path / name).symlink_to(place / name)
    values = job(tmp_path, "turns", "lora", steps=1, data__prior=dict(DOG))
    [turns] = run_ranks(drawing_in_turns, 1, values, str(tmp_path / "cache"), timeout=200)
    killed, whole, mended, more, fewer = turns
    assert sorted(killed) == ["000000.png", "000001.png"]
    assert len(whole) == 4 and all(whole[name] == killed[name] for name in killed)
    assert [name for name in whole if mended[name] != whole[name]] == ["000001.png"]
    assert mended["000001.png"][1] == whole["000001.png"][1], "the same number is another picture"
    assert len(more) == 6 and all(more[name] == mended[name] for name in mended)
    assert fewer == more
    resolved = parse(values)
    assert prior.find(resolved).missing() == []


def test_pictures_that_are_not_finite_are_refused(place: Path, tmp_path: Path) -> None:
    runs.write_model("sd", tmp_path / "sd")
    (tmp_path / "pictures").symlink_to(place / "pictures")
    file = tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_in.bias"].fill_(float("nan"))
    save_file(weights, file)
    [error] = run_ranks(refusal, 1, job(tmp_path, "broken", "lora"), timeout=100)
    assert "class image 0" in error and "not finite" in error
    assert not drawn(tmp_path)


def slow_neighbour(values: Job) -> None:
    """Rank 1 takes longer than rank 0 waits."""
    place, config = ranks.start(values["engine"]["timeout"]), parse(values)
    pictures = prior.find(config)
    if not place.first:
        time.sleep(60)
    fill.fill(config, pictures, pictures.missing(), place, torch.float32, torch.float32)


def test_waiting_for_another_ranks_pictures_has_a_limit(place: Path, tmp_path: Path) -> None:
    values = job(place, "slow", engine__timeout=4, data__store=str(tmp_path / "store"))
    with pytest.raises(RankError) as caught:
        run_ranks(slow_neighbour, 2, values, timeout=50, init=False)
    assert isinstance(caught.value.error, UserError)
    assert "rank 0 has drawn its share" in str(caught.value.error)
    assert "engine.timeout = 4 s" in str(caught.value.error)


def refusal(values: Job) -> str:
    with pytest.raises(UserError) as caught:
        runs.train_here(values)
    return str(caught.value)
