"""Batches depend on (data, config, step) alone, and what goes wrong in a worker reaches the user in time."""

import json
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
from sfumato.data.batch import HOST, Batch
from sfumato.data.loader import Loader
from sfumato.data.samples import Samples
from sfumato.errors import UserError
from tests.unit.batches import Make, check_equal, ids, make, opened, samples, steps, tensors
from tests.unit.pictures import config_of, parquet_file, picture, ramp, text_folder


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

    class Broken(Samples):
        def image(self, *record: Any) -> torch.Tensor:
            return super().image(*record).rot90(int(torch.randint(4, ())), (1, 2))

    def loader(workers: int) -> Loader:
        made = make(config_of(place, workers=workers))
        made.samples.__class__ = Broken
        return made

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
        return make(config, rank, world, Broken)

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
        check_resume(lambda config: make(config, kind=broken), place, 0)


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
    index, _ = opened(config)
    mirrored = 0
    for batch in batches:
        for row, record in enumerate(batch.ids.tolist()):
            left = int(batch.size_and_crop[row, 3])
            with index.open(record) as file, Image.open(file) as image:
                shown = np.asarray(image)[:, 16 - left : 48 - left, 0] / 127.5 - 1
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
    where = {name: value.device.type for name, value in tensors(moved).items()}
    assert where == {name: "cpu" if name in HOST else "meta" for name in where}
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
    assert loader.index.record(0).captions == ["picture 0"]
    loader.index.open(0).close()  # the main process has read before it forks
    check_equal(steps(loader, 0, 6), steps(make(config_of(place)), 0, 6))
    copy = pickle.loads(pickle.dumps(loader.samples))
    check_equal([[copy[loader.share(5, 0)]]], [steps(make(config_of(place)), 5, 1)[0][:1]])


def test_global_generators_are_left_alone(place: Path) -> None:
    """The training process's own random state does not depend on the loader."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    steps(make(config_of(place, workers=1)), 0, 1)
    assert torch.equal(torch.random.get_rng_state(), before)


BUCKETS = {"min": 32, "max": 64, "step": 16}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 pictures of five shapes."""
    place = tmp_path_factory.mktemp("shapes")
    sizes = [(48, 48), (96, 50), (50, 96), (100, 130), (130, 100)]
    for number in range(17):
        picture(number, sizes[number % 5]).save(place / f"{number:03}.png")
        (place / f"{number:03}.txt").write_text(f"picture {number}\n", encoding="utf-8")
    return place


def test_a_step_is_of_one_bucket_and_says_what_it_shows(shapes: Path) -> None:
    """T9 in buckets: the numbers are those of the pixels, for every size, crop and flip, on 1 and 2 ranks."""
    config = config_of(shapes, batch_size=4, resolution=48, buckets=BUCKETS, flip=True)
    loader = make(config)
    seen = set()
    index, _ = opened(config)
    for number, step in enumerate(steps(loader, 0, 24)):
        targets = {tuple(row) for batch in step for row in batch.size_and_crop[:, 4:].int().tolist()}
        assert len(targets) == 1, f"step {number} is of {targets}"
        [target] = targets
        seen.add(target)
        for batch in step:
            assert batch.pixels is not None and tuple(batch.pixels.shape[2:]) == target
            assert tuple(batch.draws.noise.shape[2:]) == (target[0] // 8, target[1] // 8)
            assert batch.size_and_crop[:, :2].tolist() == [
                list(index.record(i).size) for i in batch.ids.tolist()
            ]
    assert len(seen) >= 3
    one = samples(steps(make(config), 0, 10))
    two = {}
    for rank in range(2):
        two |= samples(steps(make(config, rank, 2), 0, 10))
    assert one == two, "two ranks read other numbers than one"


def test_several_resolutions_show_each_picture_at_each(place: Path) -> None:
    config = config_of(place, batch_size=3, micro=3, resolution=[32, 48])
    loader = make(config)
    batches = steps(loader, 0, 14)  # one epoch: 2 x 21 samples
    sides = Counter((number, batch.pixels.shape[-1]) for [batch] in batches for number in batch.ids.tolist())
    assert sides == Counter((number, side) for number in range(21) for side in (32, 48))
    samples(batches)  # no sample comes twice


def test_views_come_in_turn(place: Path) -> None:
    """With two views the third visit shows what the first did, with another noise."""
    config = config_of(place, batch_size=21, micro=21, resolution=32, flip=True, views=2)
    shown: dict[int, list[bytes]] = {}
    noises: dict[int, set[bytes]] = {}
    for [batch] in steps(make(config), 0, 4):
        for row, number in enumerate(batch.ids.tolist()):
            shown.setdefault(number, []).append(batch.pixels[row].numpy().tobytes())
            noises.setdefault(number, set()).add(batch.draws.noise[row].numpy().tobytes())
    assert all(views[0] == views[2] and views[1] == views[3] for views in shown.values())
    assert sum(views[0] != views[1] for views in shown.values()) > 15
    assert all(len(several) == 4 for several in noises.values())


def test_a_mean_posterior_draws_nothing(place: Path) -> None:
    [batch] = steps(make(config_of(place, batch_size=2, posterior="mean")), 0, 1)[0]
    assert not batch.draws.posterior.any() and batch.draws.noise.any()


def test_hints_are_cut_as_their_pictures(tmp_path: Path) -> None:
    """The conditioning image has half the size, and the same window is cut out of it."""
    (tmp_path / "a").mkdir()
    lines = []
    for number in range(4):
        image = ramp(60 + 20 * number, 90)
        image.save(tmp_path / "a" / f"{number}.png")
        image.resize((45, 30 + 10 * number)).save(tmp_path / "a" / f"hint-{number}.png")
        row = {"image": f"a/{number}.png", "hint": f"a/hint-{number}.png", "text": "x"}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(lines))
    config = config_of(tmp_path, batch_size=4, micro=4, resolution=32, flip=True, conditioning_column="hint")
    for [batch] in steps(make(config), 0, 6):
        assert batch.hint is not None and batch.hint.shape == (4, 3, 32, 32)
        assert batch.hint.min() >= 0 and batch.hint.max() <= 1
        gap = (batch.pixels + 1) / 2 - batch.hint
        assert gap[:, :, 2:-2, 2:-2].abs().max() < 0.03, "another window"
