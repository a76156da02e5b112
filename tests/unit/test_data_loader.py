"""Batches depend on (data, config, step) alone, and what goes wrong in a worker reaches the user in time."""

import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.config import Config
from sfumato.data import draws
from sfumato.data.batch import Batch
from sfumato.data.folder import Folder
from sfumato.data.loader import Loader
from sfumato.data.sources import files_under, open_source
from sfumato.errors import UserError
from tests.unit.batches import Make, check_equal, ids, make, samples, steps, tensors
from tests.unit.pictures import config_of, parquet_file, text_folder


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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(place: Path, workers: int) -> None:
    settings: dict[str, Any] = {"flip": True, "caption_dropout": 0.3}
    alone = steps(make(config_of(place, workers=0, **settings)), 3, 5)
    check_equal(steps(make(config_of(place, workers=workers, **settings)), 3, 5), alone)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_catches_a_worker_that_draws(place: Path) -> None:
    """torch's own generators, which each worker seeds with its number."""

    class Broken(Folder):
        def image(self, index: int) -> Image.Image:
            return super().image(index).rotate(90 * int(torch.randint(4, ())))

    def loader(workers: int) -> Loader:
        config = config_of(place, workers=workers)
        return Loader(config, Broken(place, files_under(place), config.data), 4, 8)

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


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tables_in_workers(place: Path, tmp_path: Path, kind: str) -> None:
    """Every layout of the same pictures gives the same batches, also from processes that were forked."""
    cells = [{"bytes": (place / f"{n:03}.png").read_bytes(), "path": None} for n in range(21)]
    captions = [f"picture {n}" for n in range(21)]
    if kind == "parquet":
        parquet_file(tmp_path / "x.parquet", cells, captions)
    else:
        datasets.Dataset.from_dict({"image": cells, "text": captions}).save_to_disk(str(tmp_path))
    loader = make(config_of(tmp_path, workers=2))
    assert loader.source[0].captions == ["picture 0"]  # the main process has read before it forks
    check_equal(steps(loader, 0, 6), steps(make(config_of(place)), 0, 6))
    copy = pickle.loads(pickle.dumps(loader.samples))
    check_equal([[copy[next(loader.wanted(5))]]], [steps(make(config_of(place)), 5, 1)[0][:1]])


def test_global_generators_are_left_alone(place: Path) -> None:
    """The training process's own random state does not depend on the loader."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    steps(make(config_of(place, workers=1)), 0, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
