"""Records that are held out stay out of training, and what is asked about them is always the same."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato import changes, methods, validation
from sfumato.check import Plan, check
from sfumato.check.looks import turns
from sfumato.config import Config, parse
from sfumato.data import held as module
from sfumato.data.buckets import Cells
from sfumato.data.held import Held, Point, hash_of
from sfumato.data.loader import Loader
from sfumato.drawing.draw import share
from sfumato.engine.ranks import Ranks
from sfumato.errors import UserError
from sfumato.models.family import Family
from sfumato.validation import described, evaluating, summary, whole
from sfumato.validation.points import Points
from tests.unit import twins
from tests.unit.pictures import picture, text_folder, write_list

ALONE = Ranks(0, 1, torch.device("cpu"))


def config(place: Path, validation: Any = None, **changes: Any) -> Config:
    """A run on pictures of three shapes in buckets."""
    data: dict[str, Any] = {
        "source": str(place / "pictures"),
        "store": str(place / "store"),
        "resolution": 64,
        "buckets": {"step": 32},
        "flip": True,
        "caption_dropout": 0.5,
        "workers": 0,
    }
    values: dict[str, Any] = {"steps": 20, "batch_size": 4, "output": str(place / "runs")}
    values |= {"model": {"weights": str(twins.twin("sd"))}, "data": data | changes.pop("data", {})}
    return parse(values | changes | ({} if validation is None else {"validation": validation}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    add(folder / "pictures", range(30))
    text_folder(folder / "others", 5, (70, 90))
    return folder


def add(folder: Path, numbers: range) -> None:
    """Pictures of three shapes with captions."""
    folder.mkdir(exist_ok=True)
    for number in numbers:
        shape = ((64, 64), (40, 80), (90, 50))[number % 3]
        picture(number, shape).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"picture {number}\nno {number}\nnumber {number}")


def planned(asked: Config) -> Plan:
    return check(asked, 1, "cpu")


def held_of(plan: Plan) -> Held:
    assert plan.held is not None
    return plan.held


# Which records they are.


def names_of(held: Held) -> list[str]:
    return [held.index.name(number) for number in held.numbers.tolist()]


def check_kept_apart(before: Held, after: Held) -> None:
    """Fail if a record that was trained on is held out once others were added."""
    known = {before.index.name(number) for number in range(len(before.index))}
    moved = set(names_of(after)) & known - set(names_of(before))
    assert not moved, f"trained on, and now held out: {sorted(moved)}"


def by_number(count: int, data: Any, index: Any) -> dict[str, Any]:
    """A broken choice: evenly spread over the data as they are."""
    rows = [[place, round(place * (len(index) - 1) / count)] for place in range(count)]
    return {"rows": rows, "usable": len(index)}


@pytest.mark.parametrize("broken", [False, True])
def test_what_is_added_to_the_data_holds_out_nothing_that_was_trained_on(
    tmp_path: Path, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken:
        monkeypatch.setattr(module, "look", by_number)
    add(tmp_path / "pictures", range(30))
    before = held_of(planned(config(tmp_path, {"samples": 6})))
    add(tmp_path / "pictures", range(30, 75))
    after = held_of(planned(config(tmp_path, {"samples": 6}, seed=5)))
    assert len(before.numbers) == len(after.numbers) == 6 and len(after.index) == 75
    if broken:
        with pytest.raises(AssertionError, match="now held out"):
            check_kept_apart(before, after)
        return
    check_kept_apart(before, after)
    every = sorted((hash_of(after.index.name(number)), number) for number in range(75))
    assert after.numbers.tolist() == [number for _, number in every[:6]]


def seen_in(asked: Config, plan: Plan, cells: Cells, epochs: int) -> Counter[int]:
    """How often the steps of some epochs show each record."""
    loader = Loader(asked, plan.index, cells, 4, 8)
    found = Counter[int]()
    for step in range(loader.order.steps(epochs)):  # type: ignore[union-attr]
        for micro in range(loader.accumulation):
            wanted = loader.share(step, micro)
            found.update(cells.record(wanted.bucket, wanted.part, wanted.member).tolist())
    return found


def check_never_trained_on(seen: Counter[int], held: Held) -> None:
    shown = sorted(seen.keys() & set(held.numbers.tolist()))
    assert not shown, f"steps show {shown}, which are held out"


def test_t6_no_step_trains_on_what_is_held_out(place: Path) -> None:
    """And all others are trained on equally often; a hold-out that the cells know nothing of is caught."""
    asked = config(place, {"samples": 9})
    plan = planned(asked)
    held = held_of(plan)
    seen = seen_in(asked, plan, plan.cells, 8)
    check_never_trained_on(seen, held)
    assert seen.keys() | set(held.numbers.tolist()) == set(range(30)) and len(seen) == plan.records == 21
    # Of a bucket's stream less than a batch is left over for the next epoch.
    assert all(7 <= visits <= 8 for visits in seen.values()), seen
    whole_data = Cells.build(
        plan.index.folder, asked.data, plan.index.sizes, plan.index.part, len(plan.index.parts)
    )
    with pytest.raises(AssertionError, match="held out"):
        check_never_trained_on(seen_in(asked, plan, whole_data, 8), held)


def test_held_out_is_not_called_without_a_bucket(place: Path) -> None:
    plan = planned(config(place, {"samples": 9}))
    assert len(plan.cells.unplaced) == 0 and int(plan.cells.counts.sum()) == 21
    text = str(plan)
    assert "9 records held out, at 8 noise levels" in text and "without a bucket" not in text
    assert "epochs of 21 samples" in text


def test_other_data_are_another_run_and_other_looks_are_not(place: Path) -> None:
    plain, held = planned(config(place)), planned(config(place, {"samples": 9}))
    assert plain.fingerprint == plain.index.fingerprint != held.fingerprint
    assert planned(config(place, {"samples": 8})).fingerprint != held.fingerprint
    looks = {"samples": 9, "every": 3, "quantiles": 2}
    assert planned(config(place, looks, seed=9)).fingerprint == held.fingerprint
    apart = planned(config(place, {"source": str(place / "others")}))
    assert apart.fingerprint == plain.fingerprint and apart.records == 30
    assert "5 records of" in str(apart) and len(held_of(apart).numbers) == 5
    assert all(changes.free(f"validation{key}", config(place)) for key in ("", ".samples", ".source"))


def test_the_prior_is_never_held_out(place: Path) -> None:
    prior = {"prompt": "a picture", "source": str(place / "others")}
    changes: dict[str, Any] = {"buckets": None, "prior": prior}
    plan = planned(config(place, {"samples": 12}, data=changes))
    held, mine = held_of(plan), plan.index.prior
    assert mine is not None and (plan.index.part[held.numbers] != mine).all()
    assert plan.cells.counts[:, mine].sum() == 5 and plan.records == 18


def test_what_cannot_be_is_told(place: Path) -> None:
    def refused(asked: Any) -> str:
        with pytest.raises(UserError) as caught:
            planned(config(place, asked))
        return str(caught.value)

    assert "set validation.samples = 7" in refused({"samples": 16})
    assert "half of which" in refused(True)
    for source in ("pictures", ".", "pictures/000.png"):
        text = refused({"source": str(place / source)})
        assert "not apart from the data" in text, text
    assert 'validation.source = "' in refused({"source": str(place / "nowhere")})
    with pytest.raises(UserError, match=r"did you mean validation\.samples"):
        config(place, {"sampels": 3})


def test_links_do_not_lead_apart(place: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").symlink_to(place / "pictures")
    for link in (tmp_path / "photos", tmp_path / "photos" / "000.png"):
        with pytest.raises(UserError, match="not apart from the data"):
            planned(config(place, {"source": str(link)}))


def test_a_choice_is_found_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = held_of(planned(config(place, {"samples": 7})))
    monkeypatch.setattr(module, "look", lambda *_: pytest.fail("it looked again"))
    again = held_of(planned(config(place, {"samples": 7})))
    assert again.numbers.tolist() == first.numbers.tolist()


# What is asked about them.


@pytest.mark.parametrize("most", [1, 3, 4, 100])
def test_groups_hold_every_point_once_and_ranks_compute_equally_many(place: Path, most: int) -> None:
    held = held_of(planned(config(place, {"samples": 9})))
    groups = held.groups(8, most)
    points = [point for group in groups for point in group]
    assert len(points) == len(set(points)) == 9 * 8 and max(map(len, groups)) <= most
    for group in groups:
        assert len({tuple(held.sizes[point.record]) for point in group}) == 1
    for world in (1, 2, 3, 5):
        shares = [share(len(groups), rank, world) for rank in range(world)]
        assert len(set(map(len, shares))) == 1
        real = [turn for each in shares for turn in each if turn < len(groups)]
        assert sorted(real) == list(range(len(groups)))


@pytest.fixture(scope="module")
def points(place: Path) -> Points:
    return points_of(config(place, {"samples": 6}))


def points_of(asked: Config, family: Family | None = None) -> Points:
    plan = planned(asked)
    method = methods.build(asked, family or twins.family("sd"))
    found = Points.of(asked, plan.held, plan.cells, method, None, ALONE)
    assert found is not None
    return found


def test_levels_are_the_middles_of_equal_parts(points: Points) -> None:
    assert points.steps(1000) == [62, 187, 312, 437, 562, 687, 812, 937]
    assert points.steps(8) == list(range(8))


def check_same(one: Points, other: Points) -> None:
    """Fail unless two ask the same about each record, by its name."""
    ours, theirs = ({name: at for at, name in enumerate(names_of(each.held))} for each in (one, other))
    assert ours.keys() == theirs.keys()
    for name, at in ours.items():
        mine, yours = one.records[at], other.records[theirs[name]]
        assert torch.equal(mine.latents, yours.latents), "other latents"
        for part, rows in mine.condition.items():
            assert torch.equal(rows, yours.condition[part]), f"another {part}"
        shape = tuple(mine.latents.shape[1:])
        noise = [each.noise(Point(place, 3), shape) for each, place in ((one, at), (other, theirs[name]))]
        assert torch.equal(*noise), "other noise"


def test_seed_augmentation_and_cache_change_nothing(place: Path, points: Points) -> None:
    data: dict[str, Any] = {"flip": False, "caption_dropout": 1.0, "posterior": "mean", "center_crop": True}
    objective = {"noise_offset": 0.5, "input_perturbation": 0.3}
    check_same(points, points_of(config(place, {"samples": 6}, seed=8, data=data, objective=objective)))
    drawn = {"tags": {"shuffle": True, "dropout": 0.5}, "views": 2, "cache": "both"}
    check_same(points, points_of(config(place, {"samples": 6, "every": 7}, seed=9, data=drawn)))


def test_numbers_that_follow_the_run_are_caught(
    place: Path, points: Points, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfumato.validation.points.SEED", 4)
    with pytest.raises(AssertionError, match=r"another|other"):
        check_same(points, points_of(config(place, {"samples": 6})))


def test_a_record_is_shown_by_the_middle_of_its_picture_and_the_mean_of_its_moments(points: Points) -> None:
    family = twins.family("sd")
    batch = points.batch(0)
    assert batch.pixels is not None and not batch.draws.posterior.any()
    moments = family.moments(batch.pixels)
    right = family.scaled(moments.chunk(2, dim=1)[0])
    assert torch.equal(points.records[0].latents, right)
    original, target = batch.size_and_crop[0, :2].tolist(), batch.size_and_crop[0, 4:].tolist()
    assert target == points.held.sizes[0].tolist()
    scale = max(target[0] / original[0], target[1] / original[1])
    spare = [max(0, round(side * scale) - wanted) // 2 for side, wanted in zip(original, target, strict=True)]
    assert batch.size_and_crop[0, 2:4].tolist() == spare


def test_noise_is_of_its_own_for_every_point(points: Points) -> None:
    found = {
        points.noise(Point(n, level), (4, 8, 8)).numpy().tobytes() for n in range(6) for level in range(8)
    }
    assert len(found) == 48
    numbers = np.stack([points.noise(Point(n, 0), (4, 64, 64)).numpy() for n in range(6)])
    assert abs(numbers.mean()) < 0.02 and abs(numbers.std() - 1) < 0.02


def test_without_text_is_the_null_condition(points: Points) -> None:
    family = twins.family("sd")
    _, _, asked = points.inputs([Point(0, 0), Point(0, 1)])
    null = family.null_condition()["context"]
    assert torch.equal(asked["null_loss"]["context"], null.expand(2, -1, -1))
    assert not torch.equal(asked["loss"]["context"], asked["null_loss"]["context"])


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    add(tmp_path / "pictures", range(8))
    asked = config(tmp_path, {"samples": 4})
    [spoilt, *_] = names_of(held_of(planned(asked)))
    file = tmp_path / "pictures" / spoilt
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=rf"validation on {spoilt}"):
        points_of(asked)


def test_columns_of_the_data_are_those_of_its_own_source(tmp_path: Path) -> None:
    for folder, count in (("pictures", 6), ("held", 3)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            picture(number + count, (64, 64)).save(tmp_path / folder / f"{number}.png")
        rows = [{"file": f"{number}.png", "said": f"{folder} {number}"} for number in range(count)]
        write_list(tmp_path / folder, rows)
    data = {"image_column": "file", "caption_column": "said"}
    source = str(tmp_path / "held" / "metadata.jsonl")
    data["source"] = str(tmp_path / "pictures" / "metadata.jsonl")
    found = points_of(config(tmp_path, {"source": source}, data=data))
    assert {found.batch(place).captions[0] for place in range(3)} == {"held 0", "held 1", "held 2"}


# What is told.


def test_a_summary_is_of_float64_and_says_what_is_not_finite() -> None:
    losses = {"loss": np.array([[1e8, 1.0], [1.0, 1.0]]), "null_loss": np.array([[1e8, 2.0], [1.0, np.inf]])}
    told = summary(losses, [250, 750])
    assert told["loss"] == (1e8 + 3) / 4 and told["null_loss"] is told["gap"] is None
    assert told["quantiles"][0] == {"t": 250, "loss": (1e8 + 1) / 2, "null_loss": (1e8 + 1) / 2}
    assert told["quantiles"][1] == {"t": 750, "loss": 1.0, "null_loss": None}
    lines = [{"step": 3, "weights": kind} | told for kind in ("live", "ema")]
    assert described(lines) == (
        "validation at step 3: loss 2.5e+07, without text ?; ema: loss 2.5e+07, without text ?"
    )


@pytest.mark.parametrize(
    ("lines", "kept", "done"),
    [
        ([(0, "live"), (4, "live"), (4, "ema"), (8, "live"), (8, "ema")], 3, True),
        ([(0, "live"), (4, "live")], 2, False),
        ([(0, "live"), (8, "live")], 1, False),
        ([], 0, False),
    ],
)
def test_a_step_counts_as_told_once_all_its_lines_are(
    tmp_path: Path, lines: list[tuple[int, str]], kept: int, done: bool
) -> None:
    path = tmp_path / "validation.jsonl"
    assert not whole(path, 4, ["live", "ema"])
    text = "".join(json.dumps({"step": step, "weights": kind}) + "\n" for step, kind in lines)
    path.write_text(text + '{"step": 4, "weig')
    assert whole(path, 4, ["live", "ema"]) == done
    assert len(path.read_text().splitlines()) == kept


def test_after_looking_every_part_is_in_its_mode() -> None:
    net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Dropout(0.5)))
    net[1].eval()
    with pytest.raises(KeyError), evaluating(net):
        assert not any(part.training for part in net.modules())
        raise KeyError
    assert [part.training for part in net.modules()] == [True, True, False, False]


def test_the_plan_counts_passes(place: Path) -> None:
    text = str(planned(config(place, {"samples": 9, "every": 6}, ema={"enabled": True}, micro_batch_size=2)))
    # 72 points in twos, with and without text, of the weights and one average, at steps 0, 6, 12, 18 and 20;
    # training: 20 steps of 4 samples, each three forward passes' worth.
    assert f"5 times 144 forward passes on each rank: {5 * 288 / 240:.1%} of training's arithmetic" in text
    assert [turns(20, every) for every in (1, 6, 10, 20, 50)] == [21, 5, 3, 2, 2]
    assert validation.FILE == "validation.jsonl"
