"""Batches depend on (data, config, step) alone, and whatever goes wrong in a worker reaches the user in time."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.config import Config
from sfumato.data import draws
from sfumato.data.batch import Batch
from sfumato.data.folder import Folder
from sfumato.data.loader import Loader
from sfumato.data.sources import open_source
from sfumato.errors import UserError
from tests.unit.pictures import config_of, data_of, text_folder

Make = Callable[..., Loader]


def make(config: Config, rank: int = 0, world: int = 1) -> Loader:
    return Loader(config, open_source(config.data), latent_channels=4, vae_factor=8, rank=rank, world=world)


def steps(loader: Loader, begin: int, number: int) -> list[list[Batch]]:
    """Some steps' micro-batches; the workers end with it."""
    stream = loader.steps_from(begin)
    try:
        return list(islice(stream, number))
    finally:
        stream.close()  # type: ignore[attr-defined]


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch's tensors by name."""
    plain = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    drawn = {name: value for name, value in vars(batch.draws).items() if value is not None}
    return plain | drawn


def samples(batches: list[list[Batch]]) -> dict[tuple[int, int], list[Any]]:
    """(id, visit) -> everything that a batch says of that sample, as bytes."""
    found = {}
    for batch in (batch for step in batches for batch in step):
        for row, name in enumerate(zip(batch.ids.tolist(), batch.visits.tolist(), strict=True)):
            assert name not in found, f"sample {name} came twice"
            rows = [value[row].numpy().tobytes() for value in tensors(batch).values()]
            found[name] = [*rows, batch.captions[row]]
    return found


def check_equal(one: list[list[Batch]], other: list[list[Batch]]) -> None:
    """Bit for bit the same steps."""
    assert [len(step) for step in one] == [len(step) for step in other], "other numbers of micro-batches"
    for a, b in zip((x for step in one for x in step), (x for step in other for x in step), strict=True):
        assert a.captions == b.captions, "other captions"
        assert tensors(a).keys() == tensors(b).keys()
        for name, value in tensors(a).items():
            assert torch.equal(value, tensors(b)[name]), f"other {name}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 pictures, so that no batch size of these tests divides them."""
    return text_folder(tmp_path_factory.mktemp("set"), 21)


def test_shapes_and_types(place: Path) -> None:
    config = config_of(place, resolution=32, flip=True)
    [batch, *more] = steps(make(config), 0, 1)[0]
    assert len(more) == 3
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in tensors(batch).items()}
    f, i = torch.float32, torch.int64
    assert shapes == {
        "ids": ((2,), i),
        "visits": ((2,), i),
        "pixels": ((2, 3, 32, 32), f),
        "dropped": ((2,), torch.bool),
        "size_and_crop": ((2, 6), f),
        "posterior": ((2, 4, 4, 4), f),
        "noise": ((2, 4, 4, 4), f),
        "timestep": ((2,), f),
        "offset": ((2, 4, 1, 1), f),
    }
    assert batch.captions == [f"picture {number}" for number in batch.ids.tolist()]
    assert batch.pixels.is_contiguous() and batch.draws.perturbation is None


def test_perturbation_is_drawn_when_asked_for(place: Path) -> None:
    config = config_of(place)
    objective = config.objective.model_copy(update={"input_perturbation": 0.1})
    with_it = steps(make(config.model_copy(update={"objective": objective})), 0, 1)[0][0]
    without = steps(make(config), 0, 1)[0][0]
    assert with_it.draws.perturbation is not None
    assert not torch.equal(with_it.draws.perturbation, with_it.draws.noise)
    assert torch.equal(with_it.draws.noise, without.draws.noise), "a new stream changes no other"


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(place: Path, workers: int) -> None:
    settings: dict[str, Any] = {"flip": True, "caption_dropout": 0.3}
    alone = steps(make(config_of(place, workers=0, **settings)), 3, 5)
    check_equal(steps(make(config_of(place, workers=workers, **settings)), 3, 5), alone)


def test_workers_catches_a_worker_that_draws(place: Path) -> None:
    """torch's own generators, which each worker seeds with its number."""

    class Broken(Folder):
        def image(self, index: int) -> Image.Image:
            return super().image(index).rotate(90 * int(torch.randint(4, ())))

    def loader(workers: int) -> Loader:
        config = config_of(place, workers=workers)
        return Loader(config, Broken(place, config.data), 4, 8)

    with pytest.raises(AssertionError, match="other pixels"):
        check_equal(steps(loader(1), 0, 4), steps(loader(3), 0, 4))


def check_ranks(make: Make, place: Path) -> None:
    """T4: a global batch's noises are all distinct, and a sample's is the same for 1 and 2 ranks."""
    whole = samples(steps(make(config_of(place, micro=4)), 0, 6))
    for world, micro in ((2, 4), (2, 1), (4, 2)):
        parts: dict[tuple[int, int], list[Any]] = {}
        for rank in range(world):
            mine = steps(make(config_of(place, micro=micro), rank, world), 0, 6)
            found = samples(mine)
            assert not parts.keys() & found.keys(), "two ranks read the same sample"
            parts |= found
        assert parts == whole, f"{world} ranks read other numbers than one"
    for step in steps(make(config_of(place)), 0, 6):
        noises = [row.numpy().tobytes() for batch in step for row in batch.draws.noise]
        assert len(set(noises)) == 8, "two samples of a global batch share their noise"


def test_ranks(place: Path) -> None:
    check_ranks(make, place)


def test_ranks_catches_noise_drawn_by_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual trap: every rank seeds one generator with the run's seed and draws a whole batch."""

    class Broken(Loader):
        def steps_from(self, step: int) -> Iterator[list[Batch]]:
            running = torch.Generator().manual_seed(0)
            for batches in super().steps_from(step):
                for batch in batches:
                    batch.draws.noise.normal_(generator=running)
                yield batches

    def broken(config: Config, rank: int = 0, world: int = 1) -> Loader:
        return Broken(config, open_source(config.data), 4, 8, rank, world)

    with pytest.raises(AssertionError, match="other numbers"):
        check_ranks(broken, place)


def test_ranks_catches_one_noise_for_a_batch(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    normal = draws.normal

    def broken(seed: int, sample: int, visit: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
        return normal(seed, 0, visit, stream, shape)

    monkeypatch.setattr(draws, "normal", broken)
    with pytest.raises(AssertionError, match="share their noise"):
        check_ranks(make, place)


def ids(batches: list[list[Batch]]) -> list[int]:
    return [number for step in batches for batch in step for number in batch.ids.tolist()]


def check_resume(make: Make, place: Path, workers: int) -> None:
    """T7: 7 + 6 + 7 steps with two ends between are the 20 steps of one run, bit for bit."""
    whole = steps(make(config_of(place, workers=0)), 0, 20)
    parts = [steps(make(config_of(place, workers=workers)), *part) for part in ((0, 7), (7, 6), (13, 7))]
    joined = [step for part in parts for step in part]
    assert ids(joined) == ids(whole), "resumed runs read other samples"
    check_equal(joined, whole)
    assert max(Counter(ids(whole)).values()) - min(Counter(ids(whole)).values()) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_resume(place: Path, workers: int) -> None:
    check_resume(make, place, workers)


class Restarting(Loader):
    """Begins its epoch again when it is resumed."""

    def steps_from(self, step: int) -> Iterator[list[Batch]]:
        return super().steps_from(0)


class CountingMicroBatches(Loader):
    """Takes the step for a number of micro-batches."""

    def steps_from(self, step: int) -> Iterator[list[Batch]]:
        return super().steps_from(step // self.accumulation)


class ReadingAhead(Loader):
    """Resumes after what the workers had fetched, not after what was trained on."""

    def steps_from(self, step: int) -> Iterator[list[Batch]]:
        return super().steps_from(step + 1 if step else 0)


@pytest.mark.parametrize("broken", [Restarting, CountingMicroBatches, ReadingAhead])
def test_resume_catches(place: Path, broken: type[Loader]) -> None:
    with pytest.raises(AssertionError, match="other samples"):
        check_resume(lambda config: broken(config, open_source(config.data), 4, 8), place, 0)


def test_shares_of_drops_flips_and_captions(tmp_path: Path) -> None:
    """Drawn per sample and visit, each with its share: within 4 standard deviations."""
    text_folder(tmp_path, 10, (32, 48))
    lines = [f'{{"file_name": "{n:03}.png", "text": ["a", "b", "c"]}}\n' for n in range(10)]
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    config = config_of(tmp_path, batch_size=20, micro=20, flip=True, caption_dropout=0.2, resolution=32)
    batches = [batch for step in steps(make(config), 0, 30) for batch in step]
    number = 600

    def near(found: float, share: float) -> bool:
        return abs(found - share * number) < 4 * np.sqrt(number * share * (1 - share))

    dropped = torch.cat([batch.dropped for batch in batches])
    assert near(float(dropped.sum()), 0.2)
    mixed = [0 < int(batch.dropped.sum()) < 20 for batch in batches]
    assert all(mixed), "dropped by the batch"
    said = Counter(caption for batch in batches for caption in batch.captions)
    assert all(near(said[caption], 1 / 3) for caption in "abc")
    lefts = torch.cat([batch.size_and_crop[:, 3] for batch in batches])
    assert lefts.min() == 0 and lefts.max() == 16 and near(float((lefts < 8).sum()), 8 / 17)
    source = open_source(config.data)
    mirrored = 0
    for batch in batches:
        for row, index in enumerate(batch.ids.tolist()):
            left = int(batch.size_and_crop[row, 3])
            shown = np.asarray(source[index].image)[:, 16 - left : 48 - left, 0] / 127.5 - 1
            mirrored += bool(np.allclose(batch.pixels[row, 0].numpy(), shown[:, ::-1], atol=1e-6))
    assert near(mirrored, 0.5)


def test_center_crop_is_not_drawn(tmp_path: Path) -> None:
    text_folder(tmp_path, 3, (32, 48))
    config = config_of(tmp_path, center_crop=True, resolution=32)
    for step in steps(make(config), 0, 4):
        for batch in step:
            assert batch.size_and_crop.tolist() == [[32, 48, 0, 8, 32, 32]] * 2


def test_moved_and_pinned_batches_keep_their_numbers(place: Path) -> None:
    [batch] = steps(make(config_of(place, batch_size=2)), 0, 1)[0]
    moved = batch.to("meta")
    assert all(value.device.type == "meta" for value in tensors(moved).values())
    assert moved.captions == batch.captions
    check_equal([[batch.map(torch.Tensor.clone)]], [[batch]])
    check_equal([[batch.to("cpu")]], [[batch]])


def test_batch_that_ranks_cannot_share(place: Path) -> None:
    with pytest.raises(UserError, match="a multiple of 6"):
        make(config_of(place, batch_size=8, micro=2), 0, 3)


def test_global_generators_are_left_alone(place: Path) -> None:
    """The training process's own random state does not depend on the loader."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    steps(make(config_of(place, workers=1)), 0, 1)
    assert torch.equal(torch.random.get_rng_state(), before)


# When something goes wrong


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_picture_is_the_users(tmp_path: Path, workers: int) -> None:
    text_folder(tmp_path, 6)
    whole = (tmp_path / "004.png").read_bytes()
    (tmp_path / "004.png").write_bytes(whole[: len(whole) // 2])
    stream = make(config_of(tmp_path, workers=workers)).steps_from(0)
    with pytest.raises(UserError, match=r"the image .*004\.png"):
        list(islice(stream, 3))
    assert not active_children()


class Odd(Folder):
    """A source in which one picture is trouble."""

    trouble: Callable[[], None]

    def image(self, index: int) -> Image.Image:
        if index == 4:
            self.trouble()
        return super().image(index)


def odd(place: Path, trouble: Callable[[], None], **settings: Any) -> Loader:
    source = Odd(place, data_of(place))
    source.trouble = trouble
    return Loader(config_of(place, **settings), source, 4, 8)


def test_hanging_worker_ends_in_an_error(tmp_path: Path) -> None:
    loader = odd(text_folder(tmp_path, 6), lambda: time.sleep(3600), workers=2, worker_timeout=1.0)
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        list(islice(loader.steps_from(0), 3))
    assert time.monotonic() - begin < 30
    for word in ("the data of step 0", "004.png", "timed out after 1", "data.worker_timeout"):
        assert word in str(caught.value)
    assert not active_children(), "the stuck worker is still there"


def test_killed_worker_ends_in_an_error(tmp_path: Path) -> None:
    """What the kernel does when memory runs out."""
    loader = odd(text_folder(tmp_path, 6), lambda: os.kill(os.getpid(), signal.SIGKILL), workers=2)
    with pytest.raises(UserError, match=r"(?s)the data of step 0.*DataLoader worker"):
        list(islice(loader.steps_from(0), 3))
    assert not active_children()


def test_defect_in_a_worker_keeps_its_traceback(tmp_path: Path) -> None:
    def defect() -> None:
        raise KeyError("ours")

    loader = odd(text_folder(tmp_path, 6), defect, workers=1)
    with pytest.raises(KeyError, match="test_data_loader.py"):
        list(islice(loader.steps_from(0), 3))


def test_workers_outlive_the_signals_of_a_run(tmp_path: Path) -> None:
    """Slurm and Ctrl-C signal every process of the run; the main process still gets its batches."""
    caught: list[int] = []
    before = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in (2, 10, 12, 15)}
    stream = make(config_of(text_folder(tmp_path, 6), workers=2)).steps_from(0)
    try:
        next(stream)
        workers = active_children()
        assert len(workers) == 2
        for worker in workers:
            for number in (2, 10, 12, 15):
                os.kill(worker.pid or 0, number)
        assert len(list(islice(stream, 6))) == 6
        assert all(worker.is_alive() for worker in workers)
    finally:
        stream.close()  # type: ignore[attr-defined]
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not caught and not active_children()


@pytest.mark.parametrize("how", ["falls off the end", "raises", "is ended by SIGTERM", "is killed"])
def test_nothing_outlives_the_run(tmp_path: Path, how: str) -> None:
    """A process whose loader is still open ends in seconds, and its workers with it."""
    text_folder(tmp_path, 6)
    ending = {"raises": "raise SystemExit(3)"}.get(how, "")
    if how.startswith("is "):
        ending = "import time; time.sleep(60)"
    script = f"""
        from multiprocessing import active_children
        from tests.unit.pictures import config_of
        from tests.unit.test_data_loader import make

        stream = make(config_of({str(tmp_path)!r}, workers=2)).steps_from(0)
        next(stream)
        print(*[child.pid for child in active_children()], flush=True)
        {ending}
    """
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2
        if how == "is ended by SIGTERM":
            process.terminate()
        elif how == "is killed":
            process.kill()
        assert process.wait(20) == {"raises": 3, "is killed": -9, "is ended by SIGTERM": -15}.get(how, 0)
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end, "a worker is still there"
        time.sleep(0.2)


def test_many_micro_batches_do_not_use_up_files(place: Path) -> None:
    """A tensor from a worker holds an open file; a list of 64 micro-batches of 9 would be past the usual 1024."""
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    stream = make(config_of(place, batch_size=64, micro=1, workers=2)).steps_from(0)
    held = [next(stream), next(stream)]
    assert len(held[0]) == 64
    assert len(list(descriptors.iterdir())) - before < 60
    stream.close()  # type: ignore[attr-defined]
