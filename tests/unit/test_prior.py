"""Class images: which are missing, where they lie, what they depend on, and what becomes of them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sfumato import cache, prior
from sfumato.check import check
from sfumato.config import Config, parse
from sfumato.data.index import open_index
from sfumato.errors import UserError
from sfumato.prior import Pictures, fill
from tests.engine import runs
from tests.unit.pictures import picture

DOG = {"prompt": "a photo of a dog", "images": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior")
    runs.write_model("sd", folder / "sd")
    (folder / "pictures").mkdir()
    for number in range(3):
        picture(number, (64, 80)).save(folder / "pictures" / f"{number}.png")
    return folder


def config_of(place: Path, store: Path | None = None, **changes: Any) -> Config:
    told = {"data__prompt": "a photo of sks dog", "data__prior": DOG} | changes
    values = runs.settings(place, **told)
    values["output"] = str((store or place) / "runs")
    values["data"]["store"] = str((store or place) / "cache")
    return parse(values)


def write(pictures: Pictures, count: int) -> None:
    """Stand in for the drawing."""
    pictures.folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number, (pictures.side, pictures.side)).save(pictures.file(number))


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def test_only_whole_pictures_of_the_right_size_are_there(place: Path, tmp_path: Path) -> None:
    pictures = prior.find(config_of(place, tmp_path))
    assert pictures.missing() == [0, 1, 2, 3]
    write(pictures, 6)
    assert pictures.missing() == []
    whole = pictures.file(0).read_bytes()
    for broken in (b"", whole[:20], whole[: len(whole) // 2], whole[:-5], b"not a picture"):
        pictures.file(0).write_bytes(broken)
        assert pictures.missing() == [0], f"{len(broken)} bytes of {len(whole)} pass for a picture"
    flip_a_byte(pictures.file(1))
    Image.new("RGB", (32, 64)).save(pictures.file(2))
    pictures.file(3).unlink()
    assert pictures.missing() == [0, 1, 2, 3]


def test_the_size_alone_would_let_a_damaged_picture_pass(place: Path, tmp_path: Path) -> None:
    """Why `sound` reads checksums: headers are whole where the rest is not."""
    pictures = prior.find(config_of(place, tmp_path))
    write(pictures, 1)
    flip_a_byte(pictures.file(0))
    with Image.open(pictures.file(0)) as image:
        assert image.size == (64, 64)
    assert not pictures.sound(0)


def test_lists_of_several_numbers_do_not_disturb_each_other(place: Path, tmp_path: Path) -> None:
    def records(images: int) -> list[str]:
        config = config_of(place, tmp_path, data__prior=DOG | {"images": images})
        pictures = prior.find(config)
        if pictures.missing():
            write(pictures, images)
        pictures.finish()
        index = open_index(pictures.given(config).data)
        found = [index.record(number) for number in range(len(index))]
        mine = [record for record in found if record.part == index.prior]
        assert {text for record in mine for text in record.captions} == {DOG["prompt"]}
        assert {record.captions[0] for record in found if record not in mine} == {"a photo of sks dog"}
        return [record.name for record in mine]

    for images in (2, 6, 3):
        assert records(images) == [f"{number:06d}.png" for number in range(images)]
    [folder] = (tmp_path / "cache" / "prior").iterdir()
    before = (folder / "first-000002.jsonl").stat().st_mtime_ns
    assert records(2) == ["000000.png", "000001.png"]
    assert (folder / "first-000002.jsonl").stat().st_mtime_ns == before, "the index would be made anew"


def test_the_folder_is_that_of_all_that_a_picture_depends_on(place: Path, tmp_path: Path) -> None:
    def folder(**changes: Any) -> Path:
        return prior.find(config_of(place, **changes)).folder

    first = folder()
    changes: list[dict[str, Any]] = [
        {"data__prior": DOG | {"prompt": "a photo of a cat"}},
        {"data__prior": DOG | {"steps": 26}},
        {"data__prior": DOG | {"guidance": 4.0}},
        {"data__resolution": 128},
        {"model": {"weights": str(place / "sd"), "prompt_window": 150}},
    ]
    for part in ("unet", "vae", "text_encoder"):
        twin = tmp_path / part
        shutil.copytree(place / "sd", twin)
        [weights] = (twin / part).glob("*.safetensors")
        flip_a_byte(weights)
        changes.append({"model": {"weights": str(twin)}})
    found = {folder(**change) for change in changes}
    assert first not in found and len(found) == len(changes)
    shutil.copytree(place / "sd", tmp_path / "same")
    for harmless in (
        {"data__prior": DOG | {"images": 9, "weight": 0.5}},
        {"model": {"weights": str(tmp_path / "same")}},
        {"seed": 5, "name": "other", "method": {"kind": "lora"}},
    ):
        assert folder(**harmless) == first


def test_the_plan_says_what_will_be_drawn_and_draws_nothing(place: Path, tmp_path: Path) -> None:
    config = config_of(place, tmp_path)
    pictures = prior.find(config)
    write(pictures, 1)
    text = str(check(config, 1, "cpu"))
    assert f'3 class images of "a photo of a dog" will be drawn first, into {pictures.folder}' in text
    assert pictures.missing() == [1, 2, 3] and not config.folder.exists()
    # Half of each batch of 4 are class images.
    assert "4, which are 2.67 epochs of 3 samples" in text
    write(pictures, 4)
    plan = check(config, 1, "cpu")
    text = str(plan)
    assert "will be drawn" not in text and "4, which are 2.67 epochs of 3 samples" in text
    assert text.count("50.0% of the visits") == 2
    assert len(plan.index) == 7 and plan.index.prior == 1


def test_a_model_of_random_numbers_has_no_prior(place: Path) -> None:
    config = config_of(place, model={"weights": str(place / "sd"), "from_scratch": True})
    with pytest.raises(UserError, match=r"set data\.prior\.source"):
        check(config, 1, "cpu")


def test_a_store_within_the_data_is_refused(place: Path, tmp_path: Path) -> None:
    """Class images would become pictures of the instance, without a word."""
    shutil.copytree(place / "pictures", tmp_path / "all")
    (tmp_path / "link").symlink_to(tmp_path / "all")
    stores = ("all/cache", False), ("all", False), ("link/cache", False), ("all-cache", True)
    for store, good in stores:
        config = config_of(place, tmp_path, data__source=str(tmp_path / "all"))
        config = parse(config.model_dump() | {"data": config.data.model_dump() | {"store": tmp_path / store}})
        if good:
            prior.find(config)
            continue
        with pytest.raises(UserError, match="it lies within"):
            prior.find(config)


def test_pictures_that_never_appear_have_a_limit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = prior.find(config_of(place, tmp_path))
    write(pictures, 2)
    monkeypatch.setattr(fill, "SEEN", 0.0)
    with pytest.raises(UserError, match=r"2 of them, the first .*000002\.png, are not there"):
        fill.see(pictures)


def test_prune_frees_the_class_images_of_runs_that_are_gone(place: Path, tmp_path: Path) -> None:
    dog, cat = config_of(place, tmp_path), config_of(place, tmp_path, data__prior=DOG | {"prompt": "a cat"})
    folders = []
    for config, names in ((dog, ("one", "two")), (cat, ("three",))):
        pictures = prior.find(config)
        write(pictures, 4)
        for name in names:
            pictures.note(Path(config.output) / name)
        folders.append(pictures.folder)
    assert cache.prune(tmp_path / "cache", lambda line: None) == (0, 0)
    for name in ("one", "three"):
        (tmp_path / "runs" / name).rmdir()
    told: list[str] = []
    number, freed = cache.prune(tmp_path / "cache", told.append)
    assert number == 4 and freed > 4 * 64 * 64
    assert told == ['the runs are gone that read 4 class images of "a cat"']
    assert [folder.exists() for folder in folders] == [True, False]
    assert prior.find(dog).missing() == []
