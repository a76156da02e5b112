"""A checkpoint on disk: that it comes back as written, and that each kind of damage is seen and named."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfumato.check import check_folder
from sfumato.config import parse
from sfumato.engine import published, saved, size
from sfumato.errors import UserError

SHAPES = {"unet.a.weight": [3, 4], "unet.b": [5]}


def write_checkpoint(folder: Path, step: int, config: dict | None = None, data: str = "") -> Path:
    """A checkpoint of two ranks, each with a part of both parameters; published."""
    part = folder / f".step-{step:06d}.part"
    part.mkdir(parents=True)
    files = {}
    for rank, cut in enumerate((slice(0, 2), slice(2, None))):
        tensors = {
            f"{kind}/{name}/{cut.start}": numbers_of(kind, name, step)[cut].contiguous()
            for kind in ("weight", "ema")
            for name in SHAPES
        }
        name = f"rank-{rank:05d}.safetensors"
        files[name] = saved.write(part / name, tensors)
    told = {"config": config or {}, "data": data, "left_out": [], "scaler": {}, "samples": step * 4}
    told |= {"step": step, "position": step, "parameters": SHAPES, "files": files, "export": {}}
    published.write_manifest(part, told)
    final = published.path_of(folder, step)
    published.publish(part, final)
    return final


def numbers_of(kind: str, name: str, step: int) -> torch.Tensor:
    """What was saved, flattened."""
    draw = torch.Generator().manual_seed(step + len(kind + name))
    return torch.randn(torch.Size(SHAPES[name]).numel(), generator=draw)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoints", 500)


def test_it_comes_back_to_the_bit(path: Path) -> None:
    found = saved.Saved(path)
    assert (found.step, found.position, found.kinds) == (500, 500, {"weight", "ema"})
    for kind in ("weight", "ema"):
        for name, shape in SHAPES.items():
            whole = numbers_of(kind, name, 500)
            assert torch.equal(found.whole(kind, name), whole.view(shape))
            assert torch.equal(found.read(kind, name, 1, 3), whole[1:4]), "across two ranks' parts"
    assert found.problems() == []
    with pytest.raises(UserError, match="0 of 5 numbers"):
        found.read("exp_avg", "unet.b", 0, 5)


def test_what_is_written_is_safetensors_with_its_sum(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(7).bfloat16(),
        "none": torch.empty(0),
        "whole": torch.randn(1000),
        "other": torch.randn(3).half(),
    }
    told = saved.write(tmp_path / "file", tensors)
    assert told == published.entry(tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
               for name, tensor in tensors.items())  # fmt: skip
    assert saved.write(tmp_path / "file", {}) == published.entry(tmp_path / "file")
    assert load_file(tmp_path / "file") == {}


def copied(memory: saved.Memory, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return memory.fill({name: (t.numel(), t.dtype) for name, t in tensors.items()}, tensors.items())


def test_copies_are_real_and_their_memory_is_used_again() -> None:
    memory = saved.Memory(torch.device("cpu"))
    memory.CHUNK = 256  # several chunks, one tensor larger than a chunk
    live = {"a": torch.randn(10), "b": torch.randn(30).bfloat16(), "c": torch.randn(200), "d": torch.randn(1)}
    before = {name: tensor.clone() for name, tensor in live.items()}
    copies = copied(memory, live)
    for tensor in live.values():
        tensor.zero_()
    assert all(torch.equal(copies[name], tensor) for name, tensor in before.items())
    places = {name: copy.data_ptr() for name, copy in copies.items()}
    assert {name: copy.data_ptr() for name, copy in copied(memory, live).items()} == places
    assert not any(copy.any() for copy in copies.values())
    assert [*copied(memory, {"b": live["b"]})] == ["b"], "of a few alone"
    assert {name: copy.data_ptr() for name, copy in copied(memory, live).items()} == places
    assert copied(memory, {"a": torch.ones(11)})["a"].tolist() == [1] * 11


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


RANK = "rank-00001.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (lambda path: flip(path / RANK, -1), f"{RANK} does not hold what was written"),
    "cut": (lambda path: os.truncate(path / RANK, 100), f"{RANK} has 100 of its"),
    "empty": (lambda path: os.truncate(path / RANK, 0), f"{RANK} has 0 of its"),
    "deleted": (lambda path: (path / RANK).unlink(), f"{RANK} is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "a byte of the manifest": (
        lambda path: edit(path, '"samples": 2000', '"samples": 2001'),
        "manifest.json is not as it was written",
    ),
    "a file that the disk does not give": (
        lambda path: (path / "notes").symlink_to("/proc/self/mem"),
        "notes cannot be read: Input/output error",
    ),
    "half a manifest": (
        lambda path: os.truncate(path / "manifest.json", 300),
        "manifest.json cannot be read",
    ),
    "a manifest of another thing": (
        lambda path: (path / "manifest.json").write_text("[]"),
        "manifest.json is not as it was written",
    ),
}


def edit(path: Path, old: str, new: str) -> None:
    text = (path / "manifest.json").read_text()
    assert old in text
    (path / "manifest.json").write_text(text.replace(old, new))


def found_wrong(path: Path) -> str:
    try:
        return "; ".join(saved.Saved(path).problems())
    except published.Damaged as error:
        assert str(path) in str(error)
        return error.wrong


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(path: Path, damage: str) -> None:
    spoil, said = DAMAGE[damage]
    spoil(path)
    assert found_wrong(path).startswith(said)


def test_the_sums_are_shared_by_the_ranks(path: Path) -> None:
    for name in ("rank-00000.safetensors", RANK):
        flip(path / name, -1)
    opened = saved.Saved(path)
    shares = [opened.problems(rank, 2) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 0] and shares[0] != shares[1]


def test_another_format_says_what_to_do(path: Path) -> None:
    text = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(text | {"format": 4, "files": "otherwise"}))
    with pytest.raises(UserError, match="its format is 4, this version reads 3(.|\n)*newer version"):
        saved.Saved(path)
    (path / "manifest.json").unlink()
    (path / "state.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="its format is 2, this version reads 3(.|\n)*older version"):
        saved.Saved(path)


def test_a_manifest_leads_nowhere_else(path: Path) -> None:
    told = published.read_manifest(path)
    files = told.pop("files")
    published.write_manifest(path, told | {"files": {"../../elsewhere.safetensors": files[RANK]}})
    assert "which is no rank's file" in found_wrong(path)


def test_names_and_what_a_path_stands_for(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert published.steps_in(folder) == [] and published.checkpoint_of(tmp_path) is None
    for step in (20, 3, 1_000_000):
        write_checkpoint(folder, step)
    (folder / "step-7").mkdir()
    (folder / "step-000009").write_text("a file")
    (folder / "step-0000008").mkdir()
    aside = published.set_aside(published.path_of(folder, 20))
    assert published.steps_in(folder) == [3, 1_000_000]
    assert published.checkpoint_of(tmp_path) == folder / "step-1000000"
    assert published.checkpoint_of(folder / "step-000003") == folder / "step-000003"
    write_checkpoint(folder, 20)
    again = published.set_aside(published.path_of(folder, 20))
    assert [aside, again] == published.damaged_in(folder) and again.name == "step-000020.damaged-2"


def test_what_a_kill_left_is_finished_or_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        write_checkpoint(folder, step)
    shutil.copytree(folder / "step-000003", folder / ".step-000004.part")
    (folder / "step-000001").rename(folder / ".step-000001.old")  # killed while it was being pruned
    (folder / "step-000002").rename(folder / ".step-000002.before")  # killed between two renames
    shutil.copytree(folder / "step-000003", folder / ".step-000003.before")  # killed after both
    said = published.tidy(folder)
    assert published.steps_in(folder) == [2, 3] and not [*folder.glob(".*")]
    assert found_wrong(folder / "step-000002") == ""
    assert len(said) == 3 and all(f"step-00000{n}" in " ".join(said) for n in (1, 2, 4)), said
    assert published.tidy(folder) == []


def test_one_of_the_same_step_is_replaced(path: Path) -> None:
    (path / "mark").touch()
    write_checkpoint(path.parent, 500)
    assert not (path / "mark").exists() and sorted(p.name for p in path.parent.iterdir()) == [path.name]


@pytest.mark.parametrize(
    ("every", "keep", "of", "steps", "count"),
    [
        (10, 2, None, 100, 3),
        (10, 20, None, 95, 10),
        (10, 2, 50, 100, 5),
        (3, 1, 2, 12, 4),
        (500, 2, None, 7, 1),
    ],
)
def test_the_most_that_lie_on_disk(every: int, keep: int, of: int | None, steps: int, count: int) -> None:
    checkpoint = {"every": every, "keep": keep} | ({"keep_every": of} if of else {})
    values = {"steps": steps, "batch_size": 1, "model": {"weights": "m"}, "data": {"source": "d"}}
    config = parse(values | {"checkpoint": checkpoint})
    assert size.kept_at_once(config) == count
    there: list[int] = []
    most = 0
    for step in [n for n in range(1, steps + 1) if n % every == 0 or n == steps]:
        there.append(step)
        most = max(most, len(there))
        there = [s for s in there[:-keep] if of and s % of == 0] + there[-keep:]
    assert most <= count <= most + 1


def test_room_for_all_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "name": "run",
        "output": str(tmp_path),
        "steps": 100,
        "batch_size": 1,
        "checkpoint": {"every": 10},
    }
    config = parse(values | {"model": {"weights": "m"}, "data": {"source": "d"}})
    free = 2 * size.checkpoint_bytes(config, None, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="3 more checkpoints take"):
        check_folder(config, None, 1000)
    write_checkpoint(config.folder / "checkpoints", 10)
    check_folder(config, None, 1000)  # the one that is there needs no room
    ema = {"enabled": True, "profiles": [0.1], "snapshots": 30}
    config = parse(config.model_dump() | {"ema": ema})
    free = 2 * size.checkpoint_bytes(config, None, 1000) + 8000
    with pytest.raises(UserError, match="2 more checkpoints and 4 more copies of averages take"):
        check_folder(config, None, 1000)
    for step in (30, 60):
        write_checkpoint(config.folder / "averages", step)
    check_folder(config, None, 1000)  # likewise


def test_a_pickle_in_place_of_a_ranks_file_is_named(path: Path) -> None:
    (path / RANK).write_bytes(pickle.dumps({"weights": [0.0]}))
    assert found_wrong(path).startswith(f"{RANK} is a pickle, which could run code")
