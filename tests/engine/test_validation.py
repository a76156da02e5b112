"""Validation and previews in real runs: the same on any ranks, told once, and no step knows of them."""

import contextlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sfumato import train as loop
from sfumato import validation
from sfumato.config import parse
from sfumato.demo import emoji
from sfumato.demo.run import SHIPPED
from sfumato.errors import Stopped
from sfumato.models.sd import StableDiffusion
from sfumato.validation.points import Points
from sfumato.watch import Watch
from tests.engine import runs
from tests.engine.ranks import run_ranks
from tests.engine.test_controlnet import write_pairs
from tests.engine.test_replay import planted
from tests.engine.test_training import check_same_bits

LIGHT: dict[str, Any] = {"checkpoint__export": False, "steps": 3}
LOOKS: dict[str, Any] = {
    "validation": {"samples": 3, "quantiles": 3, "every": 2},
    "preview": {"prompts": ["a cat", "a dog", "a hen"], "every": 2, "steps": 2},
}
LORA: dict[str, Any] = {"kind": "lora", "rank": 2, "dropout": 0.5, "text_encoders": True}
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema_0.05", "ema_0.1")


def lines_of(run: Path) -> list[dict[str, Any]]:
    """What a run's validation told, without how long it took."""
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def steps_of(run: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["weights"]) for line in lines_of(run)]


def drawn(run: Path) -> dict[str, bytes]:
    """The previews' files."""
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.glob("images/*/*"))}


def pixels(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).tobytes()


def one(place: Path, where: str, **changes: Any) -> dict[str, Any]:
    """A run that holds records out; all of them are called alike, so that their files can be compared."""
    return runs.settings(place, output=str(place / where), **LIGHT | LOOKS | changes)


def apart(place: Path, name: str, looks: bool, **changes: Any) -> dict[str, Any]:
    """A run of a LoRA with dropout on all of the data, with looks at others or without."""
    told = {"method": LORA, "ema": {"enabled": True, "profiles": [0.05, 0.1]}, **LIGHT, "steps": 2, **changes}
    if looks:
        told["preview"] = {"prompts": ["a cat"], "every": 1, "steps": 2}
        told["validation"] = {"source": str(place / "others"), "samples": 3, "quantiles": 2, "every": 1}
    return runs.settings(place, name=name, **told)


def state() -> tuple[Any, ...]:
    """What this process's random numbers come from."""
    return torch.get_rng_state().numpy().tobytes(), torch.initial_seed()


@contextlib.contextmanager
def watched(found: Counter[str]) -> Iterator[None]:
    """Within it every look must leave all as it was; what is beaten is counted."""
    beat = Watch.beat

    def told(self: Watch, step: int, doing: str) -> None:
        found[doing.partition(",")[0]] += 1
        beat(self, step, doing)

    def checked(look: Any) -> Any:
        def call(self: Any) -> None:
            module = self.engine.deepspeed.module
            before = state(), [part.training for part in module.modules()], self.engine.position
            masters = [shard.master.clone() for shard in validation_shards(self.engine)]
            look(self)
            assert before == (state(), [part.training for part in module.modules()], self.engine.position)
            after = [shard.master for shard in validation_shards(self.engine)]
            assert all(torch.equal(one, other) for one, other in zip(masters, after, strict=True))
            assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()

        return call

    calls = loop.Validation.__call__, loop.Previews.__call__
    Watch.beat = told  # type: ignore[method-assign]
    loop.Validation.__call__, loop.Previews.__call__ = map(checked, calls)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Watch.beat = beat  # type: ignore[method-assign]
        loop.Validation.__call__, loop.Previews.__call__ = calls  # type: ignore[method-assign]


def validation_shards(engine: Any) -> list[Any]:
    from sfumato.engine import shards

    return list(shards.owned(engine.deepspeed))


@contextlib.contextmanager
def left_in_eval(module: torch.nn.Module) -> Iterator[None]:
    """A broken `evaluating`."""
    module.eval()
    yield


def again(run: Path, place: Path) -> dict[str, Any]:
    """A run that is done, started again: as it is, and with the traces of a kill while it validated."""
    files = {file: file.stat().st_mtime_ns for file in run.glob("images/*/*")}
    text = (run / "validation.jsonl").read_text()
    runs.train_here(one(place, "one"))
    assert (run / "validation.jsonl").read_text() == text
    assert files == {file: file.stat().st_mtime_ns for file in run.glob("images/*/*")}
    lines = text.splitlines(keepends=True)
    behind = lines[-1].replace('"step": 3', '"step": 9')
    (run / "validation.jsonl").write_text("".join(lines[:-1]) + behind + lines[-1][:40])
    shutil.copytree(run / "images" / "step-000003", run / "images" / "step-000009")
    (run / "images" / "step-000003" / "drawings.jsonl").unlink()
    runs.train_here(one(place, "one"))
    return {"lines": lines_of(run), "drawn": drawn(run)}


def stopped(place: Path) -> dict[str, Any]:
    """A run that is asked to stop while it validates for the first time, and started again."""
    values = one(place, "stopped", preview={})
    run = place / "stopped" / "run"
    losses = validation.Validation.losses

    def asked(self: Any, *told: Any) -> Any:
        (run / "stop").touch()
        self.stop.__self__._looked = -1e9  # the file is looked for once a second at most
        return losses(self, *told)

    validation.Validation.losses = asked  # type: ignore[method-assign]
    try:
        runs.train_here(values)
        ended = "it did not stop"
    except Stopped as error:
        ended = str(error)
    finally:
        validation.Validation.losses = losses  # type: ignore[method-assign]
    there = (run / "validation.jsonl").exists()
    runs.train_here(values)
    return {"ended": ended, "there": there, "lines": lines_of(run)}


def cached(place: Path) -> dict[str, Any]:
    """A run that reads caches; what is in memory once the validation has encoded."""
    values = one(place, "cached", steps=1, validation=LOOKS["validation"], preview={})
    values["data"] |= {"cache": "both", "center_crop": True}
    held: list[str] = []
    encode = Points.of

    def encoded(*told: Any) -> Any:
        found = encode(*told)
        held.extend({"vae", "text_encoders"} & vars(told[3].family).keys())
        return found

    loop.Points.of = encoded  # type: ignore[method-assign]
    try:
        run = runs.train_here(values).parent
    finally:
        loop.Points.of = encode  # type: ignore[method-assign]
    return {"held": held, "lines": lines_of(run)}


class Enough(Exception):
    """Raised where a test has seen what it looks for."""


def only_at_first(values: dict[str, Any]) -> Path:
    """A run that ends after its first validation."""
    look = loop.Validation.__call__

    def then_end(self: Any) -> None:
        look(self)
        raise Enough

    loop.Validation.__call__ = then_end  # type: ignore[method-assign]
    try:
        with pytest.raises(Enough):
            runs.train_here(values)
    finally:
        loop.Validation.__call__ = look  # type: ignore[method-assign]
    return Path(values["output"]) / values["name"]


def dead(place: Path) -> list[dict[str, Any]]:
    """The shipped model's first validation, and that of one which is told nothing of the text."""
    emoji.write_images("noto", place / "noto", codes=list(emoji.concepts())[:12])
    looks = {"samples": 4, "quantiles": 3}
    values = one(place, "dead", steps=1, batch_size=1, micro_batch_size=4, validation=looks, preview={})
    values |= {"batch_size": 4, "model": {"weights": str(SHIPPED), "vae_dtype": "fp32"}}
    values["data"] |= {"source": str(place / "noto")}
    right, found = StableDiffusion.inputs, []

    def planted(self: Any, dtype: Any, x_t: Any, t: Any, condition: Any) -> Any:
        null = {name: rows.expand(len(x_t), *rows.shape[1:]) for name, rows in self.null_condition().items()}
        return right(self, dtype, x_t, t, condition | null)

    for name, inputs in (("seen", right), ("ignored", planted)):
        StableDiffusion.inputs = inputs  # type: ignore[method-assign]
        try:
            found += lines_of(only_at_first(values | {"name": name}))
        finally:
            StableDiffusion.inputs = right  # type: ignore[method-assign]
    return found


def on_one(told: str) -> dict[str, Any]:
    """All that one rank does."""
    place, beats = Path(told), Counter[str]()
    runs.without_exports()
    runs.train_here(apart(place, "plain", looks=False))
    with watched(beats):
        runs.train_here(apart(place, "looked", looks=True))
    validation.evaluating, right = left_in_eval, validation.evaluating
    runs.train_here(apart(place, "broken", looks=True) | {"preview": {}})
    validation.evaluating = right
    run = runs.train_here(one(place, "one", log__samples=True)).parent
    found = {"beats": dict(beats), "lines": lines_of(run), "drawn": drawn(run)}
    shutil.copytree(place / "one", place / "moved")
    found["again"] = again(run, place)
    found["stopped"], found["cached"], found["dead"] = stopped(place), cached(place), dead(place)
    found |= other_methods(place)
    back = apart(place, "back", looks=True, steps=4, checkpoint__every=2)
    back |= {"bad_numbers": {"policy": "rollback"}, "preview": {}, "ema": {"enabled": False}}
    return found | {"back": lines_of(planted(parse(back), 3).parent)}


def on_two(told: str) -> dict[str, Any]:
    """All that each of two ranks does."""
    place, found = Path(told), {}
    runs.without_exports()
    found["two"] = runs.train_here(one(place, "two", steps=1)).parent
    if torch.distributed.get_rank() == 0:
        (place / "moved" / "run" / "validation.jsonl").unlink()
        shutil.rmtree(place / "moved" / "run" / "images")
    torch.distributed.barrier()
    found["moved"] = runs.train_here(one(place, "moved", engine__zero_stage=3)).parent
    third: dict[str, Any] = {"engine__zero_stage": 3, "method": {"kind": "full"}}
    runs.train_here(apart(place, "third", looks=False, **third))
    with watched(beats := Counter()):
        runs.train_here(apart(place, "third-looked", looks=True, **third))
    return found | {"beats": dict(beats)}


def other_methods(place: Path) -> dict[str, Path]:
    """A run of a ControlNet and one of a new word."""
    control = one(place, "control", engine__zero_stage=2, optimizer__lr=1e-2, ema__enabled=False, steps=2)
    shown = {"prompts": ["a cat"], "steps": 1, "conditions": [str(place / "pairs" / "hints" / "1.png")]}
    control |= {"method": {"kind": "controlnet"}, "preview": shown}
    control["data"] |= {"source": str(place / "pairs"), "conditioning_column": "hint"}
    words = one(place, "words", engine__zero_stage=2, optimizer__lr=0.05, steps=2, preview={})
    words |= {"method": {"kind": "textual_inversion", "like": "red", "vectors": 2}}
    words["data"]["caption_prefix"] = "<new> in "
    return {Path(values["output"]).name: runs.train_here(values).parent for values in (control, words)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write_place(tmp_path_factory.mktemp("validation"), "sd")
    runs.write_pictures(folder / "others", 4)
    write_pairs(folder / "pairs", 0)
    return folder


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, Any]:
    return run_ranks(on_one, 1, str(place), timeout=400)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def two(place: Path, alone: dict[str, Any]) -> dict[str, Any]:
    return run_ranks(on_two, 2, str(place), timeout=400)[0]  # type: ignore[no-any-return]


# What is told.


def test_it_is_told_at_the_start_every_so_often_and_at_the_end(alone: dict[str, Any]) -> None:
    steps = [(line["step"], line["weights"]) for line in alone["lines"]]
    assert steps == [(0, "live"), (2, "live"), (2, "ema"), (3, "live"), (3, "ema")]
    for line in alone["lines"]:
        assert [part["t"] for part in line["quantiles"]] == [166, 500, 833] and line["samples"] == 3
        for name in ("loss", "null_loss"):
            parts = [part[name] for part in line["quantiles"]]
            assert line[name] == pytest.approx(sum(parts) / 3, rel=1e-12)
        assert line["gap"] == line["null_loss"] - line["loss"]
    live, mean = alone["lines"][3:]
    assert live["loss"] != mean["loss"] and live["loss"] < alone["lines"][0]["loss"], "it learned nothing"
    assert sorted({file.split("/")[1] for file in alone["drawn"]}) == [f"step-00000{n}" for n in (0, 2, 3)]


def test_t6_no_step_of_a_run_trained_on_what_it_held_out(place: Path, alone: dict[str, Any]) -> None:
    seen = {number for line in runs.metrics(place / "one" / "run") for number in line["samples"]}  # type: ignore[attr-defined]
    facts = [json.loads(file.read_text()) for file in (place / "cache").rglob("held-*.json")]
    [held] = {tuple(number for _, number in told["rows"]) for told in facts if told["usable"] == 7}
    assert len(held) == 3 and seen == set(range(7)) - set(held)


def test_a_step_is_not_told_twice(alone: dict[str, Any]) -> None:
    """Whatever a kill left behind, the file is in the end that of a run which was never stopped."""
    assert alone["again"]["lines"] == alone["lines"]
    assert alone["again"]["drawn"] == alone["drawn"]


def test_who_asks_a_run_to_stop_does_not_wait_for_its_validation(alone: dict[str, Any]) -> None:
    found = alone["stopped"]
    assert "stop" in found["ended"] and not found["there"], found["ended"]
    assert found["lines"] == alone["lines"]


def test_lines_of_steps_that_were_undone_are_gone(alone: dict[str, Any]) -> None:
    steps = [line["step"] for line in alone["back"] if line["weights"] == "live"]
    assert steps == [0, 1, 2, 3, 4]


# The same number whatever else is so.


def test_t18_one_rank_and_two_tell_the_same_to_the_bit(alone: dict[str, Any], two: dict[str, Any]) -> None:
    """At the start at stage 1, and at stage 3 of one run's weights and averages once they were trained."""
    assert lines_of(two["two"])[0] == alone["lines"][0]
    assert lines_of(two["moved"]) == alone["lines"][3:]


def test_previews_of_one_rank_and_two_are_the_same_files(alone: dict[str, Any], two: dict[str, Any]) -> None:
    def at(step: int, files: dict[str, bytes]) -> dict[str, bytes]:
        return {name: content for name, content in files.items() if f"step-{step:06d}" in name}

    first, last = at(0, alone["drawn"]), at(3, alone["drawn"])
    assert len(first) == len(last) == 4
    ours, theirs = (pixels(files[min(files)]) for files in (first, last))
    assert ours != theirs, "training changed no picture"
    assert at(0, drawn(two["two"])) == first
    assert drawn(two["moved"]) == last


def test_a_cache_changes_nothing_and_its_encoders_are_let_go(alone: dict[str, Any]) -> None:
    assert alone["cached"]["lines"][0] == alone["lines"][0]
    assert alone["cached"]["held"] == []


# No step knows of it.


@pytest.mark.parametrize(("plain", "looked"), [("plain", "looked"), ("third", "third-looked")])
def test_training_is_the_same_to_the_bit_with_and_without(
    place: Path, two: dict[str, Any], plain: str, looked: str
) -> None:
    """LoRA with dropout in text encoders too on one rank, and every weight at ZeRO 3 on two."""
    ours, theirs = place / "runs" / looked, place / "runs" / plain
    assert steps_of(ours)[:4] == [(0, "live"), (1, "live"), (1, "ema_0.05"), (1, "ema_0.1")]
    assert [m["loss"] for m in runs.metrics(ours)] == [m["loss"] for m in runs.metrics(theirs)]
    for kind in KINDS:
        check_same_bits(runs.tensors_of(ours, kind), runs.tensors_of(theirs, kind))


def test_a_look_that_leaves_its_mode_behind_is_caught(place: Path, alone: dict[str, Any]) -> None:
    """At the second step: a LoRA begins with zeros, of which nothing can be dropped."""
    broken, plain = (runs.metrics(place / "runs" / name)[1]["loss"] for name in ("broken", "plain"))
    assert broken != plain, "without dropout the loss is the same"


def test_the_watch_hears_of_every_pass(alone: dict[str, Any], two: dict[str, Any]) -> None:
    """Three records at two levels in twos; weights at 3 steps, two averages at 2; one picture of 2 steps."""
    assert alone["beats"]["validating"] == 3 * (3 + 2 * 2)
    assert alone["beats"]["drawing the previews"] == 3 * (1 + 2)
    assert two["beats"]["validating"] == 2 * (3 + 2 * 2), "a pass that fills up is one of the ranks' passes"
    assert two["beats"]["drawing the previews"] == 3 * (1 + 2)


# What the numbers mean.


def check_text_counts(line: dict[str, Any]) -> None:
    """Fail if the text makes less than a tenth of the difference that a trained model's does."""
    gap = [part["null_loss"] - part["loss"] for part in line["quantiles"]]
    assert line["gap"] > 0.02 and min(gap) > 0.005, f"the text is ignored: {line['gap']:.2g}, {gap}"


def test_a_model_that_ignores_the_text_has_no_gap(alone: dict[str, Any]) -> None:
    seen, ignored = alone["dead"]
    check_text_counts(seen)
    assert ignored["gap"] == 0
    with pytest.raises(AssertionError, match="ignored"):
        check_text_counts(ignored)


def test_a_controlnet_is_asked_with_its_image_and_without(alone: dict[str, Any]) -> None:
    """It begins with zeros, so that its image first makes no difference, and then one."""
    first, last = lines_of(alone["control"])
    assert first["hint_gap"] == 0 != last["hint_gap"]
    assert all("hint_loss" in part for part in last["quantiles"]) and last["loss"] < first["loss"]
    files = drawn(alone["control"])
    assert len(files) == 5 and "images/conditions/000.png" in files
    assert Image.open(io.BytesIO(files["images/conditions/000.png"])).size == (64, 64)
    told = json.loads(files["images/step-000000/drawings.jsonl"].splitlines()[0])
    assert told["condition"].endswith("1.png")


def test_a_new_word_is_read_as_in_training(alone: dict[str, Any]) -> None:
    first, live, mean = lines_of(alone["words"])
    assert first["loss"] != live["loss"] != mean["loss"] and live["null_loss"] == first["null_loss"]
