"""Saving behind the training: what is written is the saved step, and no failure costs a checkpoint."""

import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.engine import checkpoint, saved
from sfumato.engine.writer import Writer
from sfumato.errors import UserError
from tests.engine import toys
from tests.engine.ranks import run_ranks

ADAM: dict[str, Any] = {"optimizer__name": "adamw", "optimizer__lr": 1e-3, "micro_batch_size": 2}


class Told(list[str]):
    """What a writer told, and what stands beside a checkpoint: it waits until the training has gone on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def beside(self, folder: Path) -> None:
        assert checkpoint.Saved(folder).step, "an export could not be made from it"
        (folder / "export").mkdir()
        (folder / "export" / "thread").write_text(threading.current_thread().name)
        assert self.go_on.wait(60), "the training did not go on"


TRAINED_ON = threading.Event()
"""Set by every step."""


def steps(engine: Any, count: int) -> None:
    for _ in range(count):
        assert toys.one_step(engine, engine.step_count)
        TRAINED_ON.set()


def check_holds(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fail unless a checkpoint holds these slices, all of them, to the bit."""
    found = checkpoint.Saved(path)
    for key, part in tensors.items():
        kind, name, start = key.split("/")
        there = found.read(kind, name, int(start), part.numel())
        assert torch.equal(there, part), f"{key} is not what it was at the step"
    assert found.kinds == {key.split("/")[0] for key in tensors}


def behind(stage: int, folder: Path) -> dict[str, Any]:
    """Save at step 2, train on while it is written, then compare with what the weights were."""
    engine = toys.make(
        toys.config(**ADAM, engine__zero_stage=stage, ema__enabled=True, ema__profiles=[0.05, 0.1])
    )
    told = Told()
    steps(engine, 2)
    before = checkpoint.own_tensors(engine)
    with Writer(engine, {"data": "d"}, told.append, told.beside, folder / "checkpoints") as writer:
        torch.manual_seed(7)
        state = torch.get_rng_state()
        assert not writer.is_saved()
        writer.save("checkpoint", "averages")
        assert writer.is_saved()
        steps(engine, 1)
        seen = checkpoint.steps_in(folder / "checkpoints")
        engine.ranks.barrier()  # the other rank has looked, too
        told.go_on.set()
        writer.join()
        assert torch.equal(torch.get_rng_state(), state), "the training's random numbers were used"
        after = checkpoint.own_tensors(engine)
    engine.ranks.barrier()
    path = checkpoint.path_of(folder / "checkpoints", 2)
    if before:
        check_holds(path, before)
        with pytest.raises(AssertionError, match="is not what it was"):
            check_holds(path, after)
        averages = {key: part for key, part in before.items() if key.startswith("ema_")}
        assert len(averages) * 5 == len(before) * 2, "weight, two states, two averages"
        check_holds(checkpoint.path_of(folder / "averages", 2), averages)
    threads = [thread.name for thread in threading.enumerate() if "writer" in thread.name]
    return {"seen": seen, "told": list(told), "path": path, "threads": threads}


def late_views(folder: Path) -> None:
    """The broken variant: no copies, so that the disk gets whatever the weights are when it comes to them."""
    fill, write = saved.Memory.fill, saved.write

    def late(file: Path, tensors: Any) -> Any:
        assert TRAINED_ON.wait(60), "the training did not go on"
        return write(file, tensors)

    def no_copy(memory: Any, layout: Any, tensors: Any) -> Any:
        TRAINED_ON.clear()
        return dict(tensors)

    saved.Memory.fill = no_copy  # type: ignore[method-assign]
    saved.write = late
    try:
        with pytest.raises(AssertionError, match="is not what it was at the step"):
            behind(1, folder)
    finally:
        saved.Memory.fill, saved.write = fill, write  # type: ignore[method-assign]


def failing(folder: Path) -> dict[str, Any]:
    """Rank 1's disk is full at steps 2 and 5, and its memory at step 6."""
    engine = toys.make(toys.config(**ADAM, checkpoint__keep=2, checkpoint__keep_every=3))
    told: list[str] = []
    steps(engine, 1)
    with Writer(engine, {}, told.append, None, folder / "checkpoints") as writer:
        writer.save()
        writer.join()
        steps(engine, 1)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        ended = ""
        for step in (2, 3, 4, 5):
            if engine.ranks.rank == 1 and step in (2, 5):
                resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
            writer.save()
            try:
                writer.join()
            except UserError as error:
                ended = str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            steps(engine, 1)
            if step == 2:
                seen = sorted(path.name for path in (folder / "checkpoints").iterdir())
                assert ended, "the last save failed, and nothing said so"
                ended = ""
        memory = writer._memory
        if engine.ranks.rank == 1:
            memory.layout = {}
            memory._room = lambda size: torch.empty(2**60, dtype=torch.uint8)  # type: ignore[method-assign]
        writer.save()
        with pytest.raises(UserError, match="rank 1: RuntimeError: .* memory"):
            writer.join()
        memory.__dict__.pop("_room", None)
        steps(engine, 1)
        writer.save()
    return {"told": told, "seen": seen, "ended": ended, "left": sorted(p.name for p in folder.rglob("*"))}


def keeping(folder: Path) -> dict[str, Any]:
    """Nine saves, of which two stay and every third; then one of the same step further on in the data."""
    engine = toys.make(toys.config(**ADAM, checkpoint__keep=2, checkpoint__keep_every=3))
    told: list[str] = []
    with Writer(engine, {}, told.append, None, folder / "checkpoints") as writer:
        for _ in range(8):
            steps(engine, 1)
            writer.save()
        writer.join()
        steps_then = checkpoint.steps_in(folder / "checkpoints")
        engine.position += 1
        engine.left_out.append({"position": 8, "batches": 1, "samples": [1, 2]})
        assert not writer.is_saved()
        writer.save()
    other = toys.make(engine.config)
    checkpoint.load(other, checkpoint.Saved(checkpoint.path_of(folder / "checkpoints", 8)))
    whole = (other.step_count, other.position, other.left_out)
    checkpoints = folder / "checkpoints"
    checkpoints.rename(folder / "away")
    checkpoints.write_text("a file where the folder was")
    try:
        checkpoint.save(engine, checkpoints, {}, keep=2)
    except UserError as error:
        return {"steps": steps_then, "whole": whole, "error": str(error)}
    raise AssertionError("it was written into a file")


def forsaken(folder: Path) -> tuple[float, str]:
    """Rank 1 never saves: rank 0 says so within the limit."""
    engine = toys.make(toys.config(micro_batch_size=1, engine__timeout=3))
    writer = Writer(engine, {}, print, None, folder / "checkpoints")
    began = time.monotonic()
    if engine.ranks.rank == 0:
        writer.save()
        try:
            writer.join()
        except UserError as error:
            return time.monotonic() - began, str(error)
        return time.monotonic() - began, "it was written"
    time.sleep(5)
    return 0.0, ""


def other_optimizer(folder: Path) -> None:
    """A checkpoint of AdamW, under SGD and then under AdamW with an average; and one that has no states."""
    engine = toys.make(toys.config(**ADAM))
    steps(engine, 2)
    path = checkpoint.save(engine, folder / "adamw", {}, keep=1)
    plain = toys.make(toys.config(micro_batch_size=2, optimizer__lr=1e-3))
    checkpoint.load(plain, checkpoint.Saved(path))
    assert {key.split("/")[0] for key in checkpoint.own_tensors(plain)} == {"weight"}
    steps(plain, 1)
    path = checkpoint.save(plain, folder / "sgd", {}, keep=1)
    for average in (False, True):
        anew = toys.make(toys.config(**ADAM, ema__enabled=average))
        for _ in range(2):  # new, and again after it has trained
            checkpoint.load(anew, checkpoint.Saved(path))
            tensors = checkpoint.own_tensors(anew)
            assert all(torch.equal(tensors[key], part) for key, part in checkpoint.own_tensors(plain).items())
            steps(anew, 1)
            states = anew.deepspeed.basic_optimizer.state.values()
            assert {float(state["step"]) for state in states} == {1.0}, "Adam did not begin anew"
    path = checkpoint.save(anew, folder / "begun-late", {}, keep=1)
    late = toys.make(toys.config(**ADAM, ema__enabled=True))
    checkpoint.load(late, checkpoint.Saved(path))
    assert late.step_count == 4, "two steps of Adam, one of SGD, and one of Adam again"
    states = late.deepspeed.basic_optimizer.state.values()
    assert {float(state["step"]) for state in states} == {1.0}, "Adam counts steps that were not its own"


def on_two(folder: Path) -> dict[str, Any]:
    """All that needs two ranks, in one start of them; the last of it leaves them apart."""
    found: dict[str, Any] = {f"stage {n}": behind(n, folder / f"stage-{n}") for n in (0, 3)}
    return found | {"failing": failing(folder / "full"), "forsaken": forsaken(folder / "forsaken")}


def on_one(folder: Path) -> dict[str, Any]:
    """All that one process shows, in one start of it."""
    late_views(folder / "views")
    other_optimizer(folder / "optimizers")
    return keeping(folder / "keeping")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saving")


@pytest.fixture(scope="module")
def two(place: Path) -> list[dict[str, Any]]:
    return run_ranks(on_two, 2, place, timeout=200)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_step_that_was_saved_is_written_while_training_goes_on(two: list[Any], stage: int) -> None:
    one, other = (found[f"stage {stage}"] for found in two)
    assert one["seen"] == other["seen"] == [], "the save waited for the disk"
    assert other["told"] == [] and one["threads"] == other["threads"] == []
    assert len(one["told"]) == 2 and "checkpoints/step-000002 is written" in one["told"][0]
    assert "stood still for 0." in one["told"][0] and "averages/step-000002" in one["told"][1]
    found = checkpoint.Saved(one["path"])
    assert found.problems() == [] and sorted(found.state["export"]) == ["thread"]
    assert (one["path"] / "export" / "thread").read_text() == "writer of step 2"
    assert (found.state["position"], found.state["samples"]) == (2, 16)
    assert found.state["versions"].keys() >= {"sfumato", "torch", "deepspeed"}


def test_a_full_disk_costs_no_checkpoint_and_no_run(two: list[Any]) -> None:
    first, second = (found["failing"] for found in two)
    assert first["seen"] == ["step-000001"], "a failed save left something, or took something away"
    assert second["told"] == []
    wrong = [text for text in first["told"] if "could not be written" in text]
    assert len(wrong) == 3 and len(first["told"]) == 7
    for part in ("checkpoints/step-000002", "rank 1: File too large", "are needed", "are free", "goes on"):
        assert part in wrong[0], wrong[0]
    for result in (first, second):
        assert "rank 1: File too large" in result["ended"] and "goes on from step 4" in result["ended"]
    names = [name for name in first["left"] if name.startswith(("step", ".step"))]
    assert names == ["step-000003", "step-000004", "step-000007"]


def test_a_rank_that_does_not_save_is_named_in_time(two: list[Any], place: Path) -> None:
    seconds, said = two[0]["forsaken"]
    assert seconds < 12 and "Ranks 1 failed" in said and "waiting for the others" in said, said
    assert not [*(place / "forsaken").rglob("step-*")]


def test_what_stays_and_what_is_replaced(place: Path) -> None:
    """And that copies are copies, and an optimizer that finds no states of its own begins anew."""
    [found] = run_ranks(on_one, 1, place, timeout=200)
    assert found["steps"] == [3, 6, 7, 8]
    assert found["whole"] == (8, 9, [{"position": 8, "batches": 1, "samples": [1, 2]}])
    assert "checkpoints" in found["error"] and "mend that" in found["error"]
    assert not [*place.rglob(".step-*")]
