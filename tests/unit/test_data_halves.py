"""With a prior, half of each batch is its own, the other half stays as it was, each counts right."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data.batch import Batch
from sfumato.data.halves import Halves, shares
from sfumato.data.index import Index, open_index
from sfumato.data.loader import Loader
from sfumato.data.order import Order, slice_of
from sfumato.data.samples import Samples
from sfumato.errors import UserError
from tests.unit.batches import Make, make, samples, steps
from tests.unit.pictures import config_of, picture, text_folder

Shares = Callable[[np.ndarray, int, float], np.ndarray]
SKS, DOG = "a photo of sks dog", "a photo of a dog"


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(0, 2**63 - 1),
)
def test_each_half_is_an_order_of_its_own(mine: list[int], prior: int, half: int, seed: int) -> None:
    repeats = [Fraction(1), Fraction(5, 2), Fraction(1, 3)][: len(mine)]
    order = Halves(np.array([[*mine, prior]]), [*repeats, Fraction(1)], 2 * half, seed, len(mine))
    alone = Order(np.array([mine]), repeats, half, seed)
    shown = Counter[int]()
    for step in range(12):
        batch, without = order.batch_at(step), alone.batch_at(step)
        for name in ("part", "member", "visit"):
            assert np.array_equal(getattr(batch, name)[0::2], getattr(without, name)), "the prior moves it"
        assert (batch.part[1::2] == len(mine)).all() and (batch.part[0::2] < len(mine)).all()
        shown.update(batch.member[1::2].tolist())
    counts = [shown[number] for number in range(prior)]
    # Batches are shuffled within an epoch: the one that begins in the last epoch may come late.
    assert max(counts) - min(counts) <= 2, "class images do not come equally often"


def test_every_micro_batch_of_even_size_is_balanced() -> None:
    order = Halves(np.array([[5, 7]]), [Fraction(1)] * 2, 8, 1, 1)
    part = order.batch_at(3).part
    for world, micro in ((1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (4, 2)):
        for turn in range(8 // world // micro):
            for rank in range(world):
                assert part[slice_of(rank, world, turn, micro)].mean() == 0.5


def check_apart(halves: Halves) -> None:
    """As many pictures as class images: no picture meets the same one in each epoch."""
    pairs = [Counter[int]() for _ in range(20)]
    for step in range(20 * 10):
        batch = halves.batch_at(step)
        pairs[batch.member[0]][int(batch.member[1])] += 1
    assert min(map(len, pairs)) > 3, "pictures and class images go in pairs"


def test_the_halves_are_not_shuffled_alike() -> None:
    counts, repeats = np.array([[20, 20]]), [Fraction(1)] * 2
    check_apart(Halves(counts, repeats, 2, 1, 1))
    broken = Halves(counts, repeats, 2, 1, 1)
    broken.orders[1] = broken.orders[0]  # as an order of the prior alone, with the first part's keys
    with pytest.raises(AssertionError, match="in pairs"):
        check_apart(broken)


# How much each sample counts.


def parts_of_micro(part: np.ndarray, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, len(part), size)]


def check_counts(shares: Shares, weight: float) -> None:
    """The sum over micro-batches is the mean over the ones plus weight times that over the others."""
    draw = np.random.default_rng(0)
    for part in ([0, 1] * 4, [0, 0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0, 1], [2, 0, 1, 2, 0, 1, 0, 0]):
        prior, losses = max(part), draw.random(8)
        mine = np.array(part) == prior
        wanted = losses[~mine].mean() + weight * losses[mine].mean()
        found = shares(np.array(part), prior, weight)
        assert found.dtype == np.float32
        for size in (1, 2, 4, 8):
            total = sum((losses[cut] * found[cut]).sum() for cut in parts_of_micro(found, size)) / 8
            assert total == pytest.approx(wanted, rel=1e-6), "a mean over other counts"


@pytest.mark.parametrize("weight", [1.0, 0.3, 2.0])
def test_the_counts_are_those_of_the_global_batch(weight: float) -> None:
    check_counts(shares, weight)


def by_chunk(part: np.ndarray, prior: int, weight: float) -> np.ndarray:
    """The usual way: each micro-batch of 4 has a mean over its own ones and one over its own others."""
    found = [shares(part[cut], prior, weight) for cut in parts_of_micro(part, 4)]
    return np.concatenate(found)


def halved(part: np.ndarray, prior: int, weight: float) -> np.ndarray:
    """chunk(2): whatever stands in the second half of a micro-batch of 4 is taken for the prior's."""
    second = np.arange(len(part)) % 4 >= 2
    return np.where(second, 2 * weight, 2.0).astype(np.float32)


def twice(part: np.ndarray, prior: int, weight: float) -> np.ndarray:
    return shares(part, prior, weight * weight)


@pytest.mark.parametrize("broken", [by_chunk, halved, twice])
def test_other_counts_are_caught(broken: Shares) -> None:
    with pytest.raises(AssertionError, match="other counts"):
        check_counts(broken, 2.0)


def test_a_batch_without_shares_is_left_alone() -> None:
    """To the very tensor: runs without a prior keep their bits."""
    losses = torch.rand(3)
    batch = Batch(**dict.fromkeys(("ids", "visits", "captions", "dropped", "size_and_crop", "draws")))  # type: ignore[arg-type]
    assert batch.weighed(losses) is losses


# Batches.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of a dog without captions, and nine of other dogs, one with a caption of its own."""
    folder = tmp_path_factory.mktemp("dreambooth")
    for name, count in (("mine", 5), ("prior", 9)):
        (folder / name).mkdir()
        for number in range(count):
            picture(number + 10 * count).save(folder / name / f"{number}.png")
    (folder / "prior" / "3.txt").write_text("a dog that sleeps")
    return folder


def settings_of(place: Path, **changes: Any) -> dict[str, Any]:
    prior = {"prompt": DOG, "source": str(place / "prior"), "weight": 0.5}
    return {"prompt": SKS, "prior": prior, "flip": True, "caption_dropout": 0.3} | changes


def check_captions(make: Make, place: Path) -> None:
    config = config_of(place / "mine", **settings_of(place, caption_prefix="(sks) ", tags={"shuffle": True}))
    loader = make(config)
    for batch in (batch for step in steps(loader, 0, 6) for batch in step):
        for number, caption, share in zip(batch.ids.tolist(), batch.captions, batch.share, strict=True):
            mine = number < 5
            allowed = {f"(sks) {SKS}"} if mine else {DOG, "a dog that sleeps"}
            assert caption in allowed, f"{'mine' if mine else 'the prior'} is called {caption!r}"
            assert float(share) == (2.0 if mine else 1.0)


def test_each_half_has_its_captions_and_its_weight(place: Path) -> None:
    check_captions(make, place)


def test_other_captions_are_caught(place: Path) -> None:
    class AllAlike(Loader):
        """Puts the same around every caption."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.samples.wording = [self.samples.data] * 2

    class Swapped(Samples):
        """Gives the pictures the prior's caption."""

        def batch(self, wanted: Any) -> Batch:
            batch = super().batch(wanted)
            batch.captions[:] = [DOG] * len(batch.captions)
            return batch

    class Misnamed(Loader):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.samples.__class__ = Swapped

    for broken, who in ((AllAlike, "the prior is called"), (Misnamed, "mine is called")):
        with pytest.raises(AssertionError, match=who):
            check_captions(lambda config, kind=broken: make(config, kind=kind), place)


def test_any_ranks_and_micro_batches_read_the_same(place: Path) -> None:
    """And any number of workers and resumes, for a sample's numbers are its own."""

    def read(rank: int = 0, world: int = 1, micro: int = 8, begin: int = 0) -> dict[Any, Any]:
        config = config_of(place / "mine", micro=micro, **settings_of(place))
        return samples(steps(make(config, rank, world), begin, 4 - begin))

    whole = read()
    assert len(whole) == 32
    for world, micro in ((2, 4), (2, 1), (4, 2)):
        found: dict[Any, Any] = {}
        for rank in range(world):
            found |= read(rank, world, micro)
        assert found == whole
    later = read(begin=2)
    assert later == {name: rows for name, rows in whole.items() if name in later} and len(later) == 16


def test_the_index_knows_the_prior_and_leaves_the_others_their_shares(place: Path) -> None:
    text_folder(place / "more", 4)
    parts = [{"source": str(place / "mine"), "weight": 3}, {"source": str(place / "more"), "weight": 1}]
    told = config_of(place, source="", parts=parts, **settings_of(place)).data
    alone = open_index(told.model_copy(update={"prior": None}))
    with_it = open_index(told)
    assert (alone.prior, with_it.prior) == (None, 2)
    assert [part.repeats for part in with_it.parts] == [*(part.repeats for part in alone.parts), 1]
    assert with_it.fingerprint != alone.fingerprint
    assert [with_it.name(n) for n in range(9)] == [alone.name(n) for n in range(9)]


def test_a_loader_refuses_an_index_without_the_prior(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(place / "mine", **settings_of(place))
    init = Index.__init__

    def without(self: Index, *args: Any) -> None:
        init(self, *args)
        self.prior = None

    monkeypatch.setattr(Index, "__init__", without)
    with pytest.raises(AssertionError, match="of other data"):
        make(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"buckets": True}, "squares of one size"),
        ({"resolution": [32, 64]}, "give one resolution"),
        ({"conditioning_column": "hint"}, "no second images"),
        ({"batch_size": 3, "micro": 1}, "give an even number"),
    ],
)
def test_what_a_prior_cannot_have_is_refused(place: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config_of(place / "mine", **settings_of(place, **changes))
