"""`bench peers`: what is read off its sides, and that unequal losses end it. The bare loop runs for real."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sfumato.bench import bare, entrants, peers
from sfumato.bench.entrants import Entrant, race, read_bar
from sfumato.errors import UserError

WRITES = """
import json, sys, time
with open(sys.argv[1], "w") as file:
    for step in range(1, 6):
        if step == int(sys.argv[2]):
            sys.exit("no more paint")
        time.sleep(0.05)
        file.write(json.dumps({"step": step, "seconds": time.perf_counter(), "loss": step / 10}) + "\\n")
        file.flush()
"""


def side(folder: Path, stop: int = 0) -> Entrant:
    file = folder / "side" / "metrics.jsonl"
    return Entrant("a side", [sys.executable, "-c", WRITES, str(file), str(stop)], file.parent, 5, file)


def test_a_side_is_watched_to_its_last_step(tmp_path: Path) -> None:
    seen = race(side(tmp_path))
    assert seen.losses == [0.1, 0.2, 0.3, 0.4, 0.5]
    steps = [later - earlier for earlier, later in zip(seen.times, seen.times[1:], strict=False)]
    assert len(steps) == 4 and all(step >= 0.05 for step in steps)
    assert seen.memory > 1e6


def test_a_side_that_ends_early_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a side ended after 2 of 5 steps:\nno more paint"):
        race(side(tmp_path, stop=3))


def test_a_progress_bar_is_read_with_the_loss_of_its_own_step(tmp_path: Path) -> None:
    drawn = [
        b"Steps:   0%|  | 0/3 [00:00<?, ?it/s]\rSteps:  33%|# | 1/3 [00:01<00:02, 1.0s/it]",
        b"\rSteps:  33%|# | 1/3 [00:01<00:02, 1.0s/it, lr=1e-5, step_loss=0.5]",
        b"\rSteps:  67%|##| 2/3 [00:02<00:01, 1.0s/it, lr=1e-5, step_loss=0.5]",
        b"\rSteps:  67%|##| 2/3 [00:02<00:01, 1.0s/it, lr=1e-5, step_lo",
        b"ss=0.25]\rSteps: 100%|##| 3/3 [00:02<00:01, 1.0s/it, lr=1e-5, step_loss=0.25]",
        b"\rSteps: 100%|##| 3/3 [00:02<00:01, 1.0s/it, lr=1e-5, step_loss=1.5e-3]\n",
        b"",
    ]
    found: list[tuple[float, float]] = []
    with (tmp_path / "words").open("wb") as words:
        parts = iter(drawn)
        read_bar(lambda size: next(parts), found, words)
    assert [loss for _, loss in found] == [0.5, 0.25, 0.0015]
    assert (tmp_path / "words").read_bytes() == b"".join(drawn)


def test_losses_that_chance_does_not_explain_end_it() -> None:
    equal = [{"name": "one", "losses": [1.0, 0.02]}, {"name": "two", "losses": [1.05, 0.02]}]
    peers.compare_losses(equal)
    with pytest.raises(AssertionError, match="two has the loss 1.3000, not 1.0000"):
        peers.compare_losses([equal[0], {"name": "two", "losses": [1.3, 0.02]}])


def test_the_bare_loop_trains_on_the_same_world(tmp_path: Path) -> None:
    parameters = peers.world(tmp_path, "tiny", 64)
    file = tmp_path / "lines.jsonl"
    model, pictures = tmp_path / "model", tmp_path / "pictures"
    bare.main(model, pictures, 3, 8, 64, file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0.5 < line["loss"] < 2 for line in lines), (
        lines
    )  # untrained, it says about nothing of the noise
    moments, states = bare.encoded(model, pictures, 64)
    assert moments.shape == (peers.PICTURES, 8, 8, 8) and states.shape == (peers.PICTURES, 77, 32)
    assert (moments[:, 4:] > 0).all()  # standard deviations
    assert parameters > 1e5
    torch.testing.assert_close(moments, bare.encoded(model, pictures, 64)[0])


def test_every_side_is_asked_for_the_same(tmp_path: Path) -> None:
    sides = entrants.entrants(tmp_path, 64, 8, 5, tmp_path / "script.py")
    assert [one.name for one in sides][-1] == "diffusers' example"
    assert len({one.folder for one in sides}) == len(sides) == 4
    assert {"--train_batch_size=8", "--max_train_steps=5", "--resolution=64"} <= set(sides[3].command)
    assert [one.name for one in peers.order(sides, 1)] == [one.name for one in reversed(sides)]


def test_a_folder_without_the_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file .*train_text_to_image.py"):
        peers.run("tiny", tmp_path, 1, None)
